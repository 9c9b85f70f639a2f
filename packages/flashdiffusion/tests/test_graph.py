"""Sparse kernels: k neighbours, or a matrix of the caller's, against dense matrices."""

import pickle

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from sklearn.exceptions import ConvergenceWarning

from flashdiffusion import (
    DiffusionMap,
    _neighbours,
    carre_du_champ,
    committor,
    doob_transform,
    kinetics,
    metric_tensor,
    nystrom_extension,
)
from flashdiffusion._neighbours import Neighbours
from shared_kernels.testing import others_thorough

from .cases import CANCELLED, ITERATED, ROUNDING, SOLVED, TOL, circle, swiss_roll

RULES = (0.7, "median", "bgh", "self-tuning")


def cloud(N=300, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((N, d))


def chain(dm):
    """Dense P of a fitted sparse map."""
    K = dm.affinity_.toarray()
    K = K * dm.weights_[None]
    return K / K.sum(1, keepdims=True)


@pytest.mark.filterwarnings("ignore:the first coordinate lives on")
@pytest.mark.parametrize("beta", RULES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_all_neighbours_are_the_dense_map(beta, dtype):
    X = cloud().astype(dtype)
    options = {"beta": beta, "n_components": 4, "precision": "float64"}
    full, ours = DiffusionMap(**options).fit(X), DiffusionMap(**options, neighbors=299).fit(X)
    np.testing.assert_allclose(ours.eigenvalues_, full.eigenvalues_, atol=ITERATED)
    # the dense map rounds local scales to the dtype of the points
    vectors = ITERATED if dtype == np.float64 else TOL
    np.testing.assert_allclose(ours.eigenvectors_, full.eigenvectors_, atol=vectors)
    np.testing.assert_allclose(ours.density_, full.density_, rtol=vectors)
    new = X[:7] + dtype(0.1)
    np.testing.assert_allclose(ours.transform(new), full.transform(new), atol=TOL)


@pytest.mark.parametrize("beta", RULES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_the_graph_is_the_union_of_both_directions(beta, scale):
    X, k = cloud(90) * scale, 6
    beta = beta / scale**2 if isinstance(beta, float) else beta
    dm = DiffusionMap(beta=beta, neighbors=k, n_components=2).fit(X)
    sq = ((X[:, None] - X[None]) ** 2).sum(-1)
    order = np.argsort(sq + np.where(np.eye(90), np.inf, 0.0), axis=1)[:, :k]
    near = np.zeros((90, 90), dtype=bool)
    np.put_along_axis(near, order, True, axis=1)
    sigma = np.sqrt(np.take_along_axis(sq, order, 1)[:, -1]) if beta == "self-tuning" else None
    length = 1.0 if sigma is None else sigma[:, None] * sigma[None]
    exact = np.where(near | near.T | np.eye(90, dtype=bool), np.exp(-dm.beta_ * sq / length), 0.0)
    np.testing.assert_allclose(dm.affinity_.toarray(), exact, rtol=SOLVED)


@pytest.mark.parametrize("search", ["exact", "tree"])
def test_what_rests_on_the_kernel(search):
    X = cloud()
    dm = DiffusionMap(beta="self-tuning", neighbors=12, n_components=5, search=search).fit(X)
    P, pi = chain(dm), dm.stationary_
    np.testing.assert_allclose(pi @ P, pi, atol=ROUNDING)
    np.testing.assert_allclose(
        P @ dm.eigenvectors_, dm.eigenvectors_ * dm.eigenvalues_, atol=SOLVED
    )
    np.testing.assert_allclose(pi @ dm.eigenvectors_**2, 1.0, atol=SOLVED)
    np.testing.assert_allclose(nystrom_extension(dm, X), dm.eigenvectors_, atol=ITERATED)
    f = X[:, 0]
    gamma = 0.5 * (P * (f[None] - f[:, None]) ** 2).sum(1)
    np.testing.assert_allclose(carre_du_champ(dm, f), gamma, atol=CANCELLED)
    assert metric_tensor(dm, X)[0].shape == (300, 3, 3)
    A, B = f < -1.0, f > 1.0
    q = committor(dm, A, B)
    inside = ~(A | B)
    left = np.eye(inside.sum()) - P[np.ix_(inside, inside)]
    exact = np.linalg.solve(left, P[np.ix_(inside, B)].sum(1))
    np.testing.assert_allclose(q[inside], exact, atol=ITERATED * 10)
    h = np.exp(f)
    tilted = doob_transform(dm, h)
    Ph = P * h[None]
    Ph /= Ph.sum(1, keepdims=True)
    np.testing.assert_allclose(
        Ph @ tilted.eigenvectors_, tilted.eigenvectors_ * tilted.eigenvalues_, atol=SOLVED
    )
    new = pickle.loads(pickle.dumps(tilted)).transform(X[:3] + 0.01)
    np.testing.assert_array_equal(new, tilted.transform(X[:3] + 0.01))


def in_halves(matrix):
    """The same matrix: each place is named twice, out of order, and its two values are summed."""
    data, columns = np.repeat(0.5 * matrix.data, 2), np.repeat(matrix.indices, 2).astype(np.int64)
    starts = 2 * matrix.indptr.astype(np.int64)
    for start, stop in zip(starts, starts[1:], strict=False):
        columns[start:stop] = columns[start:stop][::-1]
        data[start:stop] = data[start:stop][::-1]
    return sparse.csr_array((data, columns, starts), shape=matrix.shape)


@pytest.mark.parametrize("tol", [1e-6, 1e-10])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("given", ["csr", "csc", "array", "dense", "halves"])
def test_a_matrix_of_the_callers(tol, diagonal, given):
    X = swiss_roll(700)[0]
    K = DiffusionMap(beta="self-tuning", neighbors=10, n_components=2).fit(X).affinity_
    K = (K if diagonal else K - sparse.csr_array(sparse.identity(700))).tocsr()
    asked = {
        "csr": sparse.csr_matrix,
        "csc": sparse.csc_matrix,
        "array": sparse.csr_array,
        "dense": lambda m: m.toarray(),
        "halves": in_halves,
    }[given](K)
    dm = DiffusionMap(affinity="precomputed", alpha=1.0, n_components=8, tol=tol).fit(asked)
    assert dm.converged_ and dm.residuals_.max() <= tol and np.isnan(dm.beta_)
    q = 1.0 / np.asarray(K.sum(1)).ravel()
    scaled = K.multiply(q[:, None]).multiply(q[None]).tocsr()
    root = np.sqrt(np.asarray(scaled.sum(1)).ravel())
    M = scaled.multiply(1.0 / root[:, None]).multiply(1.0 / root[None]).tocsr()
    exact = eigsh(M, 9, which="LA", tol=ROUNDING)[0][::-1][1:]
    np.testing.assert_allclose(dm.eigenvalues_, exact, atol=tol)
    np.testing.assert_allclose(dm.transform(asked[:50], t=0), dm.eigenvectors_[:50], atol=100 * tol)


@pytest.mark.parametrize("n_components", [3, 40])
def test_the_filter_against_the_dense_solver(n_components):
    X = swiss_roll(900)[0]
    options = {"beta": "self-tuning", "neighbors": 9, "n_components": n_components}
    dense = DiffusionMap(**options, solver="dense").fit(X)
    ours = DiffusionMap(**options, solver="krylov", tol=1e-9).fit(X)
    assert ours.converged_
    np.testing.assert_allclose(ours.eigenvalues_, dense.eigenvalues_, atol=SOLVED)


def test_parts_are_counted_on_the_graph():
    X = np.concatenate((circle(400), circle(400, shift=50.0), circle(400, shift=99.0)))
    with pytest.warns(UserWarning, match="the graph is disconnected"):
        dm = DiffusionMap(beta=100.0, neighbors=6, n_components=4, tol=1e-9).fit(X)
    np.testing.assert_allclose(dm.eigenvalues_[:2], 1.0, atol=ITERATED)
    assert dm.eigenvalues_[2] < 1.0 - TOL


def test_landmarks_and_copies():
    X = np.concatenate((cloud(), cloud()[:40]))
    dm = DiffusionMap(beta="self-tuning", neighbors=8, landmarks=150, n_components=3).fit(X)
    assert dm.transform().shape == (340, 3) and abs(dm.stationary_.sum() - 1.0) < ROUNDING
    rows = dm.landmarks_
    assert np.isfinite(dm.eigenvectors_).all() and len(rows) == 150
    with pytest.warns(UserWarning, match="the graph is disconnected"):
        copies = DiffusionMap(beta="self-tuning", neighbors=3, n_components=2).fit(
            np.repeat(cloud(60), 9, 0)
        )
    assert copies.converged_
    np.testing.assert_allclose(copies.eigenvalues_, 1.0, atol=TOL)


def test_torch_and_time():
    X = torch.from_numpy(cloud()).float()
    dm = DiffusionMap(beta="self-tuning", neighbors=8, n_components=3).fit(X)
    assert dm.transform(X[:4]).dtype == np.float32
    np.testing.assert_allclose(dm.transform(t=2), dm.transform(t=0) * dm.eigenvalues_**2, rtol=TOL)


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({"neighbors": 0}, None, r"`neighbors` must be an int in \[1, 49\], points minus"),
        ({"neighbors": 50}, None, "`neighbors` must be an int in"),
        ({"neighbors": 2.5}, None, "`neighbors` must be an int in"),
        ({"neighbors": True}, None, "`neighbors` must be an int in"),
        ({"neighbors": 5, "search": "kd"}, None, "`search` must be"),
        ({"search": "tree"}, None, "`search` must be 'exact' without `neighbors`"),
        ({"affinity": "knn"}, None, "`affinity` must be"),
        ({"neighbors": 5, "checkpoint": "folder"}, None, "`checkpoint` must be None with a sparse"),
        ({"neighbors": 5, "precision": "half"}, None, "`precision` must be"),
        ({"affinity": "precomputed", "neighbors": 5}, np.eye(9), "`neighbors` must be None"),
        ({"affinity": "precomputed", "beta": 2.0}, np.eye(9), "`beta` must be left out"),
        ({"affinity": "precomputed", "landmarks": 5}, np.eye(9), "`landmarks` must be None"),
        ({"affinity": "precomputed"}, np.ones((9, 8)), "must be square"),
        ({"affinity": "precomputed"}, -np.eye(9), "not be negative"),
        ({"affinity": "precomputed"}, np.triu(np.ones((9, 9))), r"pass 0.5 \* \(X \+ X.T\)"),
        ({"affinity": "precomputed"}, np.diag(np.arange(9.0)), "1 rows of zeros"),
    ],
)
def test_what_is_refused(options, X, message):
    X = cloud(50) if X is None else X
    with pytest.raises(ValueError, match=message):
        DiffusionMap(n_components=2, **options).fit(X)


def test_new_rows_are_refused_by_name():
    dm = DiffusionMap(affinity="precomputed", n_components=2).fit(
        np.exp(-np.abs(np.subtract.outer(np.arange(9.0), np.arange(9.0))))
    )
    with pytest.raises(ValueError, match="1 rows of zeros"):
        dm.transform(np.zeros((1, 9)))
    with pytest.raises(ValueError, match="8 features"):
        dm.transform(np.ones((1, 8)))


@pytest.mark.extras
@pytest.mark.parametrize("search", others_thorough(["faiss", "pynndescent"]))
@pytest.mark.parametrize("N", [600, 3000])
def test_approximate_search(N, search):
    pytest.importorskip(search, reason=f"needs the optional {search}")
    X = swiss_roll(N)[0]
    options = {"beta": "self-tuning", "neighbors": 10, "n_components": 4}
    ours = DiffusionMap(**options, search=search).fit(X)
    exact = DiffusionMap(**options).fit(X)
    common = ours.affinity_.multiply(exact.affinity_ > 0).astype(bool).sum()
    assert common >= 0.97 * exact.affinity_.nnz
    assert ours.transform(X[:9] + 0.01).shape == (9, 4)
    np.testing.assert_allclose(ours.transform(X[:20], t=0), ours.eigenvectors_[:20], atol=1e3 * TOL)


@pytest.mark.extras
@pytest.mark.parametrize("copies", ["none", "of the mean", "of all"])
def test_faiss_finds_its_way_past_equal_points(copies, monkeypatch):
    """Links of equal points lead to one another alone, and a search does not leave them."""
    pytest.importorskip("faiss", reason="needs the optional faiss")
    monkeypatch.setattr(_neighbours, "_GRAPH_FROM", 1000)
    X = np.random.default_rng(0).normal(size=(3000, 8))
    if copies == "of the mean":
        X[::4] = X.mean(0)
    elif copies == "of all":
        X = X[np.arange(3000) // 50]
    points = torch.from_numpy(X)
    exact, ours = (
        Neighbours(points, 10, search, np.random.RandomState(0)) for search in ("exact", "faiss")
    )
    assert ours._copies is not None
    found = ours.sq <= exact.sq * (1 + TOL)
    assert found.sum() >= 0.97 * found.size
    assert (ours.index != np.arange(3000)[:, None]).all()
    assert all(len(set(row)) == 10 for row in ours.index.tolist())
    again = ours._nearest(points[:40], 3)
    assert not ours._squared(points[:40], again)[:, 0].any()


def test_a_search_that_is_not_installed(monkeypatch):
    import sys

    for name in ("faiss", "pynndescent"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"flashdiffusion\\[{name}\\]"):
            DiffusionMap(neighbors=5, search=name, n_components=2).fit(cloud(50))


@pytest.mark.parametrize("affinity", ["rbf", "precomputed"])
@pytest.mark.parametrize("solver", ["auto", "krylov", "lobpcg", "lanczos", "dense"])
@pytest.mark.parametrize(("N", "k"), [(9, 8), (30, 4), (600, 4)])
def test_every_solver(affinity, solver, N, k):
    X = cloud(N)
    options = {"beta": "self-tuning", "neighbors": min(9, N - 1), "n_components": k}
    exact = DiffusionMap(**options, solver="dense").fit(X)
    options["solver"] = solver
    given = X
    if affinity == "precomputed":
        given = exact.affinity_
        options = {"affinity": affinity, "n_components": k, "solver": solver}
    ours = DiffusionMap(**options).fit(given)
    assert ours.converged_ and ours.n_converged_ == k
    np.testing.assert_allclose(ours.eigenvalues_, exact.eigenvalues_, atol=TOL)


def test_eigenvalues_below_their_residuals_are_not_converged():
    """The rule of dense kernels: |M v - lambda v| is at most sqrt(tol) |lambda|, too."""
    X = np.random.default_rng(0).random((700, 2))
    sq = ((X[:, None] - X[None]) ** 2).sum(2)
    options = {"affinity": "precomputed", "n_components": 30, "solver": "krylov"}
    with pytest.warns(ConvergenceWarning, match="of the 30 eigenpairs have converged"):
        dm = DiffusionMap(**options).fit(np.exp(-0.05 * sq))
    assert not dm.converged_ and 2 <= dm.n_converged_ < 30
    good = dm.n_converged_
    allowed = np.minimum(1e-6, 1e-3 * np.abs(dm.eigenvalues_))
    assert (dm.residuals_[:good] <= allowed[:good]).all()
    assert dm.residuals_[good] > allowed[good]


@pytest.mark.filterwarnings("ignore:the second eigenvalue is")
@pytest.mark.parametrize("least", [0.0, 1e-200])
@pytest.mark.parametrize("of", ["committor", "mean_first_passage_time"])
def test_parts_that_only_rounding_joins(least, of):
    """Dense and sparse kernels, committors and passage times agree which points are apart."""
    K = np.kron(np.eye(2), np.exp(-np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))))
    K[5, 6] = K[6, 5] = least
    dm = DiffusionMap(affinity="precomputed", n_components=2).fit(sparse.csr_matrix(K))
    if of == "committor":
        with pytest.warns(UserWarning, match="6 of 12 points reach neither"):
            out = committor(dm, [0], [5])
    else:
        out = kinetics.mean_first_passage_time(dm, [0])
    assert np.isfinite(out[:6]).all() and not np.isfinite(out[6:]).any()
