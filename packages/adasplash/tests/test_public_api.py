"""The package as a distribution: public names and documentation."""

from __future__ import annotations

import doctest

import pytest
import torch

import adasplash
from adasplash import api, modules, paged, sdpa
from shared_kernels import native


@pytest.mark.parametrize("module", [api, modules, paged, sdpa], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    names = {name: getattr(adasplash, name) for name in adasplash.__all__}
    found = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert found.attempted and not found.failed


def test_explain_names_the_backends():
    from adasplash import explain

    x, q = torch.randn(2, 3), torch.randn(1, 2, 5, 8, requires_grad=True)
    lengths = torch.tensor([4])
    fast = "torch" if native.why_not() else "native"
    assert f"{fast}: chosen" in explain(adasplash.triton_entmax, x)
    calls = [
        ("attention", adasplash.adasplash, (q, q, q), {"is_causal": True}),
        ("attention", adasplash.adasplash_no_block_mask, (q, q, q), {}),
        ("attention", adasplash.scaled_dot_product_attention, (q, q, q[..., :3]), {}),
        ("attention", adasplash.entmax_decode, (q[:, :, :1], q, q, lengths), {}),
        ("attention_stats", adasplash.attention_stats, (q, q), {}),
        ("entmax", adasplash.scaled_dot_product_attention, (q, q, q), {"dropout_p": 0.5}),
        ("attention", adasplash.MultiheadAttention(8, 2), (q[0],) * 3, {"need_weights": False}),
        ("attention", adasplash.EntmaxAttention(8, 2), (q[0],), {}),
        ("lazy", adasplash.LazyAttention(8, 2, 4), (q[0],), {}),
    ]
    for op, function, arguments, options in calls:
        text = explain(function, *arguments, **options)
        assert text.splitlines()[0] == f"adasplash::{op}:"
        assert text.count(": chosen") == 1
        assert f"{fast if op in ('attention', 'entmax', 'lazy') else 'torch'}: chosen" in text
    with pytest.raises(ValueError, match="`function` must run an op of adasplash, got softmax"):
        explain(torch.softmax, x, -1)
