"""Gradients by finite differences, and one at a time."""

from __future__ import annotations

import pytest
import torch

from adasplash import adasplash, triton_entmax
from shared_kernels.testing import assert_close, others_thorough, parametrize

from .cases import BY_NAME, PER_HEAD, inputs

SMALL = [
    BY_NAME[name].replaced(name, N_q=5, N_k=7, B=1, D=3, D_v=3)
    for name in ("causal", "grouped", "bias", "mask", "window-causal", "alibi-causal")
]


@parametrize(SMALL)
@pytest.mark.parametrize("alpha", others_thorough([PER_HEAD, 1.5]))
def test_gradcheck(case, alpha):
    tensors, options = inputs(case, alpha)
    names = list(tensors)

    def f(*leaves):
        return adasplash(**dict(zip(names, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("alpha", [1.02, 1.2, 1.5, 1.9])
def test_rows_and_alpha(alpha):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    a = torch.full((4, 1), alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(triton_entmax, (x, a))


def test_each_gradient_alone():
    tensors, options = inputs(BY_NAME["bias"], PER_HEAD)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    every = torch.autograd.grad(
        adasplash(**leaves, **options).square().sum(), list(leaves.values())
    )
    for name, exact in zip(tensors, every, strict=True):
        alone = {n: x.clone().requires_grad_(n == name) for n, x in tensors.items()}
        (grad,) = torch.autograd.grad(adasplash(**alone, **options).square().sum(), alone[name])
        assert_close(grad, exact, "gradient", scale=0.01)


def test_alpha_gradient_has_the_shape_and_dtype_of_alpha():
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    for shape in ((), (1,), (3,), (1, 3, 1, 1)):
        alpha = torch.full(shape, 1.4, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(adasplash(q, k, v, alpha).square().sum(), alpha)
        assert grad.shape == alpha.shape and grad.dtype == torch.float64 and grad.abs().max() > 0


def test_a_bias_row_shared_by_all_queries_gets_the_sum():
    tensors, options = inputs(BY_NAME["bias"])
    bias = tensors.pop("bias")[:, :1, :1].clone().requires_grad_()
    (shared,) = torch.autograd.grad(adasplash(**tensors, bias=bias, **options).square().sum(), bias)
    full = bias.detach().expand(2, 2, 37, 37).clone().requires_grad_()
    (each,) = torch.autograd.grad(adasplash(**tensors, bias=full, **options).square().sum(), full)
    assert_close(shared, each.sum((1, 2), keepdim=True), "gradient")
