"""From patterns to a symmetric kNN graph."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks

from .. import _checks


def build_similarity_matrix(X: Tensor) -> Tensor:
    """S_ij = max(0, cos(x_i, x_j)), S_ii = 0.

    Args:
        X: (N, d) floating, finite. A zero vector is similar to nothing.

    Returns:
        (N, N) in X's dtype. O(N^2 d) time, O(N^2) memory.
    """
    checks.floating("X", X)
    checks.shape("X", X, (None, None), "(N, d)")
    _checks.finite("X", X)
    Xn = torch.nn.functional.normalize(X, dim=-1)
    return (Xn @ Xn.mT).clamp(min=0.0).fill_diagonal_(0.0)


def build_knn_graph(S: Tensor, k: int, as_sparse: bool = False) -> Tensor:
    """Keep the k largest entries of each row of S, then A = max(M, M^T).

    Args:
        S: (N, N) similarities, diagonal 0.
        k: neighbours per row, 1 <= k < N.
        as_sparse: return a coalesced ``sparse_coo`` tensor of the same A.

    Returns:
        (N, N) symmetric adjacency.
    """
    checks.floating("S", S)
    N = S.shape[-1]
    checks.shape("S", S, (N, N), "(N, N)")
    checks.positive_int("k", k)
    if k >= N:
        checks.fail("k", f"be less than the number of patterns, {N}", k)
    values, index = S.topk(k, dim=-1)
    if not as_sparse:
        M = torch.zeros_like(S).scatter(-1, index, values)
        return torch.maximum(M, M.mT)
    return sparse_adjacency(index, values)


def mutual(index: Tensor) -> Tensor:
    """index (..., N, k) -> bool (..., N, k): is i a neighbour of its a-th neighbour, too?"""
    N, k = index.shape[-2:]
    back = index.gather(-2, index.flatten(-2).unsqueeze(-1).expand(*index.shape[:-2], N * k, k))
    here = torch.arange(N, device=index.device).repeat_interleave(k).unsqueeze(-1)
    return (back == here).any(-1).unflatten(-1, (N, k))


def sparse_adjacency(index: Tensor, values: Tensor) -> Tensor:
    """The symmetric adjacency of directed edges i -> index[i, a]; a mutual edge counts once."""
    N, k = index.shape
    i = torch.arange(N, device=index.device).repeat_interleave(k)
    j, v = index.flatten(), values.flatten()
    one_way = ~mutual(index).flatten()
    rows = torch.cat((i, j[one_way]))
    cols = torch.cat((j, i[one_way]))
    v = torch.cat((v, v[one_way]))
    index = torch.stack((rows, cols))
    return torch.sparse_coo_tensor(index, v, (N, N), check_invariants=False).coalesce()
