"""The package as a distribution: public names and documentation."""

from __future__ import annotations

import doctest

import pytest
import torch

import adasplash
from adasplash import api, modules, sdpa


@pytest.mark.parametrize("module", [api, modules, sdpa], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    names = {name: getattr(adasplash, name) for name in adasplash.__all__}
    found = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert found.attempted and not found.failed


def test_explain_names_the_backends():
    x = torch.randn(2, 3)
    assert "cpu: chosen" in adasplash.explain(adasplash.triton_entmax, x)
    q = x.view(1, 1, 2, 3)
    assert "cpu: chosen" in adasplash.explain(adasplash.adasplash, q, q, q, is_causal=True)
    with pytest.raises(ValueError, match="`function` must be one of"):
        adasplash.explain(torch.softmax, x)
