"""Laws of the specification itself."""

import pytest
import torch

from flashdiffusion import _reference
from shared_kernels.testing import assert_close


def points(n=40, d=3):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("score", [None, "dot", "cosine", "l1"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rows_sum_to_one(score, alpha):
    P = _reference.operator(points(), points(30), 0.7, alpha, score_mod=score)
    assert_close(P.sum(1), torch.ones(40, dtype=torch.float64))
    assert bool((P >= 0).all())


def test_entries_by_hand():
    X = points(6)
    K = torch.exp(-0.9 * torch.cdist(X, X) ** 2)
    r = K.sum(1)
    Ka = K / (r[:, None] ** 0.3 * r[None] ** 0.3)
    d = Ka.sum(1)
    M = Ka / (d[:, None] * d[None]).sqrt()
    assert_close(_reference.operator(X, X, 0.9, 0.3), M)
    assert_close(_reference.operator(X, X, 0.9, 0.3, normalize="row"), Ka / d[:, None])
    assert_close(_reference.operator(X, X, 0.9, normalize="none"), K)
    # M's top pair is (1, sqrt d), P and M have one spectrum
    assert_close(M @ d.sqrt(), d.sqrt())


def test_alpha_is_a_doob_transform():
    Q, K = points(20), points(30)
    column = _reference.operator(Q, K, 0.7, normalize="none").sum(0)
    for alpha in (0.3, 1.0):
        assert_close(
            _reference.operator(Q, K, 0.7, alpha),
            _reference.operator(Q, K, 0.7, 0.0, column**-alpha),
        )


def test_doob_by_hand():
    X = points(20)
    h = torch.rand(20, dtype=torch.float64) + 0.1
    P = _reference.operator(X, X, 0.7, 0.5, normalize="row")
    assert_close(_reference.operator(X, X, 0.7, 0.5, h), P * h[None] / (P @ h)[:, None])
    # the symmetric form has the same spectrum
    M = _reference.operator(X, X, 0.7, 0.5, h, normalize="symmetric")
    spectrum = torch.linalg.eigvals(_reference.operator(X, X, 0.7, 0.5, h)).real.sort().values
    assert_close(torch.linalg.eigvalsh(M), spectrum)


def test_diffusion_distance_is_euclidean():
    X = points(25)
    values, psi, stationary = _reference.diffusion_map(X, 0.4, 0.5, 24)
    P = _reference.operator(X, X, 0.4, 0.5, normalize="row")
    Pt = P @ P
    exact = ((Pt[:, None] - Pt[None]) ** 2 / stationary).sum(-1)
    coordinates = values**2 * psi
    assert_close(torch.cdist(coordinates, coordinates) ** 2, exact)
    assert_close((stationary[:, None] * psi**2).sum(0), torch.ones(24, dtype=torch.float64))


def test_carre_du_champ_of_a_line():
    # Gamma(x, x) is half the mean squared step
    P = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    x = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert_close(_reference.carre_du_champ(P, x, x), torch.tensor([1.0, 0.5]).double())
