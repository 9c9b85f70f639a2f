"""Lazy attention: weights relu(p + tau / i) with p = softmax(scores + bias by distance), causal.

The gradient of a score, ds = p (m dw - delta) with m = [weight > 0] and delta = sum p m dw, is as
dense as p: nothing is skipped but the future. delta needs no pass of its own: with
a = sum of the active values, o = sum m p v + (tau / i) a, so delta = do . o - (tau / i) do . a,
where o is not yet rounded: all of a row shares the error of its delta.

Scores are the products of queries and keys as they are, and biases in their unit; `unit` makes
powers of 2 of their differences. The log2-sum-exp2 of a row is kept above its largest score.
"""

from __future__ import annotations

import math as scalars
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.configs import Table
from shared_kernels.triton import dot, math, tiles
from shared_kernels.triton.arguments import Rows, units

from .._call import ActiveSums, Lazy
from . import configs
from .problem import Pairs, Sequences, Solved, blocks, in_units
from .scores import (
    DEAD,
    HIDDEN,
    LOWEST,
    edit_scores,
    head_of,
    head_pointers,
    load_rows,
    query_program,
    rows_at,
    sequence_of,
)
from .weights import LN_2

LENGTHS = ["N", "window", "n_tiles", "n_bands"]


@triton.jit
def _elastic_scores(
    b_q,
    b_k,
    first_q,
    first_k,
    factor,
    p_line,
    window,
    head,
    IS_TRANSPOSED: tl.constexpr = False,
):
    """Scores with the bias of each pair's distance, HIDDEN if not visible.

    -> [BLOCK_Q, BLOCK_K], or [BLOCK_K, BLOCK_Q] if IS_TRANSPOSED
    """
    o_q = first_q + tl.arange(0, b_q.shape[0])
    o_k = first_k + tl.arange(0, b_k.shape[0])
    if IS_TRANSPOSED:
        q_at, k_at = o_q[None, :], o_k[:, None]
        b_s = dot.dot(b_k, tl.trans(b_q)) * factor
    else:
        q_at, k_at = o_q[:, None], o_k[None, :]
        b_s = dot.dot(b_q, tl.trans(b_k)) * factor
    if first_q - (first_k + b_k.shape[0] - 1) <= window:  # a pair of the tile has a bias
        distance = q_at - k_at
        near = (distance >= 0) & (distance <= window)
        b_s += tl.load(p_line + distance, mask=near, other=0.0)
    return edit_scores(b_s, q_at, k_at, first_q, first_k, head, True)


@triton.jit
def _elastic_weights(b_s, b_top, b_lse, b_lift, unit):
    """p, and relu(p + lift), which is 0 for a hidden pair whatever the lift."""
    b_p = tl.exp2((b_s - b_top) * unit - b_lse)
    return b_p, tl.where(b_s == HIDDEN, 0.0, math.relu(b_p + b_lift))


@triton.jit(do_not_specialize=LENGTHS)
def _lazy_forward_kernel(
    q,
    k,
    v,
    mask,
    line_ptr,
    tau_ptr,
    sequences_ptr,
    o_ptr,
    top_ptr,
    lse_ptr,
    sums_ptr,
    factor,
    unit,
    window,
    H,
    G,
    N,
    n_tiles,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """top and lse, then o = sum w v; with `sums_ptr` o unrounded, and the sum of active v."""
    i_q, i_b, i_h = query_program(n_tiles, H)
    _, n, _ = sequence_of(i_b, N, N, sequences_ptr)
    first_q = i_q * BLOCK_Q
    if first_q >= n:
        return
    p_q, p_k, p_v = head_pointers(q, k, v, i_b, i_h, G, 0)
    head = head_of(mask, None, None, i_b, i_h, 0, n, n, None)
    p_line = line_ptr + i_h * (window + 1)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, first_q, n, q.stride_n, BLOCK_Q, D, BLOCK_D)
    high = tl.cdiv(tl.minimum(first_q + BLOCK_Q, n), BLOCK_K)

    # log-sum-exp
    b_top = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    for i_k in range(high):
        first_k = i_k * BLOCK_K
        # [BLOCK_K, BLOCK_D]
        b_k = tiles.load_tile(p_k, first_k, n, k.stride_n, BLOCK_K, D, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        b_s = _elastic_scores(b_q, b_k, first_q, first_k, factor, p_line, window, head)
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_sum *= tl.exp2((b_top - b_new) * unit)
        b_sum += tl.sum(tl.exp2((b_s - b_new[:, None]) * unit), 1)
        b_top = b_new
    b_lse = tl.where(b_sum == 0.0, DEAD, tl.log2(b_sum))
    b_lift = _lift(tau_ptr, i_h, first_q, BLOCK_Q)

    # output
    b_o = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    if sums_ptr is not None:
        b_active = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for i_k in range(high):
        first_k = i_k * BLOCK_K
        # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
        b_k = tiles.load_tile(p_k, first_k, n, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, first_k, n, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
        b_s = _elastic_scores(b_q, b_k, first_q, first_k, factor, p_line, window, head)
        b_p, b_w = _elastic_weights(b_s, b_top[:, None], b_lse[:, None], b_lift[:, None], unit)
        b_o = dot.dot_acc(b_w.to(b_v.dtype), b_v, b_o)
        if sums_ptr is not None:
            b_active = dot.dot_acc(tl.where(b_w > 0.0, 1.0, 0.0).to(b_v.dtype), b_v, b_active)
    row = (i_b * H + i_h) * N
    tiles.store_tile(o_ptr + row * D_V, b_o, first_q, n, D_V, BLOCK_Q, D_V, BLOCK_DV)
    if lse_ptr is not None:
        tiles.store_row(top_ptr + row, b_top, first_q, n, BLOCK_Q)
        tiles.store_row(lse_ptr + row, b_lse, first_q, n, BLOCK_Q)
    if sums_ptr is not None:
        p_sums = sums_ptr + row * 2 * D_V
        tiles.store_tile(p_sums, b_o, first_q, n, 2 * D_V, BLOCK_Q, D_V, BLOCK_DV)
        tiles.store_tile(p_sums + D_V, b_active, first_q, n, 2 * D_V, BLOCK_Q, D_V, BLOCK_DV)


@triton.jit
def _lift(tau_ptr, i_h, first_q, BLOCK_Q: tl.constexpr):
    """tau / i for the queries from first_q on, counted from 1. -> [BLOCK_Q]"""
    return tl.load(tau_ptr + i_h) / (first_q + tl.arange(0, BLOCK_Q) + 1).to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def _lazy_dq_backward_kernel(
    q,
    k,
    v,
    mask,
    line_ptr,
    tau_ptr,
    sequences_ptr,
    do,
    rows,
    dq_ptr,
    factor,
    unit,
    window,
    H,
    G,
    N,
    n_tiles,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq = scale sum p (m dw - delta) k."""
    i_q, i_b, i_h = query_program(n_tiles, H)
    _, n, _ = sequence_of(i_b, N, N, sequences_ptr)
    first_q = i_q * BLOCK_Q
    if first_q >= n:
        return
    p_q, p_k, p_v = head_pointers(q, k, v, i_b, i_h, G, 0)
    p_do = rows_at(do, i_b, i_h, 0)
    head = head_of(mask, None, None, i_b, i_h, 0, n, n, None)
    p_line = line_ptr + i_h * (window + 1)
    row = (i_b * H + i_h) * N
    # [BLOCK_Q, BLOCK_D] and [BLOCK_Q, BLOCK_DV]
    b_q = tiles.load_tile(p_q, first_q, n, q.stride_n, BLOCK_Q, D, BLOCK_D)
    b_do = tiles.load_tile(p_do, first_q, n, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
    b_top, b_lse, b_delta = load_rows(rows, row, first_q, n, BLOCK_Q)
    b_lift = _lift(tau_ptr, i_h, first_q, BLOCK_Q)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for i_k in range(tl.cdiv(tl.minimum(first_q + BLOCK_Q, n), BLOCK_K)):
        first_k = i_k * BLOCK_K
        # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
        b_k = tiles.load_tile(p_k, first_k, n, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, first_k, n, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
        # [BLOCK_Q, BLOCK_K]
        b_s = _elastic_scores(b_q, b_k, first_q, first_k, factor, p_line, window, head)
        b_p, b_w = _elastic_weights(b_s, b_top[:, None], b_lse[:, None], b_lift[:, None], unit)
        b_dw = tl.where(b_w > 0.0, dot.dot(b_do, tl.trans(b_v)), 0.0)
        b_ds = b_p * (b_dw - b_delta[:, None])
        b_dq = dot.dot_acc(b_ds.to(b_k.dtype), b_k, b_dq)
    tiles.store_tile(
        dq_ptr + row * D, b_dq * (factor * unit * LN_2), first_q, n, D, BLOCK_Q, D, BLOCK_D
    )


@triton.jit(do_not_specialize=LENGTHS)
def _lazy_dkdv_backward_kernel(
    q,
    k,
    v,
    mask,
    line_ptr,
    tau_ptr,
    sequences_ptr,
    do,
    rows,
    dk_ptr,
    dv_ptr,
    factor,
    unit,
    window,
    H,
    G,
    N,
    n_tiles,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dv = sum w do, dk = scale sum p (m dw - delta) q, over the query heads that share the key."""
    i_k = tl.program_id(0) % n_tiles
    i_bg = (tl.program_id(0) // n_tiles).to(tl.int64)
    H_kv = H // G
    i_b, i_g = i_bg // H_kv, i_bg % H_kv
    _, n, _ = sequence_of(i_b, N, N, sequences_ptr)
    first_k = i_k * BLOCK_K
    if first_k >= n:
        return
    # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
    b_k = tiles.load_tile(rows_at(k, i_b, i_g, 0), first_k, n, k.stride_n, BLOCK_K, D, BLOCK_D)
    b_v = tiles.load_tile(rows_at(v, i_b, i_g, 0), first_k, n, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for g in range(G):
        i_h = i_g * G + g
        p_q, p_do = rows_at(q, i_b, i_h, 0), rows_at(do, i_b, i_h, 0)
        head = head_of(mask, None, None, i_b, i_h, 0, n, n, None)
        p_line = line_ptr + i_h * (window + 1)
        row = (i_b * H + i_h) * N
        for i_q in range(first_k // BLOCK_Q, tl.cdiv(n, BLOCK_Q)):
            first_q = i_q * BLOCK_Q
            # [BLOCK_Q, BLOCK_D] and [BLOCK_Q, BLOCK_DV]
            b_q = tiles.load_tile(p_q, first_q, n, q.stride_n, BLOCK_Q, D, BLOCK_D)
            b_do = tiles.load_tile(p_do, first_q, n, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
            b_top, b_lse, b_delta = load_rows(rows, row, first_q, n, BLOCK_Q)
            b_lift = _lift(tau_ptr, i_h, first_q, BLOCK_Q)
            # [BLOCK_K, BLOCK_Q]
            b_s = _elastic_scores(b_q, b_k, first_q, first_k, factor, p_line, window, head, True)
            b_p, b_w = _elastic_weights(b_s, b_top[None, :], b_lse[None, :], b_lift[None, :], unit)
            b_dv = dot.dot_acc(b_w.to(b_do.dtype), b_do, b_dv)
            b_dw = tl.where(b_w > 0.0, dot.dot(b_v, tl.trans(b_do)), 0.0)
            b_ds = b_p * (b_dw - b_delta[None, :])
            b_dk = dot.dot_acc(b_ds.to(b_q.dtype), b_q, b_dk)
    b_dk *= factor * unit * LN_2
    row = i_bg * N
    tiles.store_tile(dk_ptr + row * D, b_dk, first_k, n, D, BLOCK_K, D, BLOCK_D)
    tiles.store_tile(dv_ptr + row * D_V, b_dv, first_k, n, D_V, BLOCK_K, D_V, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def _lazy_dbias_backward_kernel(
    q,
    k,
    v,
    mask,
    line_ptr,
    tau_ptr,
    sequences_ptr,
    do,
    rows,
    part_ptr,
    factor,
    unit,
    window,
    H,
    G,
    N,
    n_bands,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of ds over the pairs of equal distance in band e: tiles (i_q, i_q - e), all summed up.

    Their distances are BLOCK_Q e + r - c: those with r >= c belong to block e of the bias, the
    others to block e - 1. Tiles are square.
    """
    i_e = tl.program_id(0) % n_bands
    i_bh = (tl.program_id(0) // n_bands).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    _, n, _ = sequence_of(i_b, N, N, sequences_ptr)
    p_q, p_k, p_v = head_pointers(q, k, v, i_b, i_h, G, 0)
    p_do = rows_at(do, i_b, i_h, 0)
    head = head_of(mask, None, None, i_b, i_h, 0, n, n, None)
    p_line = line_ptr + i_h * (window + 1)
    # [BLOCK_Q, BLOCK_K]
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i_q in range(i_e, tl.cdiv(n, BLOCK_Q)):
        first_q, first_k = i_q * BLOCK_Q, (i_q - i_e) * BLOCK_K
        # [BLOCK_Q, BLOCK_D], [BLOCK_Q, BLOCK_DV], [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
        b_q = tiles.load_tile(p_q, first_q, n, q.stride_n, BLOCK_Q, D, BLOCK_D)
        b_do = tiles.load_tile(p_do, first_q, n, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
        b_k = tiles.load_tile(p_k, first_k, n, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, first_k, n, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
        b_top, b_lse, b_delta = load_rows(rows, i_bh * N, first_q, n, BLOCK_Q)
        b_lift = _lift(tau_ptr, i_h, first_q, BLOCK_Q)
        b_s = _elastic_scores(b_q, b_k, first_q, first_k, factor, p_line, window, head)
        b_p, b_w = _elastic_weights(b_s, b_top[:, None], b_lse[:, None], b_lift[:, None], unit)
        b_dw = tl.where(b_w > 0.0, dot.dot(b_do, tl.trans(b_v)), 0.0)
        b_sum += b_p * (b_dw - b_delta[:, None])
    # Column x collects the pairs with (r - c) mod BLOCK_K = x.
    o_r, o_x = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    b_sum = tl.gather(b_sum, (o_r - o_x + BLOCK_K) % BLOCK_K, 1)
    p_part = part_ptr + (i_bh * n_bands + i_e) * 2 * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(p_part, tl.sum(tl.where(o_r >= o_x, b_sum, 0.0), 0))
    tl.store(p_part + BLOCK_K, tl.sum(tl.where(o_r >= o_x, 0.0, b_sum), 0))


def _arguments(call: Lazy) -> dict[str, Any]:
    """What every kernel takes."""
    B, H, N, D = call.q.shape
    D_v = call.v.shape[-1]
    factor, unit = units(call.scale)
    return {
        "q": Rows.of(call.q),
        "k": Rows.of(call.k),
        "v": Rows.of(call.v),
        "mask": Pairs.of(call.mask, (B, H, N, N)),
        "line_ptr": in_units(call.bias, unit),
        "tau_ptr": call.tau.detach().float().contiguous(),
        "sequences_ptr": Sequences.of(call.q, call.varlen, None).table,
        "factor": factor,
        "unit": unit / scalars.log(2),
        "window": call.window_size,
        "H": H,
        "G": H // call.k.shape[1],
        "N": N,
        "D": D,
        "D_V": D_v,
        "BLOCK_D": blocks(D),
        "BLOCK_DV": blocks(D_v),
    }


def _pick(half: Table, exact: Table, q: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """The meta-parameters, and how many tiles of each kind cover the sequence."""
    table = exact if q.dtype == torch.float32 else half
    config = table.pick(device.target(q), max(q.shape[-1], v.shape[-1]))
    n_tiles = {name: triton.cdiv(q.shape[2], config[name]) for name in ("BLOCK_Q", "BLOCK_K")}
    return config.meta(), n_tiles


def launch_lazy_forward(call: Lazy) -> tuple[Tensor, ActiveSums]:
    """o, top and lse; if ``save`` o before it is rounded, and the sum of the active values."""
    q, v, save = call.q, call.v, call.save
    B, H, N, _ = q.shape
    o = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.zeros((B, H, N) if save else (0,), device=q.device)
    top = torch.zeros_like(lse)
    sums = torch.zeros((B, H, N, 2, v.shape[-1]) if save else (0,), device=q.device)
    if o.numel() == 0:
        return o, ActiveSums(top, lse, sums)
    meta, n_tiles = _pick(configs.LAZY_FORWARD, configs.LAZY_FORWARD_FP32, q, v)
    _lazy_forward_kernel[(n_tiles["BLOCK_Q"] * B * H,)](
        **_arguments(call),
        o_ptr=o,
        top_ptr=top if save else None,
        lse_ptr=lse if save else None,
        sums_ptr=sums if save else None,
        n_tiles=n_tiles["BLOCK_Q"],
        **meta,
    )
    return o, ActiveSums(top, lse, sums)


def launch_lazy_backward(
    call: Lazy, saved: ActiveSums, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k, v, bias and tau."""
    q, k, v, bias, tau, varlen = call.q, call.k, call.v, call.bias, call.tau, call.varlen
    B, H, N, _ = q.shape
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_bias, d_tau = (torch.zeros(x.shape, device=x.device) for x in (bias, tau))
    if d_out.numel() == 0:
        zeros = d_bias.to(bias.dtype), d_tau.to(tau.dtype)
        return dict(zip(("q", "k", "v", "bias", "tau"), (dq, dk, dv, *zeros), strict=True))
    at = torch.arange(N, device=q.device)
    # What comes in for a row of padding may be anything.
    inside = None if varlen is None else at < varlen.to(q.device).view(B, 1, 1)
    along_o, along = torch.linalg.vecdot(d_out.float()[..., None, :], saved.sums).unbind(-1)
    along = along / (at + 1)
    if inside is not None:
        along = along.masked_fill(~inside, 0.0)
    arguments = {
        **_arguments(call),
        "do": Rows.of(d_out),
        "rows": Solved(saved.top, saved.lse, along_o - tau.float()[:, None] * along),
    }
    meta, n_tiles = _pick(configs.LAZY_DQ, configs.LAZY_DQ_FP32, q, v)
    _lazy_dq_backward_kernel[(n_tiles["BLOCK_Q"] * B * H,)](
        **arguments, dq_ptr=dq, n_tiles=n_tiles["BLOCK_Q"], **meta
    )
    meta, n_tiles = _pick(configs.LAZY_DKDV, configs.LAZY_DKDV_FP32, q, v)
    _lazy_dkdv_backward_kernel[(n_tiles["BLOCK_K"] * B * k.shape[1],)](
        **arguments, dk_ptr=dk, dv_ptr=dv, n_tiles=n_tiles["BLOCK_K"], **meta
    )
    meta, n_tiles = _pick(configs.LAZY_DBIAS, configs.LAZY_DBIAS_FP32, q, v)
    BLOCK = meta["BLOCK_K"]
    n_bands = triton.cdiv(min(call.window_size + 1, N), BLOCK) + 1
    parts = torch.empty(B, H, n_bands, 2, BLOCK, device=q.device)
    _lazy_dbias_backward_kernel[(n_bands * B * H,)](
        **arguments, part_ptr=parts, n_bands=n_bands, **meta
    )
    own, of_the_next = parts.sum(0).unbind(2)
    line = (own[:, :-1] + of_the_next[:, 1:]).flatten(1)[:, : call.window_size + 1]
    d_bias[:, : line.shape[1]] = line
    d_tau = along.sum((0, 2)).to(tau.dtype)
    return {"q": dq, "k": dk, "v": dv, "bias": d_bias.to(bias.dtype), "tau": d_tau}
