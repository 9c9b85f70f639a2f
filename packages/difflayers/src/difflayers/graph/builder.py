"""GraphBuilder: patterns to graph, step by step or at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from shared_kernels import checks

from .. import _checks, _kept
from .._nearest import nearest
from .build_graph import graph_of_lists
from .laplacian import degrees
from .laplacian_builder import LaplacianBuilder


@dataclasses.dataclass(frozen=True)
class BuiltGraph:
    """Adjacency (N, N), degrees (N,), neighbours (N, k) nearest first, Laplacian (N, N) or None.

    Unpacks to (W, deg, adj_indices), and L where one was asked for.
    """

    W: Tensor
    deg: Tensor
    adj_indices: Tensor
    L: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        parts = (self.W, self.deg, self.adj_indices)
        return iter(parts if self.L is None else (*parts, self.L))

    def __len__(self) -> int:
        return 3 if self.L is None else 4

    def __getitem__(self, i: int) -> Tensor:
        return tuple(self)[i]


class GraphBuilder:
    """Build the kNN graph of patterns.

    Fluent: ``GraphBuilder(X).cosine_similarity().knn(k, sparse).normalized_laplacian().build()``;
    reusable: ``W, deg, adj_indices = GraphBuilder(k=5, use_sparse=False).build(X)``, without a
    Laplacian. S is the clamped cosine, M its k largest entries per row, W = max(M, M^T), in float32
    (float64 for float64 patterns). Neighbours are found by tiled exact search, equal ones in the
    order of their numbers; a sparse W is the same matrix, and N x N is never held for it.

    Args:
        X: patterns (N, d), for the fluent form.
        k: neighbours per pattern, 1 <= k < N.
        use_sparse: W (and L) as ``sparse_coo``.

    Example:
        >>> graph = GraphBuilder(torch.eye(3) + 0.1).cosine_similarity().knn(k=1).build()
        >>> graph.W.shape, graph.L is None
        (torch.Size([3, 3]), True)
    """

    def __init__(
        self, X: Tensor | int | None = None, k: int | None = None, use_sparse: bool = False
    ) -> None:
        if X is not None and not isinstance(X, Tensor):
            # GraphBuilder(5), GraphBuilder(5, True): k came first
            if isinstance(k, bool):
                use_sparse, k = k, None
            if k is not None:
                checks.fail("X", "be a torch.Tensor where k is given", repr(X), error=TypeError)
            k, X = X, None
        self._X: Tensor | None = X
        self.k = _checks.positive("k", 5 if k is None else k)
        self.use_sparse = checks.flag("use_sparse", use_sparse)
        self._laplacian: str | None = None

    def cosine_similarity(self) -> GraphBuilder:
        """S_ij = max(0, cos(x_i, x_j)), S_ii = 0 (the only similarity there is)."""
        return self

    def knn(self, k: int | None = None, sparse: bool | None = None) -> GraphBuilder:
        """Keep the k largest similarities of each pattern, symmetrised by the maximum."""
        if k is not None:
            self.k = _checks.positive("k", k)
        if sparse is not None:
            self.use_sparse = checks.flag("sparse", sparse)
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
        if self.k >= X.shape[0]:
            checks.fail("k", f"be less than the number of patterns, {X.shape[0]}", self.k)
        _checks.finite("X", X)
        points = X.detach()

        def build() -> BuiltGraph:
            similarity, index, _ = nearest(points[None], points[None], self.k, None, True)
            W = graph_of_lists(index[0], similarity[0].clamp(min=0.0), self.use_sparse)
            L = None
            if self._laplacian is not None:
                L = LaplacianBuilder(self._laplacian == "normalized").build(W)
            return BuiltGraph(W, degrees(W), index[0], L)

        return _kept.make(X.device.type, build)
