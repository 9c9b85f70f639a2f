"""Repeated association by the native library against the formula in float64."""

import pytest
import torch

from shared_kernels import native
from shared_kernels.native import association
from shared_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 7, 9, 5, 6), (1, 2, 50, 130, 32, 32), (1, 1, 30, 64, 64, 17)]


def scale_of(q):
    """That of an ordinary head: updates with larger scores would raise the rounding error."""
    return q.shape[-1] ** -0.5


def exact_association(q, k, v, mask, steps):
    def xi(q):
        scores = scale_of(q) * q @ k.mT
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)

    for _ in range(steps):
        q = xi(q) @ k
    return xi(q) @ v


def tensors(shape, dtype=torch.float32):
    B, H, L, S, D, D_v = shape
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(*some, generator=generator).to(dtype)
        for some in ((B, H, L, D), (B, H, S, D), (B, H, S, D_v), (B, H, L, D_v))
    ]


def masks(shape):
    """None, of both kinds, spread over heads or states; the first state sees nothing."""
    B, H, L, S = shape[:4]
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(B, 1, L, S, generator=generator) > 0.3
    seen[:, :, 0] = False
    added = torch.randn(H, L, S, generator=generator)
    added[:, 0] = -torch.inf
    return [None, seen, seen[:, :, -1:], added]


def run(q, k, v, g, mask, steps):
    """The output and the three gradients."""
    out, states, lse = association.forward(q, k, v, mask, scale_of(q), steps, True)
    return out, *association.backward(q, k, v, mask, scale_of(q), steps, states, lse, g)


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, steps, instructions, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", instructions)
    *some, g = tensors(shape)
    q = some[0]
    for mask in masks(shape):
        wide = [x.double().requires_grad_() for x in some]
        of_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = exact_association(*wide, of_mask, steps)
        theirs = (exact, *torch.autograd.grad(exact, wide, g.double()))
        kinds = ("forward", "gradient", "gradient", "gradient")
        for a, b, kind in zip(run(*some, g, mask, steps), theirs, kinds, strict=True):
            assert_close(a, b.detach(), kind)
        alone, *kept = association.forward(*some, mask, scale_of(q), steps)
        assert torch.equal(alone, run(*some, g, mask, steps)[0])
        assert [x.numel() for x in kept] == [0, 0]


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_a_row_is_its_own_affair(instructions, monkeypatch):
    """Neither other states, nor strides, nor threads change its bits; NaN stays in it."""
    monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", instructions)
    shape = (2, 3, 60, 70, 20, 33)
    q, k, v, g = tensors(shape)
    whole = run(q, k, v, g, None, 3)
    for rows in (slice(59, 60), slice(7, 38)):
        part = association.forward(q[:, :, rows], k, v, None, scale_of(q), 3)[0]
        assert torch.equal(part, whole[0][:, :, rows])
    strided = run(q.mT.contiguous().mT, k.flip(2).flip(2), v.expand(2, 3, 70, 33), g, None, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_two = run(q, k, v, g, None, 3)
    finally:
        torch.set_num_threads(before)
    for other in (strided, in_two):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    q[1, 2, 30, 4] = torch.nan
    found = association.forward(q, k, v, None, scale_of(q), 3)[0]
    assert found[1, 2, 30].isnan().all() and found.isnan().sum() == 33
    assert run(q, k, v, g, None, 3)[1].isnan().sum() == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_wide(dtype):
    *some, g = tensors((1, 2, 9, 30, 8, 8), dtype)
    found = run(*some, g, None, 2)
    exact = run(*(x.float() for x in (*some, g)), None, 2)
    assert all(a.dtype == dtype for a in found)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, exact, strict=True))


def test_extremes_and_nothing():
    q, k, v, _ = tensors((1, 1, 3, 5, 4, 4))
    found = association.forward(1e20 * q, 1e-3 * k, v, None, 1.0, 2)[0]
    assert found.isfinite().all()
    found = association.forward(q.fill_(3e38), k.abs(), v, None, 1.0, 1)[0]
    assert found.isnan().all()  # a score of inf
    for some in ((0, 1, 3, 5, 4, 4), (1, 1, 0, 5, 4, 4), (1, 1, 3, 0, 4, 4)):
        q, k, v, g = tensors(some)
        out, *gradients = run(q, k, v, g, None, 2)
        assert out.shape == g.shape and bool((out == 0).all())
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_what_cannot_run():
    x = torch.ones(1, 1, 2, 3)
    assert association.why_not(x, x) is None
    assert "takes fp32, fp16 and bf16" in association.why_not(x.double())
    assert "CPU tensors" in association.why_not(x.to("meta"))
