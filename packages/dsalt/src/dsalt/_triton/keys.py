"""Gradients of keys and values: per key tile from the windows, per list from the landmarks.

Landmark gradients go to buffers by (split, list, slot) and are summed in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, math, tiles

from . import configs
from .band import DEAD, gather_rows, landmark_factor, rows_at, window_factor
from .launch import BackwardArguments

ROWS_PER_SPLIT = 1024  # queries per program where one list of landmarks serves them all


@triton.jit
def _load_rows(
    p_top, p_lse, p_delta, p_w, start_ptr, i_r, n, BLOCK_Q: tl.constexpr, HAS_STARTS: tl.constexpr
):
    """top, lse, delta, window and first visible key of rows i_r.. -> [BLOCK_Q] each."""
    b_top = tiles.load_row(p_top, i_r, n, BLOCK_Q)
    # rows beyond n get the weight 2^-1e30 = 0
    b_lse = tiles.load_row(p_lse, i_r, n, BLOCK_Q, 1.0e30)
    b_delta = tiles.load_row(p_delta, i_r, n, BLOCK_Q)
    b_w = tiles.load_row(p_w, i_r, n, BLOCK_Q)
    b_start = tl.zeros([BLOCK_Q], tl.int32)
    if HAS_STARTS:
        b_start = tiles.load_row(start_ptr, i_r, n, BLOCK_Q, 0)
    return b_top, b_lse, b_delta, b_w, b_start


@triton.jit
def _dkdv_step(
    b_q,
    b_k,
    b_v,
    b_do,
    b_bias,
    b_m,
    b_top,
    b_lse,
    b_delta,
    b_dk,
    b_dv,
    scale,
    PRECISION: tl.constexpr,
):
    """(dk, dv, dS) after a tile with factors b_m [K, Q]; b_bias [K, 1] in units of products."""
    b_s = dot.dot(b_k, tl.trans(b_q), PRECISION) - b_top[None, :]
    if b_bias is not None:  # added to a large score, it would lose its digits
        b_s += b_bias
    b_x = b_s * scale - b_lse[None, :]
    b_e = tl.exp2(tl.where(b_m > 0.0, b_x, DEAD)) * b_m
    b_dv = dot.dot_acc(math.cast(b_e, b_do.dtype), b_do, b_dv, PRECISION)
    b_ds = b_e * (dot.dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :])
    b_dk = dot.dot_acc(math.cast(b_ds, b_q.dtype), b_q, b_dk, PRECISION)
    return b_dk, b_dv, b_ds


@triton.jit(do_not_specialize=["n_q", "n_k", "n_lists", "n_slots", "n_tiles"])
def _attention_dkdv_kernel(
    q,
    k,
    v,
    w_ptr,
    start_ptr,
    do,
    top_ptr,
    lse_ptr,
    delta_ptr,
    reach_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    scale_dk,
    ramp,
    H,
    G,
    n_q,
    n_k,
    n_tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # which tile of keys of which key head; the rows that may see the tile end at reach
    i_k = tl.program_id(0)
    i_bg = tl.program_id(1).to(tl.int64)
    H_kv = H // G
    i_b, i_g = i_bg // H_kv, i_bg % H_kv
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    # load
    # [BLOCK_K, BLOCK_D]
    p_k = rows_at(k, i_b, i_g)
    p_v = rows_at(v, i_b, i_g)
    b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
    b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, v.stride_n, BLOCK_K, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    # loop over the query heads that share these keys, and their rows
    q_0 = tl.maximum(i_k * BLOCK_K - (n_k - n_q), 0) // BLOCK_Q
    for i_j in range(G):
        i_h = i_g * G + i_j
        i_bh = i_b * H + i_h
        p_row = i_bh * n_q
        p_q = rows_at(q, i_b, i_h)
        p_do = rows_at(do, i_b, i_h)
        q_1 = tl.cdiv(tl.load(reach_ptr + i_bh * n_tiles + i_k), BLOCK_Q)
        for i_q in range(q_0, q_1):
            o_r = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
            b_p = o_r + (n_k - n_q)
            # [BLOCK_Q, BLOCK_D]
            b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
            b_do = tiles.load_tile(p_do, i_q * BLOCK_Q, n_q, do.stride_n, BLOCK_Q, D, BLOCK_D)
            # [BLOCK_Q]
            b_top, b_lse, b_delta, b_w, b_start = _load_rows(
                top_ptr + p_row,
                lse_ptr + p_row,
                delta_ptr + p_row,
                w_ptr + p_row,
                start_ptr,
                i_q * BLOCK_Q,
                n_q,
                BLOCK_Q,
                HAS_STARTS,
            )
            # [BLOCK_K, BLOCK_Q]
            b_m = window_factor(b_p[None, :], o_k[:, None], b_w[None, :], b_start[None, :], ramp)
            b_dk, b_dv, b_ds = _dkdv_step(
                b_q,
                b_k,
                b_v,
                b_do,
                None,
                b_m,
                b_top,
                b_lse,
                b_delta,
                b_dk,
                b_dv,
                scale,
                PRECISION,
            )
    # store
    p_out = i_bg * n_k * D
    p_dk, p_dv = dk_ptr + p_out, dv_ptr + p_out
    tiles.store_tile(p_dk, b_dk * scale_dk, i_k * BLOCK_K, n_k, D, BLOCK_K, D, BLOCK_D)
    tiles.store_tile(p_dv, b_dv, i_k * BLOCK_K, n_k, D, BLOCK_K, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_lists", "n_slots", "n_splits"])
def _landmark_dkdv_kernel(
    q,
    k,
    v,
    w_ptr,
    l_ptr,
    bias_ptr,
    start_ptr,
    first_ptr,
    do,
    top_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    db_ptr,
    scale,
    scale_dk,
    ramp,
    H,
    G,
    n_q,
    n_k,
    n_lists,
    n_slots,
    n_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # which tile of slots of which list, and which part of the rows that use the list
    i_cs = tl.program_id(0)
    i_c, i_s = i_cs // n_splits, i_cs % n_splits
    i_l = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    r_0, r_1 = tl.load(first_ptr + i_c), tl.load(first_ptr + i_c + 1)
    span = tl.cdiv(tl.cdiv(r_1 - r_0, n_splits), BLOCK_Q) * BLOCK_Q
    r_0 += i_s * span
    r_1 = tl.minimum(r_1, r_0 + span)
    o_l = i_l * BLOCK_K + tl.arange(0, BLOCK_K)
    m_l = o_l < n_slots
    o_s = (i_bh * n_lists + i_c) * n_slots + o_l
    # load
    # [BLOCK_K]
    b_l = tl.load(l_ptr + o_s, mask=m_l, other=-1)
    b_bias = None
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_s, mask=m_l, other=0.0)[:, None]
    # [BLOCK_K, BLOCK_D]
    p_k = rows_at(k, i_b, i_h // G)
    p_v = rows_at(v, i_b, i_h // G)
    b_k = gather_rows(p_k, b_l, b_l >= 0, k.stride_n, D, BLOCK_D)
    b_v = gather_rows(p_v, b_l, b_l >= 0, v.stride_n, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_db = tl.zeros([BLOCK_K], tl.float32)
    p_row = i_bh * n_q
    p_q = rows_at(q, i_b, i_h)
    p_do = rows_at(do, i_b, i_h)
    # loop over the rows
    for i_q in range(tl.cdiv(tl.maximum(r_1 - r_0, 0), BLOCK_Q)):
        i_r = r_0 + i_q * BLOCK_Q
        o_r = i_r + tl.arange(0, BLOCK_Q)
        b_p = o_r + (n_k - n_q)
        # [BLOCK_Q, BLOCK_D]
        b_q = tiles.load_tile(p_q, i_r, r_1, q.stride_n, BLOCK_Q, D, BLOCK_D)
        b_do = tiles.load_tile(p_do, i_r, r_1, do.stride_n, BLOCK_Q, D, BLOCK_D)
        # [BLOCK_Q]
        b_top, b_lse, b_delta, b_w, b_start = _load_rows(
            top_ptr + p_row,
            lse_ptr + p_row,
            delta_ptr + p_row,
            w_ptr + p_row,
            start_ptr,
            i_r,
            r_1,
            BLOCK_Q,
            HAS_STARTS,
        )
        # [BLOCK_K, BLOCK_Q]
        b_u = landmark_factor(b_p[None, :], b_l[:, None], b_w[None, :], b_start[None, :], ramp)
        b_dk, b_dv, b_ds = _dkdv_step(
            b_q,
            b_k,
            b_v,
            b_do,
            b_bias,
            b_u,
            b_top,
            b_lse,
            b_delta,
            b_dk,
            b_dv,
            scale,
            PRECISION,
        )
        if HAS_BIAS:
            b_db += tl.sum(b_ds, 1)
    # store
    p_out = ((i_s * tl.num_programs(2) + i_bh) * n_lists + i_c) * n_slots
    p_dk, p_dv = dk_ptr + p_out * D, dv_ptr + p_out * D
    tiles.store_tile(p_dk, b_dk * scale_dk, i_l * BLOCK_K, n_slots, D, BLOCK_K, D, BLOCK_D)
    tiles.store_tile(p_dv, b_dv, i_l * BLOCK_K, n_slots, D, BLOCK_K, D, BLOCK_D)
    if HAS_BIAS:
        tiles.store_row(db_ptr + p_out, b_db, i_l * BLOCK_K, n_slots, BLOCK_K)


def _reach(a: BackwardArguments, tile: int) -> Tensor:
    """(B, H, key tiles) int32: behind the last row whose window may touch the tile."""
    windows, device = a.windows, a.windows.device
    row = torch.arange(a.n_q, device=device)
    back = (windows + a.ramp).clamp(max=1e9).ceil().to(torch.int64)
    first = torch.maximum(row + (a.n_k - a.n_q) - back + 1, a.start)
    n_tiles = triton.cdiv(a.n_k, tile)
    reach = torch.zeros(a.B, a.H, n_tiles, dtype=torch.int64, device=device)
    reach.scatter_reduce_(-1, first // tile, (row + 1).expand(windows.shape), "amax")
    return reach.cummax(-1).values.to(torch.int32)


def launch_dkdv(a: BackwardArguments, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values from the windows; fp32 if landmarks are to be added."""
    k = a.k.ptr
    dtype = torch.float32 if a.n_slots else k.dtype
    dk, dv = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
    config = a.config(configs.DKDV, configs.DKDV_FP32)
    n_tiles = triton.cdiv(a.n_k, config["BLOCK_K"])
    reach = _reach(a, config["BLOCK_K"])
    _attention_dkdv_kernel[(n_tiles, a.B * a.H_kv)](
        a.q,
        a.k,
        a.v,
        a.windows,
        a.start,
        a.d_out,
        a.top,
        a.lse,
        delta,
        reach,
        dk,
        dv,
        *a.key_numbers,
        *a.sizes[:4],
        n_tiles,
        **a.dims,
        **a.key_flags,
        **config.meta(),
    )
    return dk, dv


def launch_landmarks(a: BackwardArguments, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Landmark gradients by (split, b, h, list, slot): of keys, values and gates."""
    config = a.config(configs.LANDMARKS, configs.LANDMARKS_FP32)
    n_splits = 1 if a.block else max(1, min(64, a.n_q // ROWS_PER_SPLIT))
    lists = torch.arange(a.n_lists + 1, dtype=torch.int32, device=a.lse.device)
    first = torch.searchsorted(a.lists, lists, out_int32=True)
    shape = (n_splits, a.B, a.H, a.n_lists, a.n_slots)
    dk, dv = (torch.empty((*shape, a.D), **a.fp32) for _ in range(2))
    db = torch.empty(shape if a.bias is not None else (0,), **a.fp32)
    grid = (a.n_lists * n_splits, triton.cdiv(a.n_slots, config["BLOCK_K"]), a.B * a.H)
    _landmark_dkdv_kernel[grid](
        a.q,
        a.k,
        a.v,
        a.windows,
        a.landmarks,
        a.gates(),
        a.start,
        first,
        a.d_out,
        a.top,
        a.lse,
        delta,
        dk,
        dv,
        db,
        *a.key_numbers,
        *a.sizes,
        n_splits,
        **a.dims,
        **a.key_flags,
        HAS_BIAS=a.bias is not None,
        **config.meta(),
    )
    return dk, dv, db


def add_to_keys(
    a: BackwardArguments, parts: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor]
) -> None:
    """Add the landmarks' gradients to their keys: index_put sorts, so the order is fixed."""
    slot_of = a.landmarks.view(a.B, a.H, -1).to(torch.int64)
    row = torch.arange(a.B * a.H, device=slot_of.device).view(a.B, a.H, 1)
    row = row // a.H * a.H_kv + row % a.H // (a.H // a.H_kv)
    index = (row * a.n_k + slot_of.clamp(min=0)).reshape(-1)  # empty slots add zeros to key 0
    for part, total in zip(parts, sums, strict=True):
        total.view(-1, a.D).index_put_((index,), part.sum(0).view(-1, a.D), accumulate=True)
