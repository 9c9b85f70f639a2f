import numpy as np
import pytest
import torch

from flashdiffusion import DiffusionMap, _reference, carre_du_champ, metric_tensor

from .cases import CANCELLED, SOLVED, circle, sphere

TANGENT = 0.05  # the metric of a sphere at this beta against its limit
CURVATURE = 0.01  # the operator at this beta against its limit, relative


@pytest.fixture(scope="module")
def fitted():
    X = np.random.default_rng(0).standard_normal((150, 2))
    dm = DiffusionMap(beta=1.2, alpha=1.0, n_components=3).fit(X)
    P = _reference.operator(*[torch.from_numpy(X)] * 2, 1.2, 1.0, normalize="row")
    return X, dm, P


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_equals_the_sum_of_differences(fitted, shift):
    X, dm, P = fitted
    f, g = X[:, 0], np.sin(X[:, 1])
    exact = _reference.carre_du_champ(P, torch.from_numpy(f), torch.from_numpy(g)).numpy()
    np.testing.assert_allclose(carre_du_champ(dm, f + shift, g), exact, atol=SOLVED)
    np.testing.assert_array_equal(carre_du_champ(dm, f), carre_du_champ(dm, f, f))
    assert (carre_du_champ(dm, f) >= 0).all()


def test_metric_tensor(fitted):
    X, dm, P = fitted
    F = np.column_stack((X, X[:, 0] ** 2))
    G, M = metric_tensor(dm, F)
    assert G.shape == (150, 3, 3) and M.shape == (3, 3)
    for a in range(3):
        for b in range(3):
            exact = _reference.carre_du_champ(
                P, torch.from_numpy(F[:, a].copy()), torch.from_numpy(F[:, b].copy())
            )
            np.testing.assert_allclose(G[:, a, b], exact, atol=CANCELLED)
    np.testing.assert_allclose(M, sum(g @ g.T for g in G), rtol=CANCELLED)
    assert np.linalg.eigvalsh(G).min() > -1e-12


def test_gradient_on_the_circle():
    beta = 400.0
    dm = DiffusionMap(beta=beta, alpha=1.0, n_components=2).fit(circle(2000))
    angle = np.arange(2000) * 2 * np.pi / 2000
    gamma = carre_du_champ(dm, np.sin(2 * angle), np.cos(angle))
    exact = -2 * np.cos(2 * angle) * np.sin(angle) / (4 * beta)
    np.testing.assert_allclose(gamma, exact, atol=CURVATURE * np.abs(exact).max())


def test_coordinates_of_the_sphere_have_rank_two():
    beta = 60.0
    X = sphere(3000)
    dm = DiffusionMap(beta=beta, alpha=1.0, n_components=3).fit(X)
    G, _ = metric_tensor(dm, X)
    size = np.linalg.eigvalsh(G * 4 * beta)
    np.testing.assert_allclose(size[:, 1:], 1.0, atol=TANGENT)
    assert size[:, 0].max() < TANGENT


def test_errors(fitted):
    _, dm, _ = fitted
    with pytest.raises(ValueError, match="`f` must have shape"):
        carre_du_champ(dm, np.ones(149))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        carre_du_champ(dm, np.ones((150, 2)))
    with pytest.raises(ValueError, match="`F` must be finite"):
        metric_tensor(dm, np.full((150, 2), np.nan))
