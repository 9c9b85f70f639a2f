"""Gradients against autograd through the dense float64 reference, finite differences and POT."""

import numpy as np
import pytest
import torch

from flashdiffusion import _reference
from flashdiffusion.gradients import bridge_cost, diffusion_eigenpairs
from shared_kernels.testing import others_thorough, tolerance

from .cases import ORACLE, circle

FLOAT32 = tolerance(torch.float32)
DIFFERENCES = 1e-5  # gradcheck of an iteration: what its differences know of a derivative

GRADIENT = tolerance(torch.float64, "gradient")


def points(N, d=2, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, d, generator=g, dtype=torch.float64) * torch.linspace(1.0, 2.0, d) + shift


@pytest.mark.parametrize("N", [30, 600])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("of", ["values", "vectors", "both"])
def test_against_the_dense_reference(N, alpha, of):
    n = 3
    weights = torch.linspace(1.0, 2.0, n, dtype=torch.float64)
    probe = points(N, n, seed=5)

    def loss(values, psi):
        out = 0.0
        if of != "vectors":
            out = out + (weights * values.square()).sum()
        if of != "values":
            out = out + (probe * psi).sum() + psi.pow(3).mul(probe.roll(1, 0)).sum()
        return out

    X = points(N, shift=30.0).requires_grad_()
    beta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    values, psi = diffusion_eigenpairs(X, beta, alpha, n)
    ours = torch.autograd.grad(loss(values, psi), (X, beta))
    exact_values, exact_psi, _ = _reference.diffusion_map(X, beta, alpha, n)
    signs = (exact_psi * psi).sum(0).sign().detach()
    exact = torch.autograd.grad(loss(exact_values, exact_psi * signs), (X, beta))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT, atol=10 * GRADIENT * float(b.abs().max()))


def test_gradcheck():
    X = points(12).requires_grad_()
    beta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: diffusion_eigenpairs(x, b, 0.5, 2), (X, beta))


def test_float32_points_and_a_number_for_beta():
    X = points(40).float().requires_grad_()
    values, _ = diffusion_eigenpairs(X, 0.4, n_components=2)
    (gradient,) = torch.autograd.grad(values.sum(), X)
    assert gradient.dtype == torch.float32 and values.dtype == torch.float64
    # moving all points together changes nothing
    assert float(gradient.sum(0).abs().max()) < FLOAT32 / 2


@pytest.mark.parametrize("ask", ["vector", "value"])
def test_degenerate_pairs_are_refused_by_name(ask):
    X = torch.from_numpy(circle(40)).requires_grad_()
    values, psi = diffusion_eigenpairs(X, 5.0, n_components=2)
    loss = psi[3, 0] if ask == "vector" else values[0]
    with pytest.raises(ValueError, match="eigenvalue 0 .* equal to eigenvalue 1"):
        torch.autograd.grad(loss, X, retain_graph=True)
    assert bool(torch.isfinite(torch.autograd.grad(values.sum(), X)[0]).all())


def test_a_pair_that_the_last_one_belongs_to():
    X = torch.from_numpy(circle(40)).requires_grad_()
    values, _ = diffusion_eigenpairs(X, 5.0, n_components=1)
    with pytest.raises(ValueError, match="equal to eigenvalue 1"):
        torch.autograd.grad(values[0], X)


@pytest.mark.filterwarnings("ignore:the second eigenvalue")
def test_a_disconnected_graph_has_no_gradient():
    X = torch.cat((points(20), points(20, seed=1) + 1e3)).requires_grad_()
    values, _ = diffusion_eigenpairs(X, 1.0, n_components=2)
    with pytest.raises(ValueError, match="disconnected"):
        torch.autograd.grad(values[0], X)


@pytest.mark.parametrize("of", ["eigenvalues", "bridge"])
def test_second_derivatives_are_refused(of):
    X = points(15).requires_grad_()
    first = diffusion_eigenpairs(X, 1.0, n_components=2)[0].sum()
    first = first if of == "eigenvalues" else bridge_cost(X, points(9))
    (gradient,) = torch.autograd.grad(first, X, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once, not twice"):
        (gradient.sum() + X.sum()).backward()


@pytest.mark.parametrize("beta", others_thorough([0.5, 3.0]))
def test_the_bridges_cost(beta):
    X, Y = points(9).requires_grad_(), points(7, seed=1, shift=0.5).requires_grad_()
    mu = torch.rand(9, dtype=torch.float64) + 0.3
    mu /= mu.sum()
    assert torch.autograd.gradcheck(
        lambda x, y: bridge_cost(x, y, mu, beta=beta, tol=1e-12), (X, Y), atol=DIFFERENCES
    )


@pytest.mark.extras
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_the_bridges_cost_is_pots(epsilon):
    ot = pytest.importorskip("ot", reason="needs the optional POT")
    X, Y = points(30).requires_grad_(), points(25, seed=1, shift=0.5).requires_grad_()
    ours = bridge_cost(X, Y, beta=1.0 / epsilon, tol=1e-11)
    x, y = X.detach().clone().requires_grad_(), Y.detach().clone().requires_grad_()
    cost = (x[:, None] - y[None]).square().sum(-1)
    mu, nu = torch.full((30,), 1 / 30, dtype=X.dtype), torch.full((25,), 1 / 25, dtype=X.dtype)
    plan = ot.sinkhorn(
        mu, nu, cost.detach(), epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12
    )
    theirs = (plan * cost).sum() + epsilon * (plan * plan.log()).sum()
    assert abs(float((ours - theirs).detach())) < ORACLE
    gradients = torch.autograd.grad(ours, (X, Y))
    exact = torch.autograd.grad((plan.detach() * cost).sum(), (x, y))
    for a, b in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=ORACLE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffusion_eigenpairs(np.zeros((5, 2)), 1.0), TypeError, "be a torch tensor"),
        (lambda: diffusion_eigenpairs(points(5), -1.0), ValueError, "`beta` must be positive"),
        (lambda: diffusion_eigenpairs(points(5), torch.ones(2)), ValueError, "have one element"),
        (lambda: diffusion_eigenpairs(points(5), 1.0, n_components=5), ValueError, "at most 4"),
        (
            lambda: bridge_cost(points(5), points(5), torch.ones(5).requires_grad_() / 5),
            ValueError,
            "`mu` must not require grad",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
