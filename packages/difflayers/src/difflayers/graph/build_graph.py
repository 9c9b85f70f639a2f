"""From patterns to a symmetric kNN graph."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.ops import full_precision

from .. import _checks
from .._nearest import unit


def build_similarity_matrix(X: Tensor) -> Tensor:
    """S_ij = max(0, cos(x_i, x_j)), S_ii = 0.

    Args:
        X: (N, d) floating, finite. A zero vector is similar to nothing.

    Returns:
        (N, N) in X's dtype, computed in float64. O(N^2 d) time, O(N^2) memory.
    """
    checks.floating("X", X)
    checks.shape("X", X, (None, None), "(N, d)")
    _checks.finite("X", X)
    with full_precision(X.device.type):
        Xn = unit(X)
        return (Xn @ Xn.mT).clamp(min=0.0).fill_diagonal_(0.0).to(X.dtype)


def build_knn_graph(S: Tensor, k: int, as_sparse: bool = False) -> Tensor:
    """Keep the k largest entries of each row of S, then A = max(M, M^T).

    An entry that neither row keeps is 0. Equal similarities are kept in the order of their columns.

    Args:
        S: (N, N) similarities, symmetric or not, of any sign; a row does not choose its diagonal.
        k: neighbours per row, 1 <= k < N.
        as_sparse: return a coalesced ``sparse_coo`` tensor of the same A, zeros left out.

    Returns:
        (N, N) symmetric adjacency.
    """
    checks.floating("S", S)
    N = S.shape[-1]
    checks.shape("S", S, (N, N), "(N, N)")
    k = _checks.positive("k", k)
    if k >= N:
        checks.fail("k", f"be less than the number of patterns, {N}", k)
    diagonal = torch.eye(N, dtype=torch.bool, device=S.device)
    others = S.detach().masked_fill(diagonal, -torch.inf)
    index = others.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return graph_of_lists(index, S.gather(-1, index), as_sparse)


def adjacency(index: Tensor, values: Tensor) -> Tensor:
    """max(M, M^T) (..., N, N) of the edges M[i, index[i, a]] = values[i, a]; M is 0 elsewhere."""
    M = values.new_zeros(*index.shape[:-1], index.shape[-2]).scatter(-1, index, values)
    return torch.maximum(M, M.mT)


def edges(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`adjacency` as (rows, columns, values) of the block-diagonal matrix of B items (B, N, k).

    Zeros are left out where values can be read; else they remain as edges without weight.
    """
    B, N, k = index.shape
    places = index.flatten(1).unsqueeze(-1).expand(-1, -1, k)
    here = torch.arange(N, device=index.device).view(1, N, 1, 1)
    # [B, N, k, k]: the neighbours of each neighbour, and whether they are the row itself
    returns = index.gather(1, places).unflatten(1, (N, k)) == here
    theirs = values.gather(1, places).unflatten(1, (N, k))
    both = torch.maximum(values, torch.where(returns, theirs, 0.0).sum(-1)).flatten()
    first = torch.arange(B, device=index.device).view(B, 1, 1) * N
    i = torch.arange(B * N, device=index.device).repeat_interleave(k)
    j = (index + first).flatten()
    # the neighbour's row has a mutual edge from its own list
    back = torch.where(returns.any(-1).flatten(), 0.0, both)
    rows, cols, v = torch.cat((i, j)), torch.cat((j, i)), torch.cat((both, back))
    if _checks.reads_values(v):
        real = v != 0
        rows, cols, v = rows[real], cols[real], v[real]
    return rows, cols, v


def graph_of_lists(index: Tensor, values: Tensor, as_sparse: bool) -> Tensor:
    """`adjacency` (N, N) of the lists (N, k) of one item, dense or a coalesced ``sparse_coo``."""
    if not as_sparse:
        return adjacency(index, values)
    N = index.shape[0]
    rows, cols, v = edges(index[None], values[None])
    places = torch.stack((rows, cols))
    return torch.sparse_coo_tensor(places, v, (N, N), check_invariants=False).coalesce()
