"""Sparse kernels, as matrices with the products that the rest of the package asks of a kernel.

`Graph` is the square kernel of the fitted points with the products of `_operator.Kernel`, and
`Links` the rows of new points; with them everything that rests on products with a kernel (the
eigensolver, carre du champ, Doob transforms, committors, extension) needs O(k N) memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared_kernels import checks

from . import _filter
from ._group import Rows


class Graph:
    """A symmetric sparse kernel: (N, N) float64, with the products that `Reversible` takes.

    Attributes:
        matrix: scipy CSR, symmetric, not negative.
        diagonal: (N,) K_ii, which a matrix of the caller's may have as 0.
        n_parts: connected parts of the graph.
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

    @property
    def held(self) -> Rows:
        """Which points this process has: all of them."""
        return Rows(self.shape[0])

    kept = held

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
        nothing = torch.empty(self.shape[1], 0, dtype=torch.float64, device="cpu")
        return self.softmax(nothing, bias)[1]


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
            "X",
            "be symmetric with affinity='precomputed'",
            f"|X - X.T| up to {float(difference.max()):.3g}",
            "pass 0.5 * (X + X.T)",
        )
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
            name,
            "not be negative",
            f"values down to {A.data.min():.3g}",
            "Negative values in data are no affinities",
        )
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
