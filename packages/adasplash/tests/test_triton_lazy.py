"""The kernels of lazy attention, in Triton's interpreter or on a GPU, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch

from adasplash import LazyAttention, lazy_attention_triton
from shared_kernels import dispatch
from shared_kernels.testing import (
    assert_close,
    compare,
    others_thorough,
    parametrize,
)

from .kernels import WHERE, nothing_unwritten, pytestmark  # noqa: F401
from .lazy_cases import BY_NAME, HIDING, LAZY, assert_hidden, hiding_inputs, inputs


def moved(case, tau, seed=0):
    tensors, options = inputs(case, tau, seed)
    options = {k: x.to(WHERE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    return {k: x.to(WHERE) for k, x in tensors.items()}, options


def check(case, tau, dtype=torch.float32, seed=0):
    tensors, options = moved(case, tau, seed)

    def kernels(**x):
        out = lazy_attention_triton(**x, **options, backend="triton")
        assert dispatch.last("adasplash::lazy") == "triton"
        return out

    compare(
        kernels,
        lambda **x: lazy_attention_triton(**x, **options, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=dtype,
    )
    assert dispatch.last("adasplash::lazy_backward") == "triton"


@parametrize(LAZY)
@pytest.mark.parametrize("tau", others_thorough([-1.0, 0.5]))
def test_every_case(case, tau):
    check(case, tau)


@pytest.mark.parametrize("tau", [-0.3, 0.0])
def test_every_sign_of_tau(tau):
    check(BY_NAME["grouped"], tau)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    check(BY_NAME["grouped"], 0.5, dtype)


@pytest.mark.parametrize("tau", [-1.0, 0.5])
@pytest.mark.parametrize("hiding", HIDING)
def test_a_bias_of_minus_infinity_hides(hiding, tau):
    tensors, options = hiding_inputs(hiding, tau)
    tensors = {name: x.to(WHERE) for name, x in tensors.items()}

    def run(backend, **x):
        return lazy_attention_triton(**x, **options, backend=backend)

    ours, reference = (functools.partial(run, name) for name in ("triton", "reference"))
    compare(ours, reference, tensors, differentiable=list(tensors))
    assert_hidden(hiding, {name: x.float() for name, x in tensors.items()}, ours)


LONG = BY_NAME["grouped"].replaced("long", B=1, H=2, H_kv=1, N=150)


@pytest.mark.parametrize("window_size", others_thorough([63, 70, 400, 0, 64, 149], plain=3))
def test_several_tiles_and_any_window(window_size):
    check(LONG.replaced("long", window_size=window_size), -1.0)


def test_several_tiles_with_lengths_and_a_mask():
    check(LONG.replaced("long-varlen", B=2, varlen=(130, 65), mask=True), 0.5)


def test_no_future_leaks_above_zero():
    tensors, options = moved(BY_NAME["plain"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    before = lazy_attention_triton(**tensors, **options, backend="triton")
    tensors["k"][:, :, 20:] += 3
    tensors["v"][:, :, 20:] -= 5
    after = lazy_attention_triton(**tensors, **options, backend="triton")
    assert torch.equal(after[:, :, :20], before[:, :, :20])


def test_padding_is_zero_and_does_not_matter():
    tensors, options = moved(BY_NAME["varlen"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    clean = lazy_attention_triton(**tensors, **options, backend="triton")
    junk = torch.ones_like(clean)
    for b, n in enumerate(options["varlen"].tolist()):
        for x in (*(tensors[name] for name in "qkv"), junk):
            x[b, :, n:] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = lazy_attention_triton(**leaves, **options, backend="triton")
    grads = torch.autograd.grad(out, list(leaves.values()), junk)
    assert torch.equal(out, clean)
    for b, n in enumerate(options["varlen"].tolist()):
        assert bool((out[b, :, n:] == 0).all())
        assert all(bool((grad[b, :, n:] == 0).all()) for grad in grads[:3])
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_strided_inputs_and_an_expanded_gradient():
    wide = torch.randn(2, 37, 3, 2, 16, device=WHERE)
    bias, tau = torch.randn(2, 7, device=WHERE), torch.tensor([-0.5, 0.2], device=WHERE)
    ours, exact = (
        wide.clone().requires_grad_(),
        wide.double().requires_grad_(),
    )
    for x, backend in ((ours, "triton"), (exact, "reference")):
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind()
        b, t = (bias, tau) if backend == "triton" else (bias.double(), tau.double())
        lazy_attention_triton(q, k, v, b, t, 6, backend=backend).sum().backward()
    assert_close(ours.grad, exact.grad, "gradient")


def test_two_runs_same_bits():
    runs = []
    for _ in range(2):
        tensors, options = moved(LONG, -1.0)
        leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
        out = lazy_attention_triton(**leaves, **options, backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_token_at_all():
    q = torch.zeros(1, 2, 0, 8, device=WHERE, requires_grad=True)
    bias, tau = torch.zeros(2, 3, device=WHERE), torch.zeros(2, device=WHERE)
    out = lazy_attention_triton(q, q, q, bias, tau, 2, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape


@pytest.mark.parametrize(
    "D, D_v, mask, dtype",
    [
        (136, 136, True, torch.float32),
        (160, 24, False, torch.float32),
        (256, 256, True, torch.float16),
    ],
)
def test_wide_heads(D, D_v, mask, dtype):
    check(LONG.replaced("wide", D=D, D_v=D_v, mask=mask, varlen=(33,), N=37), 0.5, dtype)


@pytest.mark.parametrize("seed", [1, 3])
def test_half_types_keep_what_a_row_shares(seed):
    """From the rounded output delta, and so all of dq and dk, errs twice as much as it need."""
    case = LONG.replaced("half", D=64, D_v=64, mask=True, varlen=(33,), N=37)
    check(case, 0.5, torch.float16, seed)


def test_the_module_runs_the_kernels_where_it_can():
    if not torch.cuda.is_available():
        pytest.skip("on CPU tensors backend='auto' means the CPU path")
    block = LazyAttention(32, 2, window_size=8).to(WHERE)
    block(torch.randn(1, 20, 32, device=WHERE)).sum().backward()
    assert dispatch.last("adasplash::lazy_backward") == "triton"
