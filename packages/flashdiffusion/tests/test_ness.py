import numpy as np
import pytest
import torch

from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    _reference,
    probability_current,
    stationary_distribution,
)

from .cases import ITERATED, ORACLE, SOLVED, SPANS, TOL, power_score


def cloud(n=150, d=2, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def dense(Q, K, beta, alpha, h=None, score_mod=None):
    h = None if h is None else torch.from_numpy(h)
    Q, K = torch.from_numpy(Q), torch.from_numpy(K)
    P = _reference.operator(Q, K, beta, alpha, h, score_mod=score_mod, normalize="row").numpy()
    values, vectors = np.linalg.eig(P.T)
    pi = np.abs(vectors[:, values.real.argmax()].real)
    return P, pi / pi.sum()


@pytest.mark.parametrize("N", [1, 3, 40, 150])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_directed_chain(N, alpha):
    Q, K = cloud(N), cloud(N, seed=1)
    P, pi = dense(Q, K, 1.5, alpha)
    found = stationary_distribution(Q, K, 1.5, alpha, tile=64)
    np.testing.assert_allclose(found, pi, atol=ITERATED)
    J = pi[:, None] * P
    J = J - J.T
    np.testing.assert_allclose(probability_current(Q, K, None, 1.5, alpha), J @ Q, atol=ITERATED)
    v = np.arange(N) + 1e3
    np.testing.assert_allclose(probability_current(Q, K, v, 1.5, alpha), J @ v, atol=SPANS)
    if N > 3:
        assert np.abs(J).max() > 1e-5


@pytest.mark.parametrize("score", ["dot", power_score])
def test_scores_and_doob(score):
    X = cloud(100) * 0.5
    h = np.random.default_rng(3).random(100) + 0.1
    K = X @ np.array([[1.0, 0.8], [-0.8, 1.0]])
    P, pi = dense(X, K, 1.0, 0.5, h, score)
    found = stationary_distribution(X, K, 1.0, 0.5, h, score_mod=score)
    np.testing.assert_allclose(found, pi, atol=ITERATED)
    step = FlashDiffusion(X, K, np.eye(100), 1.0, 0.5, h, score_mod=score, normalize="row")
    np.testing.assert_allclose(found @ step, found, atol=ITERATED)


def test_one_set_is_in_equilibrium():
    X = cloud()
    dm = DiffusionMap(beta=1.0, n_components=2).fit(X)
    np.testing.assert_allclose(stationary_distribution(X), dm.stationary_, rtol=ORACLE)
    h = np.exp(X[:, 0])
    for kwargs in ({}, {"alpha": 0.0}, {"alpha": 1.0, "h": h}):
        assert np.abs(probability_current(X, **kwargs)).max() < SOLVED
    # a rotation drives it
    turned = X @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    assert np.abs(probability_current(X, turned)).max() > 1e-4


def test_float32_and_torch():
    Q, K = cloud().astype(np.float32), cloud(seed=1).astype(np.float32)
    _, pi = dense(Q.astype(np.float64), K.astype(np.float64), 1.0, 0.5)
    found = stationary_distribution(torch.from_numpy(Q), torch.from_numpy(K), tol=1e-5)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    np.testing.assert_allclose(found, pi, atol=TOL)


def test_errors():
    X = cloud(20)
    with pytest.raises(ValueError, match="`K` must have as many rows"):
        stationary_distribution(X, X[:5])
    with pytest.raises(ValueError, match="`Q` must have at least 1 row"):
        stationary_distribution(X[:0])
    with pytest.raises(ValueError, match="`V` must have shape"):
        probability_current(X, X, np.ones(19))
    with pytest.raises(ValueError, match="`tol`"):
        stationary_distribution(X, tol=0.0)
    with pytest.raises(ValueError, match="`score_mod`"):
        probability_current(X, score_mod="l7")
