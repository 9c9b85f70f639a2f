"""Forward kernels: sums over graph neighbours, and attention to a list of neighbours.

Both gather rows by index and sum in fp32; nothing of size N x N exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton import math
from shared_kernels.triton.arguments import units

from .._call import LogSumExp, NeighbourAttention, NeighbourSum
from . import configs

LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["n_columns"])
def _neighbour_sum_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    val_ptr,
    out_ptr,
    stride_xn,
    stride_xd,
    n_columns,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # the pattern and the columns of this program
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < n_columns
    # load
    start = tl.load(crow_ptr + i_n)
    stop = tl.load(crow_ptr + i_n + 1)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    # loop
    for i_e in range(start, stop, BLOCK_E):
        o_e = tl.cast(i_e, tl.int64) + tl.arange(0, BLOCK_E)
        m_e = o_e < stop
        # [BLOCK_E]
        b_col = tl.load(col_ptr + o_e, mask=m_e, other=0)
        b_val = tl.load(val_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
        # [BLOCK_E, BLOCK_D]
        b_x = tl.load(
            x_ptr + b_col[:, None] * stride_xn + o_d[None, :] * stride_xd,
            mask=m_e[:, None] & m_d[None, :],
            other=0.0,
        ).to(tl.float32)
        b_out += tl.sum(b_val[:, None] * b_x, 0)
    # store
    b_y = math.cast(b_out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_n * n_columns + o_d, b_y, mask=m_d)


def launch_neighbour_sum(call: NeighbourSum) -> Tensor:
    """W x for W in CSR; val is fp32."""
    x = call.x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    N, d = x.shape
    if out.numel() == 0:
        return out
    config = configs.NEIGHBOUR_SUM.pick(device.target(x), d)
    grid = (N, triton.cdiv(d, config["BLOCK_D"]))
    _neighbour_sum_kernel[grid](
        x, call.crow, call.col, call.val, out, x.stride(0), x.stride(1), d, **config.meta()
    )
    return out


@triton.jit(do_not_specialize=["n_q", "n_k", "n_list", "n_heads"])
def _neighbour_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    o_ptr,
    top_ptr,
    lse_ptr,
    factor,
    unit,
    n_heads,
    n_q,
    n_k,
    n_list,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the state and the head of this program
    i_q = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // n_heads
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_DV)
    m_d = o_d < D
    m_v = o_v < D_V
    # load
    # [BLOCK_D]
    b_q = tl.load(q_ptr + (i_bh * n_q + i_q) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_q = b_q * factor
    b_m = tl.full([BLOCK_K], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_K], tl.float32)
    b_o = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    # loop: every lane keeps a softmax of its own, joined at the end
    for i_k in range(0, n_list, BLOCK_K):
        o_k = tl.cast(i_k, tl.int64) + tl.arange(0, BLOCK_K)
        # [BLOCK_K]
        b_i = tl.load(index_ptr + (i_b * n_q + i_q) * n_list + o_k, mask=o_k < n_list, other=-1)
        m_k = b_i >= 0
        row = i_bh * n_k + tl.maximum(b_i, 0)
        # [BLOCK_K, BLOCK_D]
        b_k = tl.load(
            k_ptr + row[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
        ).to(tl.float32)
        b_s = tl.where(m_k, tl.sum(b_q[None, :] * b_k, 1), float("-inf"))
        b_new = tl.maximum(b_m, b_s, propagate_nan=tl.PropagateNan.ALL)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_keep = tl.exp2((b_m - b_base) * unit)
        b_p = tl.exp2((b_s - b_base) * unit)
        # [BLOCK_K, BLOCK_DV]
        b_v = tl.load(
            v_ptr + row[:, None] * D_V + o_v[None, :],
            mask=m_k[:, None] & m_v[None, :],
            other=0.0,
        ).to(tl.float32)
        b_sum = b_sum * b_keep + b_p
        b_o = b_o * b_keep[:, None] + b_p[:, None] * b_v
        b_m = b_new
    # epilogue
    top = tl.max(b_m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    b_w = tl.exp2((b_m - base) * unit)
    total = tl.sum(b_sum * b_w, 0)
    alive = tl.where(total == 0.0, 1.0, total)
    b_y = tl.sum(b_o * b_w[:, None], 0) / alive
    # store
    tl.store(
        o_ptr + (i_bh * n_q + i_q) * D_V + o_v, math.cast(b_y, o_ptr.dtype.element_ty), mask=m_v
    )
    lse = tl.where(total == 0.0, float("inf"), tl.log2(alive))
    tl.store(top_ptr + i_bh * n_q + i_q, base)
    tl.store(lse_ptr + i_bh * n_q + i_q, lse)


def tile_sizes(call: NeighbourAttention) -> dict[str, int]:
    """The constants of a launch for these head dims on this device, warps and stages included."""
    D, D_v = call.q.shape[3], call.v.shape[3]
    config = configs.NEIGHBOUR_ATTENTION.pick(device.target(call.q), max(D, D_v))
    return {
        "D": D,
        "D_V": D_v,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_DV": triton.next_power_of_2(D_v),
        **config.meta(),
    }


def launch_neighbour_attention_forward(call: NeighbourAttention) -> tuple[Tensor, LogSumExp]:
    """Attention of each state to its list, one program for each state and head."""
    q, k, v, index = (x.contiguous() for x in (call.q, call.k, call.v, call.neighbours))
    B, H, L, _ = q.shape
    out = torch.empty((B, H, L, v.shape[3]), dtype=q.dtype, device=q.device)
    top, lse = (torch.empty((B, H, L), dtype=torch.float32, device=q.device) for _ in range(2))
    factor, unit = units(call.scale)
    if out.numel() > 0:
        _neighbour_attention_forward_kernel[(L, B * H)](
            *(q, k, v, index, out, top, lse),
            *(factor, unit * LOG2E, H, L, k.shape[2], index.shape[2]),
            **tile_sizes(call),
        )
    return out, LogSumExp(out, top, lse)
