"""Candidates for nearest neighbours: the smallest y_j - x_i . k_j of each row, found in one sweep.

A program owns BLOCK_Q queries and keeps their KEEP best candidates on chip. Of each tile of keys
it takes the row minimum again and again, as long as one row of the program still finds something
better than the worst it holds: about KEEP log(M) times in all. No sort, no top-k, no N x M matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from . import configs, tiles
from .dot import dot_acc

# Products per fp32 number: "tf32x3" is three tensor-core passes on NVIDIA.
_PRECISION = {"cuda": "tf32x3"}
LARGEST_KEEP = 64
LARGEST_D = 256
# Features per product: whole rows of three-pass fp32 operands would spill.
_CHUNK = 32


@triton.jit(do_not_specialize=["n_q", "n_k", "first"])
def _knn_forward_kernel(
    x_ptr,
    k_ptr,
    y_ptr,
    best_ptr,
    index_ptr,
    n_q,
    n_k,
    first,
    D: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the tile of queries of this program: rows first + i_q * BLOCK_Q .. of the keys, if these are
    # the queries, too
    i_q = tl.program_id(0).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_s = tl.arange(0, KEEP)
    # [BLOCK_Q, KEEP]
    b_best = tl.full([BLOCK_Q, KEEP], float("inf"), tl.float32)
    b_index = tl.zeros([BLOCK_Q, KEEP], tl.int32)
    # [BLOCK_Q]
    b_worst = tl.max(b_best, 1)
    for i_k in range(tl.cdiv(n_k, BLOCK_K)):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        b_s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for i_d in range(D // BLOCK_D):
            # [BLOCK_Q, BLOCK_D]
            p_x, p_k = x_ptr + i_d * BLOCK_D, k_ptr + i_d * BLOCK_D
            b_x = tiles.load_tile(p_x, i_q * BLOCK_Q, n_q, D, BLOCK_Q, BLOCK_D, BLOCK_D)
            # [BLOCK_K, BLOCK_D]
            b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, D, BLOCK_K, BLOCK_D, BLOCK_D)
            b_s = dot_acc(b_x, tl.trans(b_k), b_s, PRECISION)
        # [BLOCK_K]: keys that are not there are infinitely far
        b_y = tiles.load_row(y_ptr, i_k * BLOCK_K, n_k, BLOCK_K, other=float("inf"))
        b_s = b_y[None, :] - b_s
        if EXCLUDE_SELF:
            b_s = tl.where((first + o_q)[:, None] == o_k[None, :], float("inf"), b_s)
        # [BLOCK_Q]
        b_least = tl.min(b_s, 1)
        n_better = tl.sum((b_least < b_worst).to(tl.int32), 0)
        while n_better > 0:
            b_better = b_least < b_worst
            # the first column with the least value, the first slot with the worst
            b_column = tl.min(tl.where(b_s == b_least[:, None], o_k[None, :], 2147483647), 1)
            b_slot = tl.min(tl.where(b_best == b_worst[:, None], o_s[None, :], KEEP), 1)
            m_slot = b_better[:, None] & (o_s[None, :] == b_slot[:, None])
            b_best = tl.where(m_slot, b_least[:, None], b_best)
            b_index = tl.where(m_slot, b_column[:, None], b_index)
            m_taken = b_better[:, None] & (o_k[None, :] == b_column[:, None])
            b_s = tl.where(m_taken, float("inf"), b_s)
            b_worst = tl.max(b_best, 1)
            b_least = tl.min(b_s, 1)
            n_better = tl.sum((b_least < b_worst).to(tl.int32), 0)
    o_o = o_q[:, None] * KEEP + o_s[None, :]
    m_o = (o_q < n_q)[:, None]
    tl.store(best_ptr + o_o, b_best, mask=m_o)
    tl.store(index_ptr + o_o, b_index, mask=m_o)


def why_not(x: Tensor, y: Tensor, n_keep: int) -> str | None:
    """Why the kernel cannot search rows of x among those of y, or None; the dtype is not asked."""
    if n_keep > LARGEST_KEEP:
        return f"it keeps at most {LARGEST_KEEP} candidates per row, {n_keep} are asked for"
    if x.shape[1] > LARGEST_D:
        return f"it takes at most {LARGEST_D} dimensions, got {x.shape[1]}"
    if y.shape[0] >= 2**31:
        return "its indices are int32"
    return device.triton_why_not(x, y)


def launch_knn_forward(
    x: Tensor, keys: Tensor, y: Tensor, n_keep: int, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """The (at least n_keep) smallest y_j - x_i . keys_j of each row, in no order.

    Args:
        x: (N, D) fp32. keys: (M, D) fp32. y: (M,) fp32, contiguous.
        n_keep: at most M; rounded up to a power of two.
        first: row i of x is key first + i and not its own candidate; None excludes nothing.

    Returns:
        values (N, keep) fp32, inf where there were fewer keys, and columns (N, keep) int64.
    """
    (N, D), M = x.shape, keys.shape[0]
    keep = max(16, triton.next_power_of_2(n_keep))
    best = torch.empty(N, keep, dtype=torch.float32, device=x.device)
    index = torch.empty(N, keep, dtype=torch.int32, device=x.device)
    if N == 0:
        return best, index.long()
    BLOCK_D = min(_CHUNK, max(16, triton.next_power_of_2(D)))
    padded = triton.cdiv(D, BLOCK_D) * BLOCK_D
    if padded > D:
        x, keys = (torch.nn.functional.pad(t, (0, padded - D)) for t in (x, keys))
    x, keys = x.contiguous(), keys.contiguous()
    where = device.target(x)
    meta = configs.KNN_FORWARD.pick(where, D).meta()
    grid = (triton.cdiv(N, meta["BLOCK_Q"]),)
    _knn_forward_kernel[grid](
        x,
        keys,
        y,
        best,
        index,
        N,
        M,
        0 if first is None else first,
        D=padded,
        KEEP=keep,
        BLOCK_D=BLOCK_D,
        EXCLUDE_SELF=first is not None,
        PRECISION=_PRECISION.get(where.backend, "ieee"),
        **meta,
    )
    return best, index.long()
