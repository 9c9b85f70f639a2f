"""Scores of any size: sums of weights keep their digits beside 1e8 in fp32, kept apart from it."""

from __future__ import annotations

import math

import pytest
import torch

from difflayers import _ops, _reference
from difflayers._call import Association, NeighbourAttention
from shared_kernels.testing import assert_close, cpu_backends, pairwise

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


def check_association(size, dtype, scale, steps, mask, backend):
    """Associations with scores of `size` and a few steps more, exactly, against float64.

    With updates only masks are that large: rounding of a state times a large pattern stays.
    """
    torch.manual_seed(0)
    base = 2.0 ** math.floor(math.log2(size))
    keys = 130  # three tiles of the native library, the largest scores in the second
    steps_of = torch.randint(0, 5, (1, H, keys)) * max(2.0**-4, 4 * torch.finfo(dtype).eps * base)
    steps_of[..., 70] *= 2
    large = torch.zeros(()) if mask == "added" else torch.full((), base)
    tensors = (
        torch.ones(1, H, L, 2, dtype=torch.float64),
        torch.stack((large.expand_as(steps_of), 0.0 * steps_of), -1).double(),
        torch.randn(1, H, keys, 3, dtype=torch.float64),
    )
    given = None
    if mask == "added":
        given = (base + steps_of.double())[:, :, None].repeat(1, 1, L, 1)
        given[..., 3, :] = -torch.inf
    else:
        tensors[1][..., 1] = steps_of
    if mask == "hidden":
        given = torch.rand(1, H, L, keys) < 0.5
        given[..., 3, :] = False

    def run(dtype, backend):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        added = given.to(dtype) if mask == "added" else given
        o = _ops.association(Association(*x, added, scale, steps, True), backend)
        d_out = torch.linspace(-1, 1, o.numel(), dtype=dtype).view_as(o)
        dq, *others = torch.autograd.grad(o, x, d_out)
        # weights sum to 1: what multiplies the large coordinate cancels but for its rounding
        return o, dq / max(1.0, base), *others

    out, *ours = run(dtype, backend)
    exact, *theirs = run(torch.float64, "reference")
    assert_close(out, exact)
    for gradient, right in zip(ours, theirs, strict=True):
        assert_close(gradient, right, "gradient")


@pairwise(
    size=SIZES,
    scale=[1.0, -0.5],
    case=[(0, "none"), (0, "hidden"), (0, "added"), (3, "added")],
    backend=[cpu_backends()[0], "reference"],
)
def test_association(size, scale, case, backend):
    check_association(size, torch.float32, scale, *case, backend)


@pairwise(dtype=[torch.float32, torch.bfloat16], steps=[0, 3], backend=cpu_backends())
def test_a_mask_of_the_smallest_number_weighs_all_alike(dtype, steps, backend):
    torch.manual_seed(0)
    tensors = [torch.randn(1, H, n, 8).to(dtype) for n in (L, S, S)]
    mask = torch.zeros(1, H, L, S, dtype=dtype)
    mask[..., 1, :] = mask[..., 2, 1:] = torch.finfo(dtype).min
    mask[..., 3, :] = -torch.inf

    def run(dtype, backend):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        o = _ops.association(Association(*x, mask.to(dtype), 0.5, steps), backend)
        d_out = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).to(tensors[0].dtype)
        return o, *torch.autograd.grad(o, x, d_out.to(dtype).view_as(o))

    found, exact = run(dtype, backend), run(torch.float64, "reference")
    assert not found[0][..., 3, :].any() and found[0][..., 1, :].any()
    for ours, right, kind in zip(found, exact, ("forward", *["gradient"] * 3), strict=True):
        assert_close(ours, right.to(dtype), kind)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_neighbour_attention(scale, dtype, size):
    check(size, dtype, scale, "torch")
