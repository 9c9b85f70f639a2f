"""Sparse kernels: the k nearest neighbours of each point, or a matrix that the caller has.

`Graph` is the square kernel of the fitted points with the products of `_operator.Kernel`, and
`Links` the rows of new points; with them everything that rests on products with a kernel (the
eigensolver, carre du champ, Doob transforms, committors, extension) needs O(k N) memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared_kernels import checks, pairwise

from . import _filter, _rungs, eigensolver
from ._progress import Progress

if TYPE_CHECKING:
    from ._operator import Reversible
    from .dmap import DiffusionMap

SEARCHES = ("exact", "tree", "pynndescent", "faiss")
# sigma of "self-tuning" is the distance to this neighbour, as in utils.knn_bandwidth
_SIGMA_NEIGHBOUR = 7
# Distances are computed so many at a time.
_CHUNK = 2**20


class Graph:
    """A symmetric sparse kernel: (N, N) float64, with the products that `Reversible` takes.

    Attributes:
        matrix: scipy CSR, symmetric, not negative.
        diagonal: (N,) K_ii, which a matrix of the caller's may have as 0.
        x: (N, d) points, or (N, 0).
    """

    dtype = torch.float64
    same = symmetric = True
    ranks = None

    def __init__(self, matrix: sparse.csr_matrix, x: Tensor) -> None:
        self.matrix, self.x = matrix, x
        self.shape = matrix.shape
        self.diagonal = torch.from_numpy(matrix.diagonal()).to(x.device)
        self._multiply = _filter.product(matrix, torch.float64, x.device)
        self.n_parts = int(sparse.csgraph.connected_components(matrix, directed=False)[0])

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (N, r) -> (N, r) float64."""
        return self._multiply(V)

    def density(self) -> Tensor:
        """Row sums K 1: (N,) float64."""
        return self.matvec(self.x.new_ones(self.shape[0], 1, dtype=torch.float64))[:, 0]

    def leading_to(self, ends: Tensor, weights: Tensor, least: float) -> Tensor:
        """(N,) bool: from which points steps P_ij > least of P = K w / (K w) lead to `ends`."""
        w = weights.cpu().numpy()
        rows = sparse.diags(1.0 / (self.matrix @ w))
        steps = sparse.csr_matrix(rows @ self.matrix @ sparse.diags(w)).T.tocoo()
        kept, N = steps.data > least, self.shape[0]
        # backwards along the steps, from a vertex N that leads to all ends
        goals = np.flatnonzero(ends.cpu().numpy())
        start = np.concatenate((steps.row[kept], np.full(len(goals), N)))
        stop = np.concatenate((steps.col[kept], goals))
        back = sparse.csr_matrix((np.ones(len(start)), (start, stop)), shape=(N + 1, N + 1))
        order = sparse.csgraph.breadth_first_order(back, N, return_predecessors=False)
        found = np.zeros(N + 1, dtype=bool)
        found[order] = True
        return torch.from_numpy(found[:N]).to(ends.device)

    def disconnected(self, second: float) -> bool:
        """Known from the graph: a large graph in one piece has eigenvalues very close to 1."""
        return self.n_parts > 1


class Links:
    """Rows of a kernel between new points and the fitted ones: logarithms in CSR form."""

    dtype = torch.float64

    def __init__(self, logs: np.ndarray, columns: np.ndarray, starts: np.ndarray, N: int) -> None:
        self.logs, self.columns, self.starts = logs, columns, starts
        self.shape = (len(starts) - 1, N)

    def softmax(self, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_j softmax_j(log K_ij + bias_j) V_j (n, r) and the log-sum-exp (n,)."""
        values = self.logs if bias is None else self.logs + bias.cpu().numpy()[self.columns]
        first = self.starts[:-1]
        counts = np.diff(self.starts)
        largest = np.maximum.reduceat(values, first) if len(first) else np.empty(0)
        weights = np.exp(values - np.repeat(largest, counts))
        sums = np.add.reduceat(weights, first) if len(first) else np.empty(0)
        weights /= np.repeat(sums, counts)
        matrix = sparse.csr_matrix((weights, self.columns, self.starts), self.shape)
        out = torch.from_numpy(matrix @ V.double().cpu().numpy())
        return out.to(V.device), torch.from_numpy(largest + np.log(sums)).to(V.device)

    def log_sum_exp(self, bias: Tensor | None = None) -> Tensor:
        """log sum_j K_ij e^bias_j: (n,) float64."""
        nothing = torch.empty(self.shape[1], 0, dtype=torch.float64)
        return self.softmax(nothing, bias)[1]


def wanted(dm: DiffusionMap) -> bool:
    """Whether this estimator's kernel is sparse."""
    return dm.neighbors is not None or dm.affinity == "precomputed"


def check(dm: DiffusionMap, N: int) -> None:
    """Are the parameters that make a kernel sparse legal, and do they go with the others?"""
    checks.in_set("affinity", dm.affinity, ("rbf", "precomputed"))
    checks.in_set("search", dm.search, SEARCHES)
    if not wanted(dm):
        if dm.search != "exact":
            checks.fail("search", "be 'exact' without `neighbors`", dm.search)
        return
    for name in ("group", "checkpoint", "tile"):
        if getattr(dm, name) is not None:
            checks.fail(
                name, "be None with a sparse kernel", repr(getattr(dm, name)),
                "it has no tiles, and one process solves it",
            )  # fmt: skip
    if dm.precision not in ("auto", "float64"):
        checks.fail("precision", "be 'auto' or 'float64' with a sparse kernel", dm.precision)
    if dm.affinity == "precomputed":
        if dm.neighbors is not None:
            checks.fail("neighbors", "be None with affinity='precomputed'", dm.neighbors)
        if dm.landmarks is not None:
            checks.fail("landmarks", "be None with affinity='precomputed'", repr(dm.landmarks))
        if dm.beta != "bgh":
            checks.fail(
                "beta", "be left out with affinity='precomputed'", repr(dm.beta),
                "the matrix holds the kernel's values",
            )  # fmt: skip
        return
    k = dm.neighbors
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k < N:
        checks.fail("neighbors", f"be an int in [1, {N - 1}], points minus one", repr(k))


# ---- a matrix of the caller's


def given_matrix(X: Any) -> sparse.csr_matrix:
    """A symmetric affinity matrix (N, N), sparse or dense -> CSR float64, checked."""
    A = _sparse("X", X)
    if A.shape[0] != A.shape[1]:
        checks.fail("X", "be square with affinity='precomputed'", A.shape)
    if A.shape[0] < 2:
        checks.fail("X", "have at least 2 rows", A.shape[0])
    rounding = 8.0 * np.finfo(np.float32).eps if X.dtype != np.float64 else 1e-12
    difference = abs(A - A.T)
    largest = float(A.max()) if A.nnz else 0.0
    if difference.nnz and float(difference.max()) > rounding * largest:
        checks.fail(
            "X", "be symmetric with affinity='precomputed'",
            f"|X - X.T| up to {float(difference.max()):.3g}", "pass 0.5 * (X + X.T)",
        )  # fmt: skip
    if difference.nnz:
        A = (0.5 * (A + A.T)).tocsr()
    alone = int((np.asarray(A.sum(1)).ravel() <= 0.0).sum())
    if alone:
        checks.fail("X", "have a positive sum in each row", f"{alone} rows of zeros")
    return A


def _sparse(name: str, X: Any) -> sparse.csr_matrix:
    if not (sparse.issparse(X) or isinstance(X, np.ndarray)):
        checks.fail(name, "be a scipy sparse matrix or an array", type(X).__name__, error=TypeError)
    if X.dtype.kind not in "fiub":
        checks.fail(name, "be real numbers", f"dtype {X.dtype}", error=TypeError)
    A = sparse.csr_matrix(X, dtype=np.float64, copy=True)
    A.sum_duplicates()
    if not np.isfinite(A.data).all():
        checks.fail(name, "be finite", "NaN or inf")
    if (A.data < 0.0).any():
        checks.fail(
            name, "not be negative", f"values down to {A.data.min():.3g}",
            "Negative values in data are no affinities",
        )  # fmt: skip
    A.eliminate_zeros()
    return A


def given_rows(X: Any, N: int) -> Links:
    """Affinities (n, N) of new points to the fitted ones."""
    A = _sparse("X", X)
    if A.shape[1] != N:
        checks.fail(
            "X", f"have shape (n, {N}), the affinities of new points to the fitted ones", A.shape
        )
    empty = int((np.diff(A.indptr) == 0).sum())
    if empty:
        checks.fail("X", "have an affinity above 0 in each row", f"{empty} rows of zeros")
    return Links(np.log(A.data), A.indices, A.indptr, N)


# ---- neighbours


class Neighbours:
    """The symmetrised kernel of the k nearest neighbours of each point, and what extends it.

    K_ij = exp(-beta |x_i - x_j|^2 / (sigma_i sigma_j)) where j is among the k nearest of i or i
    among those of j, K_ii = 1, and 0 elsewhere.
    """

    def __init__(self, points: Tensor, k: int, search: str, random_state: Any) -> None:
        self.points = points.double().cpu()
        self.k, self.search = k, search
        self.seed = int(random_state.randint(2**31 - 1))
        self._index: Any = None
        index = self._nearest(None, k)
        self.sq = self._squared(self.points, index)
        order = np.argsort(self.sq, axis=1, kind="stable")
        self.sq = np.take_along_axis(self.sq, order, 1)
        self.index = np.take_along_axis(index, order, 1)
        # an edge of x to x_j that x_j would have chosen: |x - x_j| is at most this
        self.radius_sq = self.sq[:, -1]
        self.beta, self.least = 1.0, 1.0
        self.sigma: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # faiss' indexes cannot be pickled; it is built again when a new point comes
        return {**self.__dict__, "_index": None}

    def own_scales(self) -> np.ndarray:
        """sigma of "self-tuning", from the distances that are already there."""
        sigma = np.sqrt(self.sq[:, min(self.k, _SIGMA_NEIGHBOUR) - 1])
        positive = sigma[sigma > 0.0]
        self.least = float(positive.min()) if len(positive) else 1.0
        self.sigma = scales = np.where(sigma > 0.0, sigma, self.least)
        return scales

    def matrix(self) -> sparse.csr_matrix:
        N, k = self.index.shape
        scale = 1.0 if self.sigma is None else self.sigma[:, None] * self.sigma[self.index]
        values = np.exp(-self.beta * self.sq / scale)
        one_way = sparse.csr_matrix(
            (values.ravel(), self.index.ravel().astype(np.int32), np.arange(0, N * k + 1, k)),
            shape=(N, N),
        )
        # both directions of a pair have the same value, so the larger of it and 0 is the union
        both = one_way.maximum(one_way.T) + sparse.eye_array(N, format="csr")
        both = sparse.csr_matrix(both)
        both.sort_indices()
        return both

    def links(self, x: Tensor, matrix: sparse.csr_matrix) -> Links:
        """New points see their k + 1 nearest fitted ones, and of the neighbours of those in the
        graph the ones that would have chosen them. A fitted point has its own row again.
        """
        x = x.double().cpu()
        n, N = len(x), len(self.points)
        nearest = self._nearest(x, min(self.k + 1, N))
        parts_c, parts_sq, counts = [], [], np.empty(n, dtype=np.int64)
        sigma = np.ones(n)
        height = max(1, _CHUNK // max(1, 8 * self.k * self.k))
        for start in range(0, n, height):
            index = nearest[start : start + height]
            sq = self._squared(x[start : start + height], index)
            order = np.argsort(sq, axis=1, kind="stable")
            sq, index = np.take_along_axis(sq, order, 1), np.take_along_axis(index, order, 1)
            if self.sigma is not None:
                found = np.sqrt(sq[:, min(min(self.k, _SIGMA_NEIGHBOUR), sq.shape[1] - 1)])
                sigma[start : start + len(index)] = np.where(found > 0.0, found, self.least)
            rows = np.repeat(np.arange(len(index)), index.shape[1])
            chosen = sparse.csr_matrix(
                (np.ones(index.size), (rows, index.ravel())), shape=(len(index), N)
            )
            further = (chosen @ (matrix != 0).astype(np.float64)).tocoo()
            far_sq = self._pairs_squared(x[start : start + height], further.row, further.col)
            keep = far_sq <= self.radius_sq[further.col]
            r = np.concatenate((rows, further.row[keep]))
            c = np.concatenate((index.ravel(), further.col[keep]))
            s = np.concatenate((sq.ravel(), far_sq[keep]))
            key, first = np.unique(r.astype(np.int64) * N + c, return_index=True)
            r, c, s = key // N, key % N, s[first]
            same = sq[:, 0] == 0.0
            if same.any():
                # ties are broken as they were in fit
                r, c, s = self._own_rows(np.flatnonzero(same), index[:, 0], matrix, r, c, s)
                sigma[start + np.flatnonzero(same)] = (
                    1.0 if self.sigma is None else self.sigma[index[same, 0]]
                )
            counts[start : start + len(index)] = np.bincount(r, minlength=len(index))
            parts_c.append(c)
            parts_sq.append(s)
        columns = np.concatenate(parts_c) if parts_c else np.empty(0, dtype=np.int64)
        sq = np.concatenate(parts_sq) if parts_sq else np.empty(0)
        starts = np.concatenate(([0], np.cumsum(counts)))
        scale = 1.0
        if self.sigma is not None:
            scale = np.repeat(sigma, counts) * self.sigma[columns]
        return Links(-self.beta * sq / scale, columns, starts, N)

    def _own_rows(
        self, rows: np.ndarray, twins: np.ndarray, matrix: sparse.csr_matrix, r: np.ndarray,
        c: np.ndarray, s: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        keep = ~np.isin(r, rows)
        own = matrix[twins[rows]].tocoo()
        own_sq = self._pairs_squared(self.points[torch.from_numpy(twins[rows])], own.row, own.col)
        r = np.concatenate((r[keep], rows[own.row]))
        c = np.concatenate((c[keep], own.col))
        s = np.concatenate((s[keep], own_sq))
        order = np.lexsort((c, r))
        return r[order], c[order], s[order]

    # ---- searching

    def _nearest(self, x: Tensor | None, k: int) -> np.ndarray:
        """(n, k) rows of the fitted points: of x, or of each fitted point without itself."""
        if self.search == "exact":
            if x is None:
                return pairwise.knn(self.points, k, exclude_self=True)[1].numpy()
            return pairwise.knn(x, k, Y=self.points)[1].numpy()
        own = x is None
        query = self.points if x is None else x
        k_asked = min(k + 1, len(self.points)) if own else k
        index = getattr(self, f"_by_{self.search}")(query.numpy(), k_asked)
        return _without_self(index) if own else index

    def _by_tree(self, query: np.ndarray, k: int) -> np.ndarray:
        from scipy.spatial import cKDTree

        if self._index is None:
            self._index = cKDTree(self.points.numpy())
        found = self._index.query(query, k)[1]
        return found.reshape(len(query), k).astype(np.int64)

    def _by_pynndescent(self, query: np.ndarray, k: int) -> np.ndarray:
        try:
            from pynndescent import NNDescent
        except ImportError as error:
            raise ImportError(
                'search="pynndescent" needs pip install "flashdiffusion[pynndescent]"'
            ) from error
        if self._index is None:
            # centred, because it computes in float32
            self._centre = self.points.numpy().mean(0)
            points = (self.points.numpy() - self._centre).astype(np.float32)
            width = min(len(points), max(self.k + 1, 15))
            self._index = NNDescent(points, n_neighbors=width, random_state=self.seed, n_jobs=1)
            found = self._index.neighbor_graph[0]
            if len(query) == len(points) and found.shape[1] >= k:
                # the first call is for the points themselves
                return self._complete(found[:, :k].astype(np.int64))
        found = self._index.query((query - self._centre).astype(np.float32), k=k)[0]
        return self._complete(found.astype(np.int64))

    def _by_faiss(self, query: np.ndarray, k: int) -> np.ndarray:
        try:
            import faiss
        except ImportError as error:
            raise ImportError('search="faiss" needs pip install "flashdiffusion[faiss]"') from error
        if self._index is None:
            self._centre = self.points.numpy().mean(0)
            points = (self.points.numpy() - self._centre).astype(np.float32)
            self._index = faiss.IndexFlatL2(points.shape[1])
            if len(points) > 50_000:
                # 32 links for each point: exact search would take N^2
                self._index = faiss.IndexHNSWFlat(points.shape[1], 32)
                self._index.hnsw.efSearch = max(64, 4 * k)
            self._index.add(points)
        found = self._index.search((query - self._centre).astype(np.float32), k)[1]
        return self._complete(found.astype(np.int64))

    def _complete(self, found: np.ndarray) -> np.ndarray:
        """Searches that are approximate may leave places empty (-1): those rows exactly."""
        if (found < 0).any():
            raise ValueError(
                f"search={self.search!r} has found fewer neighbours than asked for in "
                f"{int((found < 0).any(1).sum())} rows; take search='exact'"
            )
        return found

    def _squared(self, x: Tensor, index: np.ndarray) -> np.ndarray:
        """|x_i - points_index[i, c]|^2 from differences: (n, c) float64."""
        n, c = index.shape
        rows = np.repeat(np.arange(n), c)
        return self._pairs_squared(x, rows, index.ravel()).reshape(n, c)

    def _pairs_squared(self, x: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        out = np.empty(len(rows))
        height = max(1, _CHUNK // max(1, x.shape[1]))
        a, b = x.numpy(), self.points.numpy()
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            difference = a[rows[part]] - b[columns[part]]
            out[part] = np.einsum("pd,pd->p", difference, difference)
        return out


def _without_self(index: np.ndarray) -> np.ndarray:
    """(N, k + 1) -> (N, k): row i without i, or without its last entry where i is not there."""
    own = index == np.arange(len(index))[:, None]
    own[~own.any(1), -1] = True
    return index[~own].reshape(len(index), index.shape[1] - 1)


# ---- the estimator's side


def fit(dm: DiffusionMap, X: Any) -> DiffusionMap:
    """`DiffusionMap.fit` with a sparse kernel."""
    from sklearn.utils import check_random_state

    from ._operator import Reversible

    rng = check_random_state(dm.random_state)
    X = dm._validated(X, reset=True)
    dm._check_parameters(len(X) if isinstance(X, np.ndarray) else X.shape[0])
    dm.sigma_ = dm.sigma_fallback_ = dm.neighbours_ = None
    landmarks = dm._checked_landmarks(X.shape[0])
    if isinstance(landmarks, int):
        landmarks = np.sort(rng.permutation(len(X))[:landmarks])
    dm.landmarks_ = landmarks
    if dm.affinity == "precomputed":
        dm.affinity_ = given_matrix(X)
        # there are no points, only so many of them
        dm.X_fit_ = np.empty((X.shape[0], 0), dtype=X.dtype)
        dm.beta_ = float("nan")
    else:
        dm.X_fit_ = X if landmarks is None else X[landmarks]
        check(dm, len(dm.X_fit_))
        points = torch.from_numpy(np.ascontiguousarray(dm.X_fit_))
        near = Neighbours(points, int(dm.neighbors or 0), dm.search, rng)
        if dm.beta == "self-tuning":
            dm.beta_ = 1.0
            near.own_scales()
        else:
            dm._choose_bandwidth(points, rng, None)
        near.beta = dm.beta_
        dm.neighbours_, dm.affinity_ = near, near.matrix()
    graph = dm._kernel(dm._tensor(dm.X_fit_), precision="float64")
    density = graph.density()
    operator = Reversible(graph, density ** -float(dm.alpha))
    dm._solve(operator, density, rng, n_passes=1)
    dm._warn_of_lonely_points()
    if dm.landmarks_ is not None:
        dm._extend([X])
    return dm


def kernel(dm: DiffusionMap, x: Tensor, y: Tensor | None) -> Any:
    """What `DiffusionMap._kernel` gives where the kernel is sparse."""
    if y is None:
        return Graph(dm.affinity_, x)
    return dm.neighbours_.links(x, dm.affinity_)


def eigenpairs(
    dm: DiffusionMap, operator: Reversible, top: Tensor, rng: np.random.RandomState
) -> eigensolver.Eigenpairs:
    """Chebyshev-filtered block Krylov from a start of coordinates and noise, or scipy's solvers."""
    N, k = len(top), int(dm.n_components)
    b = min(k + 5 if k < 30 else 32, N - 1)
    graph: Any = operator.kernel
    if graph.x.shape[1]:
        start = _rungs.start_block(graph.x, top, b, rng)
    else:
        start = torch.from_numpy(rng.standard_normal((N, b))).to(top.device)
    if dm.solver in ("lobpcg", "lanczos"):
        solve = eigensolver.lobpcg if dm.solver == "lobpcg" else eigensolver.lanczos
        return solve(operator.apply, k, start, locked=top, tol=dm.tol)
    matrix = _filter.symmetric_form(graph.matrix, operator.rscale.cpu().numpy())
    with Progress(dm, shown=bool(dm.verbose)) as progress:
        return _filter.filtered_krylov(matrix, k, start, locked=top, tol=dm.tol, on_pass=progress)
