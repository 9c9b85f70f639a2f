"""Laws of the specification itself."""

import pytest
import torch

from difflayers import _reference
from shared_kernels.testing import assert_close, parametrize
from shared_kernels.testing.tolerances import tolerance

from .cases import GRAPHS, MODES, randn

FLOAT64 = tolerance(torch.float64)


@parametrize(GRAPHS)
@pytest.mark.parametrize("normalized", [True, False])
def test_laplacian_laws(case, normalized):
    A = _reference.adjacency(randn(case.N, case.d, dtype=torch.float64), case.k)
    assert torch.equal(A, A.T) and bool((A.diagonal() == 0).all()) and bool((A >= 0).all())
    L = _reference.laplacian(A, normalized)
    values = torch.linalg.eigvalsh(L)
    top = 2.0 if normalized else 2 * A.sum(-1).max()
    assert values.min() > -FLOAT64 and values.max() <= top + FLOAT64
    null = A.sum(-1).sqrt() if normalized else torch.ones(case.N, dtype=torch.float64)
    assert_close(L @ null, torch.zeros_like(null))


@pytest.mark.parametrize("mode", MODES)
def test_diffusion_keeps_the_mean_and_lowers_the_dirichlet_energy(mode):
    X = randn(15, 4, dtype=torch.float64)
    L = _reference.laplacian(_reference.adjacency(X, 3), False)
    out = _reference.diffuse(X, L, mode, 0.1, 4)
    assert_close(out.mean(0), X.mean(0))
    assert torch.trace(out.T @ L @ out) < torch.trace(X.T @ L @ X)


def test_restart_keeps_its_share_however_many_the_steps():
    X = randn(15, 4, dtype=torch.float64)
    L = _reference.laplacian(_reference.adjacency(X, 3), True)
    eye = torch.eye(15, dtype=torch.float64)
    exact = 0.1 * torch.linalg.inv(eye - 0.9 * (eye - 0.5 * L)) @ X
    assert_close(_reference.diffuse(X, L, "ppr", 0.5, 2000), exact)


def test_logit_diffusion_keeps_a_distribution():
    X = randn(9, 4, dtype=torch.float64)
    L = _reference.laplacian(_reference.adjacency(X, 3), True)
    w = torch.softmax(randn(5, 9, seed=1, dtype=torch.float64) * 3, -1)
    out = _reference.logit_diffusion(w, L, 0.5)
    assert bool((out >= 0).all())
    assert_close(out.sum(-1), torch.ones(5))


def test_association_without_partners_is_zero():
    q, k = randn(3, 4), randn(5, 4, seed=1)
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1] = False
    out = _reference.associate(q, k, k, mask=seen)
    assert bool((out[1] == 0).all()) and bool((out[0] != 0).any())
