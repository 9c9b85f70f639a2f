"""The registered ops: opcheck, compile without graph breaks, autocast, dispatch."""

from __future__ import annotations

import pytest
import torch

from adasplash import _ops, adasplash, triton_entmax
from adasplash._call import Attention
from shared_kernels import dispatch
from shared_kernels.testing import assert_close, contracts

from .cases import BY_NAME, PER_HEAD, inputs


def attention_arguments(name, alpha=1.5):
    tensors, options = inputs(BY_NAME[name], alpha)
    fields = {k: t.float().requires_grad_() for k, t in tensors.items()}
    fields["slopes"] = fields.pop("alibi_slopes", None)
    fields["alpha_value"] = options.pop("alpha", 0.0)
    return Attention(**fields, **{"scale": 0.25, **options}).check()


class TestAttentionOp(contracts.OpContract):
    op = staticmethod(_ops.attention.overload)

    def samples(self):
        return [
            attention_arguments("grouped"),
            attention_arguments("varlen", PER_HEAD),
            attention_arguments("bias", PER_HEAD),
            attention_arguments("alibi-causal"),
        ]


class TestRowsOp(contracts.OpContract):
    op = torch.ops.adasplash.entmax.default

    def samples(self):
        x = torch.randn(3, 5, 9, requires_grad=True)
        alpha = torch.rand(5, 1).add(1).requires_grad_()
        return [(x, torch.tensor(1.5, dtype=torch.float64), 40, True), (x, alpha, 40, True)]


@pytest.mark.system
def test_compiled_backward():
    torch._dynamo.reset()

    def loss(q, k, v, alpha):
        return adasplash(q, k, v, alpha, is_causal=True).square().sum()

    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 8).unbind()]
    leaves.append(torch.tensor([1.3, 1.6], requires_grad=True))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(ours, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(a, b, "gradient", scale=0.1)


def test_autocast():
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adasplash(q, k, v)
        rows = triton_entmax(q.bfloat16())
        double = adasplash(q.double(), k.double(), v.double())
    assert out.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert rows.dtype == torch.float32  # as torch.softmax
    assert_close(out, adasplash(q.bfloat16(), k.bfloat16(), v.bfloat16()), scale=0.1)


def test_the_backend_that_ran_is_known():
    adasplash(*torch.randn(3, 1, 1, 4, 4), backend="cpu")
    assert dispatch.last("adasplash::attention") == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_same_bits(dtype):
    runs = []
    for _ in range(2):
        tensors, options = inputs(BY_NAME["bias-per-head-causal"], PER_HEAD)
        leaves = [x.to(dtype).requires_grad_() for x in tensors.values()]
        out = adasplash(**dict(zip(tensors, leaves, strict=True)), **options)
        runs.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
