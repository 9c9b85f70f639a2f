"""Backward kernels of attention to a list of neighbours: dq by state, dk and dv by stored pattern.

A stored pattern finds the states that see it in an inverted list, so nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import math
from shared_kernels.triton.arguments import units

from .._call import LogSumExp, NeighbourAttention, NeighbourSum
from .forward import LOG2E, launch_neighbour_sum, tile_sizes


@triton.jit(do_not_specialize=["n_q", "n_k", "n_list", "n_heads"])
def _neighbour_attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    top_ptr,
    lse_ptr,
    delta_ptr,
    do_ptr,
    dq_ptr,
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
    i_row = i_bh * n_q + i_q
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_DV)
    m_d = o_d < D
    m_v = o_v < D_V
    # load
    # [BLOCK_D], [BLOCK_DV]
    b_q = tl.load(q_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32) * factor
    b_do = tl.load(do_ptr + i_row * D_V + o_v, mask=m_v, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + i_row)
    lse = tl.load(lse_ptr + i_row)
    delta = tl.load(delta_ptr + i_row)
    b_dq = tl.zeros([BLOCK_D], tl.float32)
    # loop
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
        # [BLOCK_K, BLOCK_DV]
        b_v = tl.load(
            v_ptr + row[:, None] * D_V + o_v[None, :],
            mask=m_k[:, None] & m_v[None, :],
            other=0.0,
        ).to(tl.float32)
        b_s = tl.where(m_k, tl.sum(b_q[None, :] * b_k, 1), float("-inf"))
        b_ds = tl.exp2((b_s - top) * unit - lse) * (tl.sum(b_do[None, :] * b_v, 1) - delta)
        b_dq += tl.sum(tl.where(m_k, b_ds, 0.0)[:, None] * b_k, 0)
    # store; unit holds log2(e), the gradient does not
    b_dq = b_dq * (factor * unit * 0.6931471805599453)
    tl.store(dq_ptr + i_row * D + o_d, math.cast(b_dq, dq_ptr.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_heads"])
def _neighbour_attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    crow_ptr,
    state_ptr,
    top_ptr,
    lse_ptr,
    delta_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    factor,
    unit,
    n_heads,
    n_q,
    n_k,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the stored pattern and the head of this program
    i_k = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // n_heads
    i_row = i_bh * n_k + i_k
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_DV)
    m_d = o_d < D
    m_v = o_v < D_V
    # load
    # [BLOCK_D], [BLOCK_DV]
    b_k = tl.load(k_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + i_row * D_V + o_v, mask=m_v, other=0.0).to(tl.float32)
    start = tl.load(crow_ptr + i_b * n_k + i_k)
    stop = tl.load(crow_ptr + i_b * n_k + i_k + 1)
    b_dk = tl.zeros([BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_DV], tl.float32)
    # loop
    for i_e in range(start, stop, BLOCK_K):
        o_e = tl.cast(i_e, tl.int64) + tl.arange(0, BLOCK_K)
        m_e = o_e < stop
        # [BLOCK_K]
        row = i_bh * n_q + tl.load(state_ptr + o_e, mask=m_e, other=0)
        b_top = tl.load(top_ptr + row, mask=m_e, other=0.0)
        b_lse = tl.load(lse_ptr + row, mask=m_e, other=float("inf"))
        b_delta = tl.load(delta_ptr + row, mask=m_e, other=0.0)
        # [BLOCK_K, BLOCK_D]
        b_q = tl.load(
            q_ptr + row[:, None] * D + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0
        ).to(tl.float32)
        # [BLOCK_K, BLOCK_DV]
        b_do = tl.load(
            do_ptr + row[:, None] * D_V + o_v[None, :],
            mask=m_e[:, None] & m_v[None, :],
            other=0.0,
        ).to(tl.float32)
        b_s = tl.sum(b_q * b_k[None, :], 1) * factor
        b_p = tl.exp2((b_s - b_top) * unit - b_lse)
        b_ds = b_p * (tl.sum(b_do * b_v[None, :], 1) - b_delta)
        b_dk += tl.sum(b_ds[:, None] * b_q, 0)
        b_dv += tl.sum(b_p[:, None] * b_do, 0)
    # store
    b_dk = b_dk * (factor * unit * 0.6931471805599453)
    tl.store(dk_ptr + i_row * D + o_d, math.cast(b_dk, dk_ptr.dtype.element_ty), mask=m_d)
    tl.store(dv_ptr + i_row * D_V + o_v, math.cast(b_dv, dv_ptr.dtype.element_ty), mask=m_v)


def invert(index: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """index (B, L, K), -1 = empty -> (crow (B S + 1,), states (B L K,)): who sees each pattern.

    Empty slots are sorted behind everything; the order within a pattern is that of the states.
    """
    B, L, K = index.shape
    first = torch.arange(B, device=index.device).view(B, 1, 1) * S
    key = torch.where(index >= 0, index + first, B * S).flatten()
    key, order = key.sort(stable=True)
    states = (order // K) % L
    crow = torch.searchsorted(key, torch.arange(B * S + 1, device=index.device))
    return crow, states


def launch_neighbour_sum_backward(
    call: NeighbourSum, saved: None, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    return call.gradients(launch_neighbour_sum, d_out, needs)


def launch_neighbour_attention_backward(
    call: NeighbourAttention, saved: LogSumExp, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, index, d_out = (
        x.contiguous() for x in (call.q, call.k, call.v, call.neighbours, d_out)
    )
    B, H, L, _ = q.shape
    S, K = k.shape[2], index.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    found = {"q": dq, "k": dk, "v": dv}
    if 0 in (B, H, L, S):
        return {field: x.zero_() for field, x in found.items()}
    # [B, H, L]
    delta = (d_out.float() * saved.out.float()).sum(-1)
    crow, states = invert(index, S)
    factor, unit = units(call.scale)
    numbers, tiles = (factor, unit * LOG2E, H, L, S), tile_sizes(call)
    _neighbour_attention_dq_kernel[(L, B * H)](
        *(q, k, v, index, saved.top, saved.lse, delta, d_out, dq),
        *(*numbers, K),
        **tiles,
    )
    _neighbour_attention_dkdv_kernel[(S, B * H)](
        *(q, k, v, crow, states, saved.top, saved.lse, delta, d_out, dk, dv),
        *numbers,
        **tiles,
    )
    return found
