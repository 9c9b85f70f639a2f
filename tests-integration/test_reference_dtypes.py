"""References of every package compute half types in fp32, where 65 504 is no large number."""

from __future__ import annotations

import pytest
import torch

from adasplash import PagedCache, adasplash, entmax_decode, lazy_attention_triton
from difflayers import _ops
from difflayers._call import Association, NeighbourAttention
from diffmax import diffmax_bisect, diffmax_linear_loss
from dsalt.kernels import dsalt_attention
from shared_kernels.testing import assert_close

N = 8


def _decoded(q, k, v):
    cache = PagedCache(2, 2, 2, 2, page_size=16, dtype=q.dtype)
    cache.add(k, v)
    return entmax_decode(q[:, :, :1], cache, scale=1.0, backend="reference")


CALLS = {
    "adasplash": lambda q, k, v: adasplash(q, k, v, 1.5, scale=1.0, backend="reference"),
    "lazy": lambda q, k, v: lazy_attention_triton(
        q, k, v, q.new_zeros(2, 4), q.new_zeros(2), window_size=3, scale=1.0, backend="reference"
    ),
    "dsalt": lambda q, k, v: dsalt_attention(
        q,
        k,
        v,
        window_sizes=torch.full((1, 2, N), 4),
        landmark_idx=torch.zeros(1, 2, 2, dtype=torch.int32),
        scale=1.0,
        backend="reference",
    ),
    "association": lambda q, k, v: _ops.association(
        Association(q, k, v, None, 1.0, 0), "reference"
    ),
    "neighbours": lambda q, k, v: _ops.neighbour_attention(
        NeighbourAttention(q, k, v, torch.arange(N).expand(1, N, N).contiguous(), 1.0), "reference"
    ),
    "diffmax": lambda q, k, v: diffmax_bisect(k[..., 1], 0.5, backend="reference") @ v,
    "vocabulary": lambda q, k, v: diffmax_linear_loss(
        q[0, 0], k[0, 0], torch.arange(N) % 2, reduction="none", backend="reference"
    ),
    "decoding": _decoded,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_half_types_are_computed_in_fp32(name, dtype, under_autocast):
    torch.manual_seed(0)
    steps = torch.randint(0, 6, (1, 2, N)).double()
    q = torch.tensor([128.0, 1.0]).double().expand(1, 2, N, 2)
    k = torch.stack((torch.full_like(steps, 1024.0), steps), -1)
    v = torch.randn(1, 2, N, 2).to(dtype).double()  # what the type holds
    differentiable = name != "decoding"

    def run(dtype, under_autocast=False):
        x = [t.to(dtype).requires_grad_(differentiable) for t in (q, k, v)]
        with torch.autocast("cpu", dtype if under_autocast else None, enabled=under_autocast):
            out = CALLS[name](*x)
        if not differentiable:
            return (out,)
        return out, *torch.autograd.grad(out.sum(), x, allow_unused=True)

    exact, found = run(torch.float64), run(dtype, under_autocast)
    kinds = ("forward", *["gradient"] * 3)
    for a, b, kind in zip(found, exact, kinds, strict=False):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b.to(a.dtype), kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_without_numbers_have_references_too(dtype):
    x = torch.empty(1, 2, N, 4, dtype=dtype, device="meta")
    out = adasplash(x, x, x, 1.5, backend="reference")
    assert (out.dtype, out.shape, out.device.type) == (dtype, x.shape, "meta")
