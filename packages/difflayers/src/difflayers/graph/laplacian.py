"""Graph Laplacians of a symmetric adjacency, dense or sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks


def degrees(A: Tensor) -> Tensor:
    """Row sums (N,) of a dense or ``sparse_coo`` adjacency."""
    return torch.sparse.sum(A, 1).to_dense() if A.is_sparse else A.sum(-1)


def inverse_roots(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """D^(-1/2), and the diagonal of the normalised Laplacian: both are 0 where the degree is 0."""
    alive = degrees > 0
    return torch.where(alive, degrees, 1.0).rsqrt() * alive, alive.to(degrees.dtype)


def _check(A: Tensor) -> None:
    checks.floating("A", A, may_be_sparse=True)
    checks.shape("A", A, (A.shape[-1], A.shape[-1]), "(N, N)")


def _from_diagonal(diagonal: Tensor, A: Tensor) -> Tensor:
    """diag(diagonal) - A in A's layout."""
    if not A.is_sparse:
        return torch.diag(diagonal) - A
    N = A.shape[0]
    A = A.coalesce()
    here = torch.arange(N, device=A.device)
    index = torch.cat((torch.stack((here, here)), A.indices()), 1)
    values = torch.cat((diagonal, -A.values()))
    return torch.sparse_coo_tensor(index, values, (N, N), check_invariants=False).coalesce()


def compute_laplacian(A: Tensor) -> Tensor:
    """L = D - A with D = diag(A 1). Its spectrum lies in [0, 2 d_max].

    Args:
        A: (N, N) symmetric adjacency, dense or ``sparse_coo``.
    """
    _check(A)
    return _from_diagonal(degrees(A), A)


def compute_normalized_laplacian(A: Tensor) -> Tensor:
    """L = D^(-1/2) (D - A) D^(-1/2). Its spectrum lies in [0, 2]; an isolated node has a zero row.

    Args:
        A: (N, N) symmetric adjacency, dense or ``sparse_coo``.
    """
    _check(A)
    scale, diagonal = inverse_roots(degrees(A))
    if A.is_sparse:
        A = A.coalesce()
        i, j = A.indices()
        values = A.values() * scale[i] * scale[j]
        A = torch.sparse_coo_tensor(A.indices(), values, A.shape, check_invariants=False)
        A = A.coalesce()
    else:
        A = scale[:, None] * A * scale[None, :]
    return _from_diagonal(diagonal, A)
