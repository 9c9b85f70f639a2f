"""From patterns to a symmetric kNN graph."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import checks

from .. import _checks, _kept


def unit(X: Tensor) -> Tensor:
    """Rows of X (..., d) at length 1 in float64 (float32 where a device has none); zeros stay.

    The largest entry comes out first: neither tiny nor huge rows leave the range of squares.
    """
    wide = X.to(torch.float32 if X.device.type == "mps" else torch.float64)
    if X.shape[-1] == 0:
        return wide
    largest = wide.detach().abs().amax(-1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)
    # at least 1 but for zeros
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=0.5)


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
    with _kept.full_precision(X.device.type):
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
    return adjacency(index, S.gather(-1, index), as_sparse)


def mutual(index: Tensor) -> Tensor:
    """index (..., N, k) -> bool (..., N, k): is i a neighbour of its a-th neighbour, too?"""
    N, k = index.shape[-2:]
    back = index.gather(-2, index.flatten(-2).unsqueeze(-1).expand(*index.shape[:-2], N * k, k))
    here = torch.arange(N, device=index.device).repeat_interleave(k).unsqueeze(-1)
    return (back == here).any(-1).unflatten(-1, (N, k))


def adjacency(index: Tensor, values: Tensor, as_sparse: bool) -> Tensor:
    """max(M, M^T) of the directed edges M[i, index[i, a]] = values[i, a]; M is 0 elsewhere."""
    N, k = index.shape
    if not as_sparse:
        M = values.new_zeros(N, N).scatter(-1, index, values)
        return torch.maximum(M, M.mT)
    i = torch.arange(N, device=index.device).unsqueeze(-1).expand(-1, k)
    # what the other row says: its own value, or 0 where it does not keep this one
    theirs = index[index]
    same = theirs == i.unsqueeze(-1)
    back = torch.where(same, values[index], 0.0).sum(-1)
    both = torch.maximum(values, back)
    one_way = ~same.any(-1)
    rows = torch.cat((i.flatten(), index[one_way]))
    cols = torch.cat((index.flatten(), i[one_way]))
    v = torch.cat((both.flatten(), both[one_way]))
    real = v != 0
    edges = torch.stack((rows[real], cols[real]))
    return torch.sparse_coo_tensor(edges, v[real], (N, N), check_invariants=False).coalesce()
