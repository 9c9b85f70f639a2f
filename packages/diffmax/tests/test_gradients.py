"""First and second derivatives in X and alpha."""

from functools import partial

import pytest
import torch

from diffmax import diffmax_bisect
from shared_kernels.testing.tolerances import tolerance

from .cases import on_each_backend

FLOAT32 = tolerance(torch.float32)
SECOND = tolerance(torch.float32, "gradient") / 2  # second derivatives

ALPHA = torch.tensor([[0.1], [0.5], [0.9], [0.995]], dtype=torch.float64)


def problem():
    X = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    return X, ALPHA.clone().requires_grad_()


@on_each_backend
def test_gradcheck(backend):
    f, (X, alpha) = partial(diffmax_bisect, backend=backend), problem()
    assert torch.autograd.gradcheck(f, (X, alpha))
    assert torch.autograd.gradcheck(lambda X, a: f(X, a, dim=0), (X, alpha[0, 0]))


@on_each_backend
def test_gradgradcheck_jointly(backend):
    f, (X, alpha) = partial(diffmax_bisect, backend=backend), problem()
    assert torch.autograd.gradgradcheck(f, (X, alpha))
    fixed = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda X: f(X, fixed, 0), (X,))


@on_each_backend
def test_gradient_penalty_in_single_precision(backend):
    """A second derivative through dead, masked and zero entries is finite and right."""
    X = torch.randn(4, 30)
    X[0], X[1, 3:] = -torch.inf, -torch.inf
    results = []
    for dtype in (torch.float32, torch.float64):
        x = X.to(dtype).requires_grad_()
        Y = diffmax_bisect(x, ALPHA.to(dtype), backend=backend)
        (dX,) = torch.autograd.grad(Y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dX.square().sum(), x)
        assert bool(second.isfinite().all()) and bool((second[0] == 0).all())
        results.append(second)
    torch.testing.assert_close(results[0].double(), results[1], atol=SECOND, rtol=SECOND)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (2, 1, 1), (2, 5, 1)])
def test_alpha_gradient_has_alpha_s_shape_and_dtype(shape, dtype, backend):
    X = torch.randn(2, 5, 8)
    alpha = torch.full(shape, 0.75, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 5, 8)
    (diffmax_bisect(X, alpha, backend=backend) * weight).sum().backward()
    assert alpha.grad.shape == shape and alpha.grad.dtype == dtype
    whole = torch.full((2, 5, 1), 0.75, dtype=torch.float64, requires_grad=True)
    (diffmax_bisect(X.double(), whole) * weight).sum().backward()
    exact = whole.grad.sum_to_size(shape) if shape else whole.grad.sum()
    size = max(1.0, exact.abs().max().item())
    assert (alpha.grad.double() - exact).abs().max() < size * max(
        5 * FLOAT32, torch.finfo(dtype).eps
    )


def test_alpha_alone():
    X, alpha = torch.randn(3, 9), torch.tensor(0.6, requires_grad=True)
    diffmax_bisect(X, alpha).square().sum().backward()
    assert X.grad is None and alpha.grad.isfinite() and alpha.grad != 0


def test_tied_entries_share_their_gradient():
    X = torch.tensor([1.0, 1.0, 0.5], requires_grad=True)
    diffmax_bisect(X, 0.5)[:2].sum().backward()
    assert torch.equal(X.grad[0], X.grad[1])
