"""Spectra that are known exactly."""

import numpy as np
import pytest
from scipy.special import ive
from scipy.stats import spearmanr

from flashdiffusion import DiffusionMap

from .cases import ORACLE, ROWS, SPANS, SPHERE, TOL, circle, sphere, swiss_roll, torus

RATES = 0.02  # rates of 4000 points at beta = 60 against those of the Laplacian
MISFIT = 0.01  # part of an eigenfunction outside its eigenspace


def circle_values(beta, n):
    """lambda_k = I_k(2 beta) / I_0(2 beta), each twice, from k = 1."""
    k = np.repeat(np.arange(1, n), 2)
    return ive(k, 2 * beta) / ive(0, 2 * beta)


@pytest.mark.parametrize("solver", ["krylov", "dense", "lobpcg"])
def test_circle(solver):
    X = circle(800)
    dm = DiffusionMap(beta=100.0, n_components=8, solver=solver).fit(X)
    np.testing.assert_allclose(dm.eigenvalues_, circle_values(100.0, 9)[:8], rtol=0, atol=ORACLE)
    assert dm.residuals_.max() <= TOL and dm.converged_
    # the pair of frequency k spans cos(k phi), sin(k phi)
    angle = np.arange(800) * 2 * np.pi / 800
    for k in (1, 4):
        exact = np.stack((np.cos(k * angle), np.sin(k * angle)), 1) * 2**0.5
        psi = dm.eigenvectors_[:, 2 * k - 2 : 2 * k]
        # LOBPCG stops at the residual asked for, the others below it
        bound = ROWS if solver == "lobpcg" else SPANS
        assert np.abs(psi - exact @ (exact.T @ psi) / 800).max() < bound


def test_circle_in_float32():
    dm = DiffusionMap(beta=100.0, n_components=6).fit(circle(800).astype(np.float32))
    np.testing.assert_allclose(dm.eigenvalues_, circle_values(100.0, 9)[:6], rtol=0, atol=3 * TOL)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_translation_of_the_circle(dtype):
    X = circle(600).astype(dtype)
    here = DiffusionMap(beta=50.0, n_components=5).fit(X)
    there = DiffusionMap(beta=50.0, n_components=5).fit(X.astype(np.float64) + 1e4)
    atol = TOL if dtype == np.float64 else SPANS
    np.testing.assert_allclose(there.eigenvalues_, here.eigenvalues_, rtol=0, atol=atol)


def test_sphere_has_multiplets():
    beta = 8.0
    dm = DiffusionMap(beta=beta, alpha=1.0, n_components=15).fit(sphere(3000))
    exact = np.concatenate(
        [np.full(2 * n + 1, ive(n + 0.5, 2 * beta) / ive(0.5, 2 * beta)) for n in (1, 2, 3)]
    )
    np.testing.assert_allclose(dm.eigenvalues_, exact, rtol=0, atol=SPHERE)


def test_sphere_tends_to_the_laplacian():
    dm = DiffusionMap(beta=60.0, alpha=1.0, n_components=8).fit(sphere(4000))
    rates = -4 * 60.0 * np.log(dm.eigenvalues_)
    np.testing.assert_allclose(rates, [2, 2, 2, 6, 6, 6, 6, 6], rtol=RATES)


def test_flat_torus_has_products():
    beta = 6.0
    dm = DiffusionMap(beta=beta, n_components=8).fit(torus(40))
    one = ive(1, 2 * beta) / ive(0, 2 * beta)
    np.testing.assert_allclose(dm.eigenvalues_, [one] * 4 + [one**2] * 4, rtol=0, atol=TOL)


def test_swiss_roll_unrolls():
    X, t = swiss_roll(2000)
    dm = DiffusionMap(beta=0.25, alpha=1.0, n_components=3).fit(X)
    assert abs(spearmanr(dm.transform()[:, 0], t).statistic) >= 0.98


def test_alpha_one_removes_the_density():
    # a circle sampled four times as densely on one side
    u = (np.arange(3000) + 0.5) / 3000
    grid = np.linspace(0, 2 * np.pi, 200_001)
    mass = grid + 0.6 * np.sin(grid)
    angle = np.interp(u * 2 * np.pi, mass, grid)
    X = np.stack((np.cos(angle), np.sin(angle)), 1)
    exact = np.stack((np.cos(angle), np.sin(angle)), 1)

    def misfit(alpha):
        psi = DiffusionMap(beta=200.0, alpha=alpha, n_components=2).fit(X).eigenvectors_
        fit = exact @ np.linalg.lstsq(exact, psi, rcond=None)[0]
        return np.linalg.norm(psi - fit) / np.linalg.norm(psi)

    assert misfit(1.0) < MISFIT
    assert misfit(0.0) > 0.1


def test_digits_keep_their_classes_together():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    X, y = load_digits(return_X_y=True)
    dm = DiffusionMap(beta="median", n_components=10).fit(X)
    assert dm.residuals_.max() <= TOL
    dm = DiffusionMap(beta="self-tuning", n_components=10)
    accuracy = cross_val_score(KNeighborsClassifier(5), dm.fit(X).transform(t=0), y).mean()
    assert accuracy > 0.85
