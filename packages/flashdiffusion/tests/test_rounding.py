"""Far points, near copies and every unit: entries keep their digits."""

import warnings

import numpy as np
import pytest
import torch

from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    _reference,
    bgh_bandwidth,
    knn_bandwidth,
    median_bandwidth,
)
from flashdiffusion._problem import Problem
from flashdiffusion._tiles import CUT, DIFFERENCES, RECENTRED, Tiles, near_pairs
from shared_kernels import native
from shared_kernels.testing import assert_close, pairwise

from .cases import CANCELLED, FLOAT32, ORACLE, TOL, swiss_roll

RESIDUAL = 1e-3  # what converged_ promises, relative to the eigenvalue
EXTENDED = 0.01  # eigenvectors at their own points as new ones

DTYPES = [np.float32, np.float64]


def normal(N=300, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((N, d))


def copies(size, dtype, N=100, times=6):
    """Groups of points that are `size` apart."""
    rng = np.random.default_rng(1)
    rows = [normal(N) + size * rng.standard_normal((N, 3)) for _ in range(times)]
    return np.concatenate(rows).astype(dtype)


SETS = {
    "one far row": lambda: np.concatenate((normal(), [[1e9, -1e9, 1e9]])),
    "farther": lambda: np.concatenate(([[1e12, 0.0, 0.0]], normal())),
    "two clusters far apart": lambda: np.concatenate((normal(), normal(seed=1) + 3e8)),
    "near copies": lambda: copies(3e-8, np.float64),
    "equal copies": lambda: copies(0.0, np.float64),
}


@pytest.mark.parametrize("tile", [32, 256])
@pytest.mark.parametrize("score", [None, "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("points", SETS)
def test_entries_are_right_and_at_most_one(points, dtype, score, tile):
    X = SETS[points]().astype(dtype)
    for beta in (1.0, 1e4):
        options = {"beta": beta, "normalize": "none", "score_mod": score}
        K = FlashDiffusion(X, X, np.eye(len(X), dtype=dtype), tile=tile, **options)
        assert K.max() <= 1.0 and np.array_equal(np.diag(K), np.ones(len(X)))
        wide = torch.from_numpy(X.astype(np.float64))
        if score is None:
            exact = torch.exp(-beta * (wide[:, None] - wide[None]).square().sum(-1))
        else:
            units = wide / wide.norm(dim=1, keepdim=True)
            exact = torch.exp(-0.5 * beta * (units[:, None] - units[None]).square().sum(-1))
        assert_close(torch.from_numpy(K).to(torch.float32), exact)
        if dtype == np.float64:
            # sqrt and squares of differences of given numbers: no cancellation in the exact one
            assert np.abs(K - exact.numpy()).max() < CANCELLED


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["key", "query", "both"])
@pytest.mark.parametrize("normalize", ["row", "none"])
def test_two_sets_with_a_far_point(dtype, where, normalize):
    Q, K = normal(80, seed=1).astype(dtype), normal(300).astype(dtype)
    if where in ("key", "both"):
        K[5] = 1e9
    if where in ("query", "both"):
        Q[7] = [1.5e9, 1e9, 1e9]
    V = np.arange(300.0)[:, None].astype(dtype)
    out = FlashDiffusion(Q, K, V, normalize=normalize)
    exact = _reference.flash_diffusion(
        *(torch.from_numpy(a.astype(np.float64)) for a in (Q, K, V)), normalize=normalize
    )
    size = float(exact.abs().max())
    assert_close(torch.from_numpy(out).float() / size, exact / size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-12, 0.0])
def test_self_tuning_of_near_copies(size, dtype):
    """Seven others at `size` and less: sigma is as small, the points are not."""
    X = copies(size, dtype, N=70, times=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dm = DiffusionMap("self-tuning", n_components=3).fit(X)
    wide = torch.from_numpy(X.astype(np.float64))
    sigma = torch.from_numpy(dm.sigma_)
    scores = (wide[:, None] - wide[None]).square().sum(-1) / (sigma[:, None] * sigma)
    K = torch.exp(-scores)
    weights = K.sum(1) ** -0.5
    degree = weights * (K @ weights)
    M = (weights / degree.sqrt())[:, None] * K * (weights / degree.sqrt())
    exact = torch.linalg.eigvalsh(M).flip(0)[1:4]
    assert dm.converged_ and dm.eigenvalues_.max() <= 1.0 + TOL
    np.testing.assert_allclose(dm.eigenvalues_, exact, atol=5 * TOL)


def test_the_routes_of_tile_pairs():
    far = torch.from_numpy(SETS["one far row"]())
    assert set(np.unique(Tiles(Problem(far, None, 1.0), 32, None).routes())) >= {
        RECENTRED,
        DIFFERENCES,
    }
    X = torch.from_numpy(swiss_roll(2000)[0])
    for points in (X, X.float()):
        # nothing to do for ordinary points
        assert (Tiles(Problem(points, None, 0.05), 64, None).routes() <= CUT).all()
    assert (Tiles(Problem(X, None, 0.05), 64, None).routes() == 0).all()


@pytest.mark.parametrize("d", [1, 2, 3, 20])
def test_near_pairs_misses_none(d):
    X = np.random.default_rng(d).standard_normal((400, d)) + 1e3
    X[350:] = X[:50] + 1e-3 * np.random.default_rng(9).standard_normal((50, d))
    for radius in (1e-6, 4e-3, 3e-2):
        apart = np.sqrt(np.square(X[:, None] - X).sum(-1))
        wanted = {(i, j) for i, j in np.argwhere(apart <= radius) if i < j}
        pairs = near_pairs(X, radius)
        assert pairs is not None
        assert wanted <= {
            (min(p), max(p)) for p in zip(*map(np.ndarray.tolist, pairs), strict=True)
        }
    assert near_pairs(np.zeros((500, d)), 0.0) is None


SCALES = [1e-22, 1e-20, 1e-9, 1.0, 1e8, 1e19]


@pairwise(dtype=DTYPES, c=SCALES)
def test_every_unit_gives_the_same_answer(c, dtype):
    X = swiss_roll(700)[0].astype(dtype)
    scaled = (X.astype(np.float64) * c).astype(dtype)
    rtol = ORACLE if dtype == np.float64 else 10 * TOL
    for rule in (lambda x: bgh_bandwidth(x).beta, median_bandwidth):
        assert rule(scaled) * c**2 == pytest.approx(rule(X), rel=rtol)
    assert bgh_bandwidth(scaled).dimension == pytest.approx(bgh_bandwidth(X).dimension, rel=rtol)
    sigma = knn_bandwidth(scaled).astype(np.float64)
    np.testing.assert_allclose(sigma / c, knn_bandwidth(X), rtol=rtol)
    for beta in ("bgh", "median", "self-tuning"):
        one, other = (DiffusionMap(beta, n_components=4).fit(x) for x in (X, scaled))
        np.testing.assert_allclose(other.eigenvalues_, one.eigenvalues_, atol=10 * TOL)
        new = other.transform(scaled[:20]).astype(np.float64)
        np.testing.assert_allclose(np.abs(new), np.abs(one.transform(X[:20])), atol=FLOAT32 * 1e2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_of_copies_depends_on_the_fit_alone(dtype):
    X = normal(60).astype(dtype)
    X = np.concatenate((X, np.repeat(X[:1], 9, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dm = DiffusionMap("self-tuning", n_components=2).fit(X)
        whole = dm.transform(X)
        for rows in (slice(0, 1), slice(60, 69), slice(0, 5)):
            np.testing.assert_allclose(dm.transform(X[rows]), whole[rows], rtol=10 * FLOAT32)
        assert dm.sigma_fallback_ == dm.sigma_[0] > 0
        # every point has copies: the scale follows the unit
        all_copies = np.repeat(X[:12], 10, 0)
        for c in (1.0, 1e-6, 1e6):
            scaled = (all_copies * c).astype(dtype)
            fitted = DiffusionMap("self-tuning", n_components=2).fit(scaled)
            if c == 1.0:
                one = fitted
            np.testing.assert_allclose(fitted.sigma_ / c, one.sigma_, rtol=10 * TOL)
            np.testing.assert_allclose(fitted.eigenvalues_, one.eigenvalues_, atol=10 * TOL)
            np.testing.assert_allclose(knn_bandwidth(scaled), fitted.sigma_, rtol=10 * TOL)


def test_what_is_not_a_kernel_is_never_called_converged(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "the test is of the torch backend")
    X = normal(200)
    dm = DiffusionMap(1.0, n_components=2).fit(X)
    exponents = Tiles.exponents

    def wrong(change):
        def spoilt(self, *args, **kwargs):
            return change(exponents(self, *args, **kwargs))

        monkeypatch.setattr(Tiles, "exponents", spoilt)

    for change in (lambda s: s.fill_(float("nan")), lambda s: s - 40.0):
        wrong(change)
        with pytest.raises(FloatingPointError, match="row sum of the kernel"):
            DiffusionMap(1.0, n_components=2).fit(X)
        with pytest.raises(FloatingPointError, match="row sum"):
            FlashDiffusion(X, X, X)
        with pytest.raises(FloatingPointError, match="row sum"):
            dm.operator()
    monkeypatch.undo()
    from flashdiffusion.eigensolver import Eigenpairs

    one = torch.ones(2, dtype=torch.float64)
    vectors = torch.eye(2, dtype=torch.float64)
    for values in ([1.0 + 2e-6, 0.5], [float("nan"), 0.5]):
        pairs = Eigenpairs(torch.tensor(values), vectors, 0.0 * one, 1, True).judged(1e-6)
        assert not pairs.converged and pairs.n_converged == 0
    pairs = Eigenpairs(torch.tensor([1.0, 1e-9]), vectors, 1e-8 * one, 1, True).judged(1e-6)
    assert not pairs.converged and pairs.n_converged == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_that_are_noise_are_not_called_converged(dtype):
    X = np.random.default_rng(0).random((1500, 2)).astype(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dm = DiffusionMap("median", n_components=30).fit(X)
    good = dm.n_converged_
    assert dm.converged_ == (good == 30) == (not caught)
    assert (dm.residuals_[:good] <= RESIDUAL * np.abs(dm.eigenvalues_[:good])).all()
    extended = dm.transform(X, t=0)[:, :good]
    error = np.abs(extended - dm.eigenvectors_[:, :good]).max(0)
    assert (error < EXTENDED * np.abs(extended).max(0)).all()
    if dtype == np.float32:
        assert 10 < good < 30 and f"{good} of the 30 eigenpairs have converged" in str(
            caught[0].message
        )


def test_a_kernel_that_sees_one_point_warns():
    for X, beta in ((normal(50), 1e-9), (np.ones((50, 2)), 1.0)):
        with pytest.warns(UserWarning, match="all entries of the kernel are nearly 1"):
            DiffusionMap(beta, n_components=2).fit(X)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_distances_that_overflow_are_named(alpha):
    """Their logarithms are infinite, and what rests on them was nan."""
    rng = np.random.default_rng(0)
    Q, K, V = rng.standard_normal((40, 3)), rng.standard_normal((50, 3)), rng.standard_normal(50)
    K[7] = 1e160
    with pytest.raises(FloatingPointError, match="distances to a point overflow"):
        FlashDiffusion(Q, K, V, beta=1.0, alpha=alpha, normalize="row")
