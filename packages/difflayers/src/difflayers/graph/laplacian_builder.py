"""LaplacianBuilder: which Laplacian, decided once."""

from __future__ import annotations

from torch import Tensor

from .laplacian import compute_laplacian, compute_normalized_laplacian


class LaplacianBuilder:
    """``LaplacianBuilder(normalized=True).build(W)`` -> D^(-1/2) (D - W) D^(-1/2), else D - W."""

    def __init__(self, normalized: bool = True) -> None:
        self.normalized = normalized

    def build(self, W: Tensor) -> Tensor:
        """The Laplacian of the adjacency W (N, N), in W's layout."""
        return compute_normalized_laplacian(W) if self.normalized else compute_laplacian(W)

    def __repr__(self) -> str:
        return f"LaplacianBuilder(normalized={self.normalized})"
