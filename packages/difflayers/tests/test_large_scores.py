"""Scores of any size: sums of weights keep their digits beside 1e8 in fp32, kept apart from it."""

from __future__ import annotations

import math

import pytest
import torch

from difflayers import _ops, _reference
from difflayers._call import NeighbourAttention
from shared_kernels.testing import assert_close

SIZES = (1.0, 1e4, 1e8, 1e16)
H, L, S, K = 2, 7, 30, 12


def check(size, dtype, scale, backend, where="cpu"):
    """Attention to lists with scores of `size` and a few steps more, against float64."""
    torch.manual_seed(0)
    grain = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    base = 2.0 ** math.floor(math.log2(size))  # every type holds it
    steps = torch.randint(0, 6, (1, H, S)) * max(2.0**-4, 4 * grain * base)
    tensors = (
        torch.ones(1, H, L, 2, dtype=torch.float64),
        torch.stack((torch.full_like(steps, base), steps), -1).double(),
        torch.randn(1, H, S, 3, dtype=torch.float64),
    )
    index = torch.rand(1, L, S).argsort(-1)[..., :K].contiguous()
    index[:, 1, 2:] = index[:, 3] = -1
    tensors, index = [x.to(dtype).to(where) for x in tensors], index.to(where)

    def run(attend, dtype):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        o = attend(NeighbourAttention(*x, index, scale))
        d_out = torch.linspace(-1, 1, o.numel(), dtype=dtype, device=where).view_as(o)
        dq, *others = torch.autograd.grad(o, x, d_out)
        # weights sum to 1: what multiplies the large coordinate cancels but for its rounding
        return o, dq / max(1.0, base), *others

    out, *ours = run(lambda call: _ops.neighbour_attention(call, backend), dtype)
    exact, *theirs = run(_reference.neighbour_attention, torch.float64)
    assert_close(out, exact)
    for gradient, right in zip(ours, theirs, strict=True):
        assert_close(gradient, right, "gradient")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_neighbour_attention(scale, dtype, size):
    check(size, dtype, scale, "torch")
