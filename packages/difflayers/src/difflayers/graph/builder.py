"""GraphBuilder: patterns to graph, step by step or at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, pairwise

from .. import _checks
from .build_graph import build_knn_graph, build_similarity_matrix, sparse_adjacency
from .laplacian import compute_laplacian, compute_normalized_laplacian, degrees


class BuiltGraph(NamedTuple):
    """Adjacency (N, N), degrees (N,), neighbours (N, k) nearest first, Laplacian (N, N) or None."""

    W: Tensor
    deg: Tensor
    adj_indices: Tensor
    L: Tensor | None = None


class GraphBuilder:
    """Build the kNN graph of patterns.

    Fluent: ``GraphBuilder(X).cosine_similarity().knn(k, sparse).normalized_laplacian().build()``;
    reusable: ``GraphBuilder(k=5, use_sparse=False).build(X)``, without a Laplacian. S is the
    clamped cosine, M its k largest entries per row, W = max(M, M^T). Sparse graphs are found by
    tiled exact search and never hold an N x N matrix.

    Args:
        X: patterns (N, d), for the fluent form.
        k: neighbours per pattern, 1 <= k < N.
        use_sparse: W (and L) as ``sparse_coo``.

    Example:
        >>> graph = GraphBuilder(torch.eye(3) + 0.1).cosine_similarity().knn(k=1).build()
        >>> graph.W.shape, graph.L is None
        (torch.Size([3, 3]), True)
    """

    def __init__(self, X: Tensor | int | None = None, k: int = 5, use_sparse: bool = False) -> None:
        if isinstance(X, int):
            # GraphBuilder(5), GraphBuilder(5, True): k came first
            if isinstance(k, bool):
                use_sparse = k
            k, X = X, None
        checks.positive_int("k", k)
        self._X: Tensor | None = X
        self._k, self._sparse = k, use_sparse
        self._has_similarity = False
        self._laplacian: str | None = None

    def cosine_similarity(self) -> GraphBuilder:
        """S_ij = max(0, cos(x_i, x_j)), S_ii = 0 (the only similarity there is)."""
        self._has_similarity = True
        return self

    def knn(self, k: int | None = None, sparse: bool | None = None) -> GraphBuilder:
        """Keep the k largest similarities of each pattern, symmetrised by the maximum."""
        if k is not None:
            checks.positive_int("k", k)
            self._k = k
        if sparse is not None:
            self._sparse = sparse
        return self

    def laplacian(self) -> GraphBuilder:
        """Ask for L = D - W."""
        self._laplacian = "plain"
        return self

    def normalized_laplacian(self) -> GraphBuilder:
        """Ask for L = D^(-1/2) (D - W) D^(-1/2)."""
        self._laplacian = "normalized"
        return self

    def build(self, X: Tensor | None = None) -> BuiltGraph:
        """The graph of ``X`` (or of the patterns given to the constructor)."""
        X = self._X if X is None else X
        if X is None:
            checks.fail("X", "be given to the constructor or to build", None)
        checks.floating("X", X)
        checks.shape("X", X, (None, None), "(N, d)")
        if self._k >= X.shape[0]:
            checks.fail("k", f"be less than the number of patterns, {X.shape[0]}", self._k)
        _checks.finite("X", X)
        X = X.detach()
        if self._sparse:
            similarity, index = pairwise.knn(X, self._k, metric="cosine", exclude_self=True)
            W = sparse_adjacency(index, similarity.clamp(min=0.0))
        else:
            S = build_similarity_matrix(X)
            W = build_knn_graph(S, self._k)
            index = S.fill_diagonal_(-torch.inf).topk(self._k, dim=-1).indices
        L = None
        if self._laplacian is not None:
            make = compute_laplacian if self._laplacian == "plain" else compute_normalized_laplacian
            L = make(W)
        return BuiltGraph(W, degrees(W), index, L)
