"""The sparse kernel of the k nearest neighbours of each point, by one of several searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared_kernels import pairwise

from ._graph import Links

SEARCHES = ("exact", "tree", "pynndescent", "faiss")
# sigma of "self-tuning" is the distance to this neighbour, as in utils.knn_bandwidth
_SIGMA_NEIGHBOUR = 7
# From so many points on, search="faiss" goes along a graph: comparing all would take N^2.
_GRAPH_FROM = 50_000
# Distances are computed so many at a time.
_CHUNK = 2**20


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
        both = one_way.maximum(one_way.T) + sparse.csr_array(sparse.identity(N))
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
        self,
        rows: np.ndarray,
        twins: np.ndarray,
        matrix: sparse.csr_matrix,
        r: np.ndarray,
        c: np.ndarray,
        s: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        found: np.ndarray = self._index.query(query, k)[1]
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
            self._copies = None
            if len(points) > _GRAPH_FROM:
                # 32 links for each point; those of equal points would lead to one another alone
                self._copies = _Copies(points)
                points = self._copies.distinct
                self._index = faiss.IndexHNSWFlat(points.shape[1], 32)
                self._index.hnsw.efSearch = max(64, 4 * k)
            self._index.add(points)
        n_asked = min(k, self._index.ntotal)
        found = self._index.search((query - self._centre).astype(np.float32), n_asked)[1]
        found = self._complete(found.astype(np.int64))
        return found if self._copies is None else self._copies.spread(found, k)

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


class _Copies:
    """The distinct ones of points, and which points equal each."""

    def __init__(self, points: np.ndarray) -> None:
        self.distinct, which, self.counts = np.unique(
            points, axis=0, return_inverse=True, return_counts=True
        )
        self.members = np.argsort(which.ravel(), kind="stable")
        self.starts = np.cumsum(self.counts) - self.counts

    def spread(self, nearest: np.ndarray, k: int) -> np.ndarray:
        """(n, m) distinct points, nearest first -> (n, k) points: all copies of each in turn."""
        ends = np.minimum(self.counts[nearest], k).cumsum(1)
        out = np.empty((len(nearest), k), dtype=np.int64)
        rows = np.arange(len(nearest))
        for place in range(k):
            column = (ends <= place).sum(1)
            before = np.where(column > 0, ends[rows, column - 1], 0)
            out[:, place] = self.members[self.starts[nearest[rows, column]] + place - before]
        return out


def _without_self(index: np.ndarray) -> np.ndarray:
    """(N, k + 1) -> (N, k): row i without i, or without its last entry where i is not there."""
    own = index == np.arange(len(index))[:, None]
    own[~own.any(1), -1] = True
    others: np.ndarray = index[~own]
    return others.reshape(len(index), index.shape[1] - 1)
