import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning

from flashdiffusion import bridge as bridge_module
from flashdiffusion import schroedinger_bridge
from shared_kernels.testing import measure_memory

from .cases import ITERATED, ORACLE, ROUNDING, ROWS, SOLVED, TOL


def cloud(n, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, 2)) + shift


def weights(n, seed=0):
    w = np.random.default_rng(seed).random(n) + 0.2
    return w / w.sum()


def dense(log_k, mu, nu, iterations=5000):
    """Log-domain Sinkhorn on the whole matrix."""
    g = np.zeros(len(nu))
    for _ in range(iterations):
        f = np.log(mu) - logsumexp(log_k + g, axis=1)
        g = np.log(nu) - logsumexp(log_k + f[:, None], axis=0)
    return np.exp(f[:, None] + g + log_k)


def sq(X, Y):
    return ((X[:, None] - Y[None]) ** 2).sum(-1)


@pytest.mark.parametrize("beta", [0.3, 3.0])
def test_plan_is_the_dense_one(beta):
    X, Y = cloud(50), cloud(70, 1, 0.5)
    mu, nu = weights(50), weights(70, 1)
    bridge = schroedinger_bridge(X, Y, mu, nu, beta, tol=1e-9, tile=32)
    exact = dense(-beta * sq(X, Y), mu, nu)
    np.testing.assert_allclose(bridge.apply(np.eye(70)), exact, atol=SOLVED)
    np.testing.assert_allclose(bridge.apply_transpose(np.eye(50)), exact.T, atol=SOLVED)
    f, g = bridge.potentials
    np.testing.assert_allclose(np.exp(f[:, None] + g - beta * sq(X, Y)), exact, atol=SOLVED)
    np.testing.assert_allclose(bridge.apply(np.ones(70)), mu, atol=ROUNDING)
    np.testing.assert_allclose(bridge.apply_transpose(np.ones(50)), nu, atol=SOLVED)
    assert bridge.marginal_error <= SOLVED and bridge.steps == []


def test_a_small_epsilon_does_not_overflow():
    X, Y = cloud(40), cloud(40, 1, 100.0)
    beta = 1e3 / np.median(sq(X, Y))
    bridge = schroedinger_bridge(X, Y, beta=beta, tol=1e-6)
    assert bridge.marginal_error <= TOL
    exact = dense(-beta * sq(X, Y), np.full(40, 1 / 40), np.full(40, 1 / 40))
    np.testing.assert_allclose(bridge.apply(np.eye(40)), exact, atol=TOL)
    assert np.isfinite(np.concatenate(bridge.potentials)).all()


def test_on_a_line_the_plan_is_monotone():
    # at a large beta the bridge is the sorted matching
    x, y = np.sort(cloud(30)[:, :1], 0), np.sort(cloud(30, 1)[:, :1], 0) + 3.0
    bridge = schroedinger_bridge(x, y, beta=100.0, tol=1e-4, max_iter=3000)
    mean = bridge.apply(y)[:, 0] * 30
    assert np.abs(mean - y[:, 0]).max() < 0.25
    assert (np.diff(mean) > 0).all()


def test_steps():
    Z = cloud(60)
    mu, nu = weights(60, 2), weights(60, 3)
    bridge = schroedinger_bridge(Z, Z, mu, nu, beta=4.0, steps=3, tol=1e-9)
    K = np.exp(-4.0 * sq(Z, Z))
    exact = dense(np.log(K @ K @ K), mu, nu)
    np.testing.assert_allclose(bridge.apply(np.eye(60)), exact, atol=SOLVED)
    np.testing.assert_allclose(bridge.apply_transpose(np.eye(60)), exact.T, atol=SOLVED)
    assert len(bridge.steps) == 4
    f, g = bridge.potentials
    for s, step in enumerate(bridge.steps):
        power = np.linalg.matrix_power
        marginal = (power(K, s) @ np.exp(f)) * (power(K, 3 - s) @ np.exp(g))
        np.testing.assert_allclose(step.marginal, marginal, rtol=SOLVED)
        np.testing.assert_allclose(np.exp(step.forward + step.backward), marginal, rtol=SOLVED)
        assert step.marginal.sum() == pytest.approx(1.0, abs=ITERATED)
    np.testing.assert_allclose(bridge.steps[0].marginal, mu, atol=SOLVED)
    np.testing.assert_allclose(bridge.steps[3].marginal, nu, atol=ITERATED)


def test_float32_torch():
    X, Y = (torch.from_numpy(c).float() for c in (cloud(50), cloud(60, 1)))
    bridge = schroedinger_bridge(X, Y, beta=1.0, tol=1e-5)
    assert all(p.dtype == torch.float32 for p in bridge.potentials)
    out = bridge.apply(torch.ones(60))
    assert isinstance(out, torch.Tensor) and (out * 50 - 1).abs().max() < ROWS


def test_nothing_of_size_n_squared():
    X, Y = cloud(4000), cloud(4000, 1)
    memory = measure_memory(lambda: schroedinger_bridge(X, Y, beta=0.05, tol=1e-1, max_iter=2))
    assert memory.peak < 4000**2 * 8 / 4


@pytest.mark.thorough
def test_a_thousandth_of_the_median_cost():
    n = 60
    X, Y = cloud(n), cloud(n, 1, 3.0)
    beta = 1e3 / np.median(sq(X, Y))
    bridge = schroedinger_bridge(X, Y, beta=beta, tol=1e-6, max_iter=5000)
    assert bridge.marginal_error <= TOL
    rows, columns = bridge.apply(np.ones(n)), bridge.apply_transpose(np.ones(n))
    assert max(np.abs(rows - 1 / n).sum(), np.abs(columns - 1 / n).sum()) <= 1.001 * TOL


def test_over_relaxation_saves_iterations(monkeypatch):
    X, Y = cloud(60), cloud(60, 1, 3.0)
    beta = 1e2 / np.median(sq(X, Y))
    fast = schroedinger_bridge(X, Y, beta=beta, tol=1e-7)
    monkeypatch.setattr(bridge_module, "_RELAX_EVERY", 10**9)
    plain = schroedinger_bridge(X, Y, beta=beta, tol=1e-7, max_iter=5000)
    assert fast.n_iter < plain.n_iter / 2
    assert max(fast.marginal_error, plain.marginal_error) <= ORACLE
    np.testing.assert_allclose(fast.apply(np.eye(60)), plain.apply(np.eye(60)), atol=ORACLE)


@pytest.mark.slow
def test_twenty_thousand_points_in_200_megabytes():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((2, 20_000, 3)).astype(np.float32)
    found = []
    memory = measure_memory(lambda: found.append(schroedinger_bridge(X, Y + 1.0, beta=0.5)))
    assert memory.peak < 200e6 and found[0].marginal_error <= TOL
    columns = found[0].apply_transpose(np.ones(20_000, dtype=np.float32)).astype(float)
    assert np.abs(columns - 1 / 20_000).sum() <= 2 * TOL


def test_giving_up_is_said():
    with pytest.warns(ConvergenceWarning, match="marginals are off by"):
        schroedinger_bridge(cloud(30), cloud(30, 1), beta=50.0, max_iter=2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mu": np.ones(20)}, "`mu` must sum to 1, got 20"),
        ({"nu": np.eye(25)[0]}, "`nu` must be positive"),
        ({"nu": np.ones(24)}, "`nu` must have shape"),
        ({"mu": np.full(20, np.nan)}, "`mu` must be positive"),
        ({"mu": -np.full(20, 0.05)}, "`mu` must be positive"),
        ({"steps": 2}, "`steps` must be 1 where X differs"),
        ({"steps": 0}, "`steps`"),
        ({"beta": -1.0}, "`beta`"),
        ({"Y": np.zeros((0, 2))}, "at least 1 row"),
        ({"Y": np.zeros((5, 3))}, "`Y` must have shape"),
        ({"X": np.full((20, 2), np.inf)}, "`X` must be finite"),
    ],
)
def test_errors(kwargs, words):
    arguments = {"X": cloud(20), "Y": cloud(25, 1), **kwargs}
    with pytest.raises(ValueError, match=words):
        schroedinger_bridge(**arguments)
    bridge = schroedinger_bridge(cloud(20), cloud(25, 1))
    with pytest.raises(ValueError, match="`V` must have shape"):
        bridge.apply(np.ones(20))
