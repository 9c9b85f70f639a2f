"""Backward: queries and windows per query tile, keys per key tile, landmarks per list.

E = 2^(scale (s - top) - lse) without the factor M; dM_ij = E (dP - delta), dS = M dM. A window
moves the ramp: dw_i = sum over its keys of dM / R - sum over landmarks in the ramp of g dM / R.
Landmark gradients go to buffers by (split, list, slot) and are summed in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, math, tiles

from .._call import Attention, Normalized
from . import configs, keys
from .band import (
    DEAD,
    gather_rows,
    landmark_factor,
    list_range,
    row_limits,
    rows_at,
    window_factor,
    window_tiles,
)
from .launch import BackwardArguments


@triton.jit(do_not_specialize=["n_q"])
def _delta_kernel(
    o_ptr, do, delta_ptr, H, n_q, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr
):
    # which tile of queries of which head
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    p_do = rows_at(do, i_bh // H, i_bh % H)
    # load
    # [BLOCK_Q, BLOCK_D]
    b_o = tiles.load_tile(o_ptr + i_bh * n_q * D, i_q * BLOCK_Q, n_q, D, BLOCK_Q, D, BLOCK_D)
    b_do = tiles.load_tile(p_do, i_q * BLOCK_Q, n_q, do.stride_n, BLOCK_Q, D, BLOCK_D)
    # store
    # [BLOCK_Q]
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tiles.store_row(delta_ptr + i_bh * n_q, b_delta, i_q * BLOCK_Q, n_q, BLOCK_Q)


@triton.jit
def _dq_step(
    b_q, b_k, b_v, b_do, b_bias, b_m, b_top, b_lse, b_delta, b_dq, scale, PRECISION: tl.constexpr
):
    """(dq + dS k, dM) of a tile with factors b_m [Q, K]; b_bias [1, K] in units of products."""
    b_s = dot.dot(b_q, tl.trans(b_k), PRECISION) - b_top[:, None]
    if b_bias is not None:  # added to a large score, it would lose its digits
        b_s += b_bias
    b_x = b_s * scale - b_lse[:, None]
    b_e = tl.exp2(tl.where(b_m > 0.0, b_x, DEAD))
    b_dm = b_e * (dot.dot(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])
    b_ds = math.cast(b_dm * b_m, b_k.dtype)
    return dot.dot_acc(b_ds, b_k, b_dq, PRECISION), b_dm


@triton.jit(do_not_specialize=["n_q", "n_k", "n_lists", "n_slots"])
def _attention_dq_kernel(
    q,
    k,
    v,
    w_ptr,
    l_ptr,
    bias_ptr,
    start_ptr,
    list_ptr,
    do,
    top_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dw_ptr,
    scale,
    scale_dq,
    ramp,
    H,
    G,
    n_q,
    n_k,
    n_lists,
    n_slots,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # which tile of queries of which head
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_r = o_r < n_q
    b_p = o_r + (n_k - n_q)
    p_k = rows_at(k, i_b, i_h // G)
    p_v = rows_at(v, i_b, i_h // G)
    p_row = i_bh * n_q
    # load
    # [BLOCK_Q, BLOCK_D]
    p_q = rows_at(q, i_b, i_h)
    p_do = rows_at(do, i_b, i_h)
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
    b_do = tiles.load_tile(p_do, i_q * BLOCK_Q, n_q, do.stride_n, BLOCK_Q, D, BLOCK_D)
    # [BLOCK_Q]
    b_delta = tiles.load_row(delta_ptr + p_row, i_q * BLOCK_Q, n_q, BLOCK_Q)
    b_w = tiles.load_row(w_ptr + p_row, i_q * BLOCK_Q, n_q, BLOCK_Q)
    b_top = tiles.load_row(top_ptr + p_row, i_q * BLOCK_Q, n_q, BLOCK_Q)
    b_lse = tiles.load_row(lse_ptr + p_row, i_q * BLOCK_Q, n_q, BLOCK_Q)
    b_start, b_list = row_limits(start_ptr, list_ptr, o_r, m_r, HAS_STARTS, HAS_LISTS)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_dw = tl.zeros([BLOCK_Q], tl.float32)
    # loop over the window: edge tiles, tiles inside every row's window, diagonal tiles
    stop = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n_q) + (n_k - n_q)
    lo, f_0, hi = window_tiles(b_p, b_w, b_start, m_r, ramp, n_k, stop, BLOCK_K)
    for i_k in range(lo, f_0):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        # [BLOCK_K, BLOCK_D]
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, v.stride_n, BLOCK_K, D, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        b_m = window_factor(b_p[:, None], o_k[None, :], b_w[:, None], b_start[:, None], ramp)
        b_dq, b_dm = _dq_step(
            b_q, b_k, b_v, b_do, None, b_m, b_top, b_lse, b_delta, b_dq, scale, PRECISION
        )
        if HAS_DW:
            b_dw += tl.sum(tl.where((b_m > 0.0) & (b_m < 1.0), b_dm, 0.0), 1)
    for i_k in range(f_0, hi):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, v.stride_n, BLOCK_K, D, BLOCK_D)
        b_m = tl.where(b_p[:, None] >= o_k[None, :], 1.0, 0.0)
        b_dq, b_dm = _dq_step(
            b_q, b_k, b_v, b_do, None, b_m, b_top, b_lse, b_delta, b_dq, scale, PRECISION
        )
    # loop over the landmark lists of these rows
    c_0, c_1 = list_range(b_list, m_r, n_lists, HAS_LISTS)
    n_tiles = tl.cdiv(n_slots, BLOCK_K)
    for i_t in range(c_0 * n_tiles, c_1 * n_tiles):
        i_c = i_t // n_tiles
        o_l = (i_t - i_c * n_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_l = o_l < n_slots
        o_s = (i_bh * n_lists + i_c) * n_slots + o_l
        # [BLOCK_K]
        b_l = tl.load(l_ptr + o_s, mask=m_l, other=-1)
        b_bias = None
        if HAS_BIAS:
            b_bias = tl.load(bias_ptr + o_s, mask=m_l, other=0.0)[None, :]
        # [BLOCK_K, BLOCK_D]
        b_k = gather_rows(p_k, b_l, b_l >= 0, k.stride_n, D, BLOCK_D)
        b_v = gather_rows(p_v, b_l, b_l >= 0, v.stride_n, D, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        b_u = landmark_factor(b_p[:, None], b_l[None, :], b_w[:, None], b_start[:, None], ramp)
        if HAS_LISTS:
            b_u = tl.where((b_list == i_c)[:, None], b_u, 0.0)
        b_dq, b_dm = _dq_step(
            b_q, b_k, b_v, b_do, b_bias, b_u, b_top, b_lse, b_delta, b_dq, scale, PRECISION
        )
        if HAS_DW:
            b_dw -= tl.sum(tl.where((b_u > 0.0) & (b_u < 1.0), b_dm, 0.0), 1)
    # store
    p_dq = dq_ptr + p_row * D
    tiles.store_tile(p_dq, b_dq * scale_dq, i_q * BLOCK_Q, n_q, D, BLOCK_Q, D, BLOCK_D)
    if HAS_DW:
        tiles.store_row(dw_ptr + p_row, b_dw / ramp, i_q * BLOCK_Q, n_q, BLOCK_Q)


def launch_delta(a: BackwardArguments) -> Tensor:
    """(B, H, N_q): the sum of dO * O of each row."""
    delta = torch.empty(a.lse.shape, **a.fp32)
    config = configs.DELTA.pick(a.target, a.D)
    grid = (triton.cdiv(a.n_q, config["BLOCK_Q"]), a.B * a.H)
    _delta_kernel[grid](a.out, a.d_out, delta, a.H, a.n_q, **a.dims, **config.meta())
    return delta


def launch_dq(a: BackwardArguments, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the windows."""
    dq = torch.empty(a.out.shape, dtype=a.out.dtype, device=a.out.device)
    dw = torch.empty(a.windows.shape if a.with_windows else (0,), **a.fp32)
    config = a.config(configs.DQ, configs.DQ_FP32)
    _attention_dq_kernel[(triton.cdiv(a.n_q, config["BLOCK_Q"]), a.B * a.H)](
        a.q,
        a.k,
        a.v,
        a.windows,
        a.landmarks,
        a.gates(),
        a.start,
        a.lists,
        a.d_out,
        a.top,
        a.lse,
        delta,
        dq,
        dw,
        *a.numbers,
        *a.sizes,
        **a.dims,
        **a.flags,
        HAS_BIAS=a.bias is not None,
        HAS_DW=a.with_windows,
        **config.meta(),
    )
    return dq, dw


def launch_attention_backward(
    call: Attention, saved: Normalized, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    a = BackwardArguments(call, saved, d_out, "windows" in needs)
    if call.q.numel() == 0:
        return {field: torch.zeros_like(getattr(call, field)) for field in needs}
    delta = launch_delta(a)
    dq, dw = launch_dq(a, delta)
    dk, dv = keys.launch_dkdv(a, delta)
    found = {"q": dq, "windows": dw}
    if call.bias is not None:
        found["bias"] = torch.zeros_like(call.bias)
    if a.n_slots:
        l_dk, l_dv, l_db = keys.launch_landmarks(a, delta)
        keys.add_to_keys(a, (l_dk, l_dv), (dk, dv))
        if call.bias is not None:
            found["bias"] = l_db.sum(0).view(call.bias.shape)
    found |= {"k": dk.to(call.k.dtype), "v": dv.to(call.v.dtype)}
    return {field: found[field] for field in needs}
