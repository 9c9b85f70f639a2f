import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from flashdiffusion import DiffusionMap, FlashDiffusion, _reference, committor, doob_transform

from .cases import CANCELLED, ITERATED, ROUNDING, ROWS, SOLVED, SPANS, circle

SEGMENT = 0.02  # the committor at this beta against its limit, which is linear in the angle


def cloud(n=200, d=2, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("N", [90, 600])
def test_doob_transform_is_the_dense_one(N):
    X = cloud(N)
    h = np.exp(X[:, 0])
    dm = DiffusionMap(beta=1.0, alpha=0.5, n_components=4).fit(X)
    new = doob_transform(dm, h)
    P = _reference.operator(*[torch.from_numpy(X)] * 2, 1.0, 0.5, torch.from_numpy(h))
    values = torch.linalg.eigvals(P).real.sort(descending=True).values[1:5]
    np.testing.assert_allclose(new.eigenvalues_, values, atol=SOLVED)
    residual = P.numpy() @ new.eigenvectors_ - new.eigenvalues_ * new.eigenvectors_
    assert np.abs(residual).max() < ROWS * np.abs(new.eigenvectors_).max()
    np.testing.assert_allclose(new.stationary_ @ P.numpy(), new.stationary_, rtol=ITERATED)
    np.testing.assert_allclose(new.markov(X), P.numpy() @ X, atol=CANCELLED)
    np.testing.assert_allclose(new.transform(X), new.transform(), atol=2 * ROWS)
    np.testing.assert_allclose(FlashDiffusion(X, X, X, 1.0, 0.5, h), new.markov(X), atol=CANCELLED)


def test_doob_transforms_compose_and_forget_scale():
    X = cloud()
    h, g = np.exp(X[:, 0]), 1.0 + X[:, 1] ** 2
    dm = DiffusionMap(beta=1.0, n_components=3).fit(X)
    once = doob_transform(dm, h * g * 1e-20)
    twice = doob_transform(doob_transform(dm, h), g)
    np.testing.assert_allclose(twice.eigenvalues_, once.eigenvalues_, atol=ROUNDING)
    np.testing.assert_allclose(twice.stationary_, once.stationary_, rtol=CANCELLED)
    same = doob_transform(dm, np.full(200, 7.0))
    np.testing.assert_allclose(same.eigenvectors_, dm.eigenvectors_, atol=SOLVED)


def test_alpha_is_a_doob_transform():
    X = cloud()
    plain = DiffusionMap(beta=1.0, alpha=0.0, n_components=3).fit(X)
    for alpha in (0.5, 1.0):
        new = doob_transform(plain, plain.density_**-alpha)
        exact = DiffusionMap(beta=1.0, alpha=alpha, n_components=3).fit(X)
        np.testing.assert_allclose(new.eigenvalues_, exact.eigenvalues_, atol=ROUNDING)
        np.testing.assert_allclose(new.stationary_, exact.stationary_, rtol=CANCELLED)


@pytest.mark.parametrize("N", [80, 700])
def test_committor_solves_its_equation(N):
    X = cloud(N)
    dm = DiffusionMap(beta=3.0, n_components=3).fit(X)
    A, B = X[:, 0] < -1.0, X[:, 0] > 1.2
    q = committor(dm, A, B)
    assert (q[A] == 0).all() and (q[B] == 1).all() and q.min() >= 0 and q.max() <= 1
    rest = ~(A | B)
    assert np.abs((dm.markov(q) - q)[rest]).max() <= 2 * ITERATED
    # against a dense solve
    P = _reference.operator(*[torch.from_numpy(X)] * 2, 3.0, 0.5, normalize="row").numpy()
    exact = np.linalg.solve(np.eye(rest.sum()) - P[np.ix_(rest, rest)], P[np.ix_(rest, B)].sum(1))
    np.testing.assert_allclose(q[rest], exact, atol=SPANS)
    np.testing.assert_allclose(committor(dm, np.nonzero(A)[0], np.nonzero(B)[0]), q, atol=ROUNDING)
    np.testing.assert_allclose(committor(dm, B, A), 1.0 - q, atol=SPANS)


def test_committor_on_an_arc_is_linear():
    # between two ends of a circle the walk is unbiased: q grows with the angle
    dm = DiffusionMap(beta=2000.0, n_components=4).fit(circle(1000))
    angle = np.arange(1000) * 360 / 1000
    q = committor(dm, angle < 10, (angle > 180) & (angle < 190))
    up = (angle > 20) & (angle < 170)
    np.testing.assert_allclose(q[up], (angle[up] - 10) / 170, atol=SEGMENT)


def test_committor_with_no_one_between():
    dm = DiffusionMap(beta=1.0, n_components=2).fit(cloud(20))
    A = np.arange(20) < 8
    np.testing.assert_array_equal(committor(dm, A, ~A), ~A)


def test_committor_of_two_wells_counts_few_passes(monkeypatch):
    # nearly disconnected: the slow eigenvector makes up for the condition number
    rng = np.random.default_rng(0)
    X = np.concatenate((rng.normal(-1.5, 0.5, (350, 2)), rng.normal(1.5, 0.5, (350, 2))))
    dm = DiffusionMap(beta=2.0, n_components=3).fit(X)
    assert 0.9999 < dm.eigenvalues_[0] < 0.999999
    A, B = X[:, 0] < -2.0, X[:, 0] > 2.0
    q = committor(dm, A, B, max_iter=60)
    assert np.median(q[X[:, 0] < -1]) < 0.1 and np.median(q[X[:, 0] > 1]) > 0.9


@pytest.mark.filterwarnings("ignore:the second eigenvalue", "ignore:most row sums")
def test_giving_up_is_said():
    X = cloud(700)
    dm = DiffusionMap(beta=30.0, n_components=2).fit(X)
    with pytest.warns(ConvergenceWarning, match=r"max \|P q - q\| is"):
        committor(dm, [0], [1], tol=1e-12, max_iter=2)


@pytest.mark.parametrize(
    ("A", "B", "words"),
    [
        ([], [1], "`A` must not be empty"),
        ([0], np.zeros(30, dtype=bool), "`B` must not be empty"),
        ([0, 1], [1, 2], "`A` must be disjoint"),
        ([0], [30], r"`B` must hold indices in \[0, 30\)"),
        ([0], np.ones(29, dtype=bool), "`B` must have shape"),
        ([0.5], [1], "`A` must be a boolean mask"),
    ],
)
def test_bad_sets(A, B, words):
    dm = DiffusionMap(beta=1.0, n_components=2).fit(cloud(30))
    with pytest.raises(ValueError, match=words):
        committor(dm, np.array(A), np.array(B))


def test_bad_h():
    dm = DiffusionMap(beta=1.0, n_components=2).fit(cloud(30))
    for h, words in (
        (np.zeros(30), "positive"),
        (np.ones(29), "shape"),
        (np.geomspace(1, 1e40, 30), "1e30"),
    ):
        with pytest.raises(ValueError, match=words):
            doob_transform(dm, h)
