"""Passage times, fluxes and tests in time: against dense algebra, and against deeptime."""

import numpy as np
import pytest
from scipy import sparse

from flashdiffusion import DiffusionMap, kinetics, plots

from .cases import ITERATED, ORACLE, ROUNDING, SOLVED

SAMPLED = 0.1  # a timescale of 50 from 200 000 frames


def birth_and_death(n=12, seed=0):
    """(K, P, pi): K_ij = pi_i P_ij of a reversible chain with random rates."""
    rng = np.random.default_rng(seed)
    K = np.diag(rng.random(n) + 0.5)
    step = rng.random(n - 1) * 0.3 + 0.02
    K[range(n - 1), range(1, n)] = K[range(1, n), range(n - 1)] = step
    K /= K.sum()
    return K, K / K.sum(1, keepdims=True), K.sum(1)


def fitted(K):
    return DiffusionMap(affinity="precomputed", alpha=0.0, n_components=3).fit(sparse.csr_matrix(K))


def test_passage_times_of_a_chain():
    K, P, pi = birth_and_death()
    dm = fitted(K)
    np.testing.assert_allclose(dm.stationary_, pi, atol=ROUNDING)
    tau = kinetics.mean_first_passage_time(dm, [10, 11], tol=1e-12)
    exact = np.linalg.solve(np.eye(10) - P[:10, :10], np.ones(10))
    np.testing.assert_allclose(tau[:10], exact, rtol=ITERATED)
    assert (tau[10:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"neighbors": 12}])
def test_passage_times_of_points(options):
    X = np.random.default_rng(0).standard_normal((200, 2))
    dm = DiffusionMap(beta="self-tuning", n_components=4, **options).fit(X)
    B = X[:, 0] > 1.0
    tau = kinetics.mean_first_passage_time(dm, B)
    inside = ~B
    np.testing.assert_allclose((1.0 + dm.markov(tau))[inside], tau[inside], rtol=ORACLE)


@pytest.mark.filterwarnings("ignore:the second eigenvalue")
def test_what_cannot_be_reached_takes_for_ever():
    K = np.kron(np.eye(2), birth_and_death()[0])
    tau = kinetics.mean_first_passage_time(fitted(K), [0])
    assert np.isinf(tau[12:]).all() and np.isfinite(tau[:12]).all()


def test_flux_of_a_chain_against_its_formula():
    K, P, pi = birth_and_death()
    found = kinetics.reactive_flux(fitted(K), [0], [11], tol=1e-13)
    q = found.committor
    f = (pi * (1 - q))[:, None] * P * q[None]
    net = np.maximum(f - f.T, 0.0)
    np.testing.assert_allclose(found.current.toarray(), net, atol=ITERATED)
    np.testing.assert_allclose(found.flux, net[0].sum(), rtol=ITERATED)
    # in one dimension the same current flows through every bond
    np.testing.assert_allclose(net[range(11), range(1, 12)], found.flux, rtol=ITERATED)
    assert abs(found.density.sum() - 1.0) < ROUNDING


@pytest.mark.extras
def test_deeptime_agrees():
    pytest.importorskip("deeptime", reason="needs the optional deeptime")
    from deeptime.markov.msm import MarkovStateModel

    K, P, pi = birth_and_death(20, seed=3)
    dm = fitted(K)
    msm = MarkovStateModel(P)
    theirs = msm.reactive_flux([0, 1], [18, 19])
    ours = kinetics.reactive_flux(dm, [0, 1], [18, 19], tol=1e-13)
    np.testing.assert_allclose(ours.committor, theirs.forward_committor, atol=ITERATED)
    np.testing.assert_allclose(ours.flux, theirs.total_flux, rtol=ORACLE)
    np.testing.assert_allclose(ours.rate, theirs.rate, rtol=ORACLE)
    np.testing.assert_allclose(ours.mean_first_passage_time, theirs.mfpt, rtol=ORACLE)
    np.testing.assert_allclose(ours.current.toarray(), theirs.net_flux, atol=ITERATED)
    tau = kinetics.mean_first_passage_time(dm, [18, 19], tol=1e-12)
    start = pi[:2] / pi[:2].sum()
    np.testing.assert_allclose(start @ tau[:2], msm.mfpt([0, 1], [18, 19]), rtol=ORACLE)


def walk(P, T=20_000, seed=0):
    rng = np.random.default_rng(seed)
    bounds, draws = np.cumsum(P, 1), rng.random(T)
    states = np.zeros(T, dtype=np.int64)
    for i in range(1, T):
        states[i] = min(np.searchsorted(bounds[states[i - 1]], draws[i]), len(P) - 1)
    return states


def test_chapman_kolmogorov():
    P = birth_and_death(3)[1]
    states = walk(P)
    found = kinetics.chapman_kolmogorov(states, 1, 4)
    assert found.predicted.shape == (4, 3, 3) and found.error < 0.05
    np.testing.assert_allclose(found.predicted[2], found.predicted[0] @ found.predicted[1])
    np.testing.assert_allclose(found.estimated.sum(2), 1.0, atol=ROUNDING)
    # what is seen of two states in three is not Markovian
    hidden = kinetics.chapman_kolmogorov((np.arange(20_000) // 50) % 2, 1, 60)
    assert hidden.error > 0.3


@pytest.mark.extras
def test_chapman_kolmogorov_as_deeptime_counts():
    pytest.importorskip("deeptime", reason="needs the optional deeptime")
    from deeptime.markov import TransitionCountEstimator
    from deeptime.markov.msm import MaximumLikelihoodMSM

    states = walk(birth_and_death(3)[1])
    found = kinetics.chapman_kolmogorov(states, 2, 3)
    for k, lag in enumerate(found.lags):
        counts = TransitionCountEstimator(int(lag), "sliding").fit_fetch(states)
        msm = MaximumLikelihoodMSM(reversible=False).fit_fetch(counts)
        np.testing.assert_allclose(found.estimated[k], msm.transition_matrix, atol=SOLVED)


def test_timescales_of_an_ornstein_uhlenbeck_process():
    rng = np.random.default_rng(0)
    x, rho = np.zeros(200_000), 0.98
    for i in range(1, len(x)):
        x[i] = rho * x[i - 1] + rng.standard_normal()
    times = kinetics.implied_timescales(x, [1, 5, 20])
    assert times.shape == (3, 1)
    np.testing.assert_allclose(times[:, 0], -1.0 / np.log(rho), rtol=SAMPLED)
    F, edges = kinetics.free_energy(x, components=(0,), bins=40)
    middle = 0.5 * (edges[0][1:] + edges[0][:-1])
    curve = np.polyfit(middle[abs(middle) < 8], F[abs(middle) < 8], 2)[0]
    assert abs(curve * 2.0 / (1.0 - rho**2) - 1.0) < 0.1  # a parabola of variance 1 / (1 - rho^2)
    assert plots.plot_timescales([1, 5, 20], times).get_yscale() == "log"
    assert plots.plot_free_energy(x, components=(0,)).get_ylabel() == "free energy (kT)"
    plots.plot_free_energy(np.stack((x, x[::-1]), 1), bins=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kinetics.implied_timescales(np.zeros((9, 1)), [0]), "`lags` must be ints"),
        (lambda: kinetics.implied_timescales(np.zeros((9, 1)), [8]), "`lags` must be below"),
        (lambda: kinetics.chapman_kolmogorov([0.5, 1.0], 1), "`states` must be"),
        (lambda: kinetics.chapman_kolmogorov([0, 1, 0, 1], 1, 9), "`lag` must be below"),
        (lambda: kinetics.chapman_kolmogorov([0, 0, 0, 1], 1, 2), "states \\[1\\] that are not"),
        (lambda: kinetics.free_energy(np.zeros((9, 1))), "`components` must be"),
        (lambda: kinetics.free_energy(np.zeros((9, 2)), weights=np.ones(3)), "`weights` must be"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
