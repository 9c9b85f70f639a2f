"""Attention backward from top, theta and delta = do . o2: dq and alpha by rows, dk, dv by columns.

ds = u (dp - delta) is the gradient of a score; that of the bias is ds summed over the pairs that
share an entry. With a tile list the longest columns are split into parts, whose sums are added up
in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.qpower import phi
from shared_kernels.triton import dot, threshold, tiles
from shared_kernels.triton.arguments import Rows

from .._call import SQUARE, Attention, Tiles, per_head_sums
from . import configs
from .problem import LENGTHS, Problem, Solved, lists, problem
from .scores import (
    cap_slope,
    exponent_of,
    head_of,
    head_pointers,
    key_range,
    keys_to_visit,
    list_of,
    load_rows,
    query_program,
    query_range,
    rows_at,
    sequence_of,
    tile_at,
    tile_scores,
    tiles_per_side,
)
from .weights import SMALLEST_S, weight_pair

# One column in COLUMNS_PER_SPLIT is split, the longest first, where there are LONG_COLUMN squares.
LONG_COLUMN, COLUMNS_PER_SPLIT, PARTS = 16, 16, 8
_OF_SEQUENCES = ("sequences_ptr", "N_q", "N_k", "batch_step")


@triton.jit(do_not_specialize=LENGTHS)
def _dq_backward_kernel(
    q,
    k,
    v,
    do,
    mask,
    bias,
    alpha_ptr,
    slopes_ptr,
    sequences_ptr,
    rows,
    visits,
    dq_ptr,
    ds_ptr,
    d_slope_ptr,
    s,
    factor,
    unit,
    window,
    softcap,
    H,
    G,
    N_q,
    N_k,
    batch_step,
    n_tiles,
    n_squares,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
):
    """dq = scale sum u (dp - delta) k.

    And what has a pointer, per row: ds = -sum h (dp - delta), d_slope = -sum u (dp - delta)
    |distance|.
    """
    i_q, i_s, i_h = query_program(n_tiles, H)
    start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr)
    first_q = i_q * BLOCK_Q
    if first_q >= n_q:
        return
    i_b, i_sh = i_s * batch_step, i_s * H + i_h
    s, p = exponent_of(alpha_ptr, i_h, s)
    head = head_of(mask, bias, slopes_ptr, i_b, i_h, start, n_q, n_k, window, softcap)
    p_q, p_k, p_v = head_pointers(q, k, v, i_b, i_h, G, start)
    p_do = rows_at(do, i_b, i_h, start)
    row = (i_b * H + i_h) * N_q + start
    p_list, low, high = keys_to_visit(
        visits, i_sh, i_q, n_tiles, n_squares, head, BLOCK_Q, BLOCK_K, IS_CAUSAL
    )
    # [BLOCK_Q, BLOCK_D] and [BLOCK_Q, BLOCK_DV]
    b_q = tiles.load_tile(p_q, first_q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
    b_do = tiles.load_tile(p_do, first_q, n_q, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
    b_top, b_theta, b_delta = load_rows(rows, row, first_q, n_q, BLOCK_Q)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if ds_ptr is not None:
        b_ds = tl.zeros([BLOCK_Q], tl.float32)
    if d_slope_ptr is not None:
        b_d_slope = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(low, high):
        first_k = tile_at(p_list, t, BLOCK_K) * BLOCK_K
        # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
        b_k = tiles.load_tile(p_k, first_k, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, first_k, n_k, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
        # [BLOCK_Q, BLOCK_K]
        b_s, b_c = tile_scores(b_q, b_k, first_q, first_k, factor, head, IS_CAUSAL)
        b_g, b_y = weight_pair(b_s, b_top[:, None], b_theta[:, None], s, p, unit, P, FAST)
        b_dp = dot.dot(b_do, tl.trans(b_v)) - b_delta[:, None]
        b_ds_k = b_g * b_dp
        if softcap is not None:
            b_ds_k *= cap_slope(b_c, softcap)
        b_dq = dot.dot_acc(b_ds_k.to(b_k.dtype), b_k, b_dq)
        if ds_ptr is not None:
            b_ds -= tl.sum(threshold.curvature(b_y, b_g, s, FAST) * b_dp, 1)
        if d_slope_ptr is not None:
            o_q, o_k = first_q + tl.arange(0, BLOCK_Q), first_k + tl.arange(0, BLOCK_K)
            distance = tl.abs(o_q[:, None] + (n_k - n_q) - o_k[None, :]).to(tl.float32)
            b_d_slope -= tl.sum(b_g * b_dp * distance, 1)
    tiles.store_tile(dq_ptr + row * D, b_dq * (factor * unit), first_q, n_q, D, BLOCK_Q, D, BLOCK_D)
    if ds_ptr is not None:
        tiles.store_row(ds_ptr + row, b_ds, first_q, n_q, BLOCK_Q)
    if d_slope_ptr is not None:
        tiles.store_row(d_slope_ptr + row, b_d_slope, first_q, n_q, BLOCK_Q)


@triton.jit
def _column_part(order_ptr, i_g, i_program, n_columns, n_split, n_parts, BLOCK_K: tl.constexpr):
    """The longest columns in parts, then the others whole: tile, part, parts, rank."""
    n_each = tiles_per_side(BLOCK_K)
    n_first = n_split * n_parts * n_each
    if i_program < n_first:
        rank, part, parts = i_program // (n_parts * n_each), i_program // n_each % n_parts, n_parts
    else:
        rank, part, parts = n_split + (i_program - n_first) // n_each, 0, 1
    column = tl.load(order_ptr + i_g * n_columns + rank)
    return column * n_each + i_program % n_each, part, parts, rank


@triton.jit(do_not_specialize=[*LENGTHS, "n_split", "n_parts"])
def _dkdv_backward_kernel(
    q,
    k,
    v,
    do,
    mask,
    bias,
    alpha_ptr,
    slopes_ptr,
    sequences_ptr,
    rows,
    visits,
    order_ptr,
    dk_ptr,
    dv_ptr,
    dk_part_ptr,
    dv_part_ptr,
    s,
    factor,
    unit,
    window,
    softcap,
    H,
    G,
    N_q,
    N_k,
    batch_step,
    n_tiles,
    n_squares,
    n_split,
    n_parts,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
):
    """dv = sum p do, dk = scale sum u (dp - delta) q, over the query heads that share the key."""
    n_each = tiles_per_side(BLOCK_K)
    n_programs = n_tiles + n_split * (n_parts - 1) * n_each
    i_program = tl.program_id(0) % n_programs
    i_sg = (tl.program_id(0) // n_programs).to(tl.int64)
    H_kv = H // G
    i_s, i_g = i_sg // H_kv, i_sg % H_kv
    if visits is None:
        i_k, part, parts, rank = i_program, 0, 1, 0
    else:
        i_k, part, parts, rank = _column_part(
            order_ptr,
            i_sg,
            i_program,
            n_tiles // n_each,
            n_split,
            n_parts,
            BLOCK_K,
        )
    start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr)
    first_k = i_k * BLOCK_K
    if first_k >= n_k:
        return
    i_b = i_s * batch_step
    p_k, p_v = rows_at(k, i_b, i_g, start), rows_at(v, i_b, i_g, start)
    # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
    b_k = tiles.load_tile(p_k, first_k, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
    b_v = tiles.load_tile(p_v, first_k, n_k, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for g in range(G):
        i_h = i_g * G + g
        s_h, p_h = exponent_of(alpha_ptr, i_h, s)
        head = head_of(mask, bias, slopes_ptr, i_b, i_h, start, n_q, n_k, window, softcap)
        p_q, p_do = rows_at(q, i_b, i_h, start), rows_at(do, i_b, i_h, start)
        row = (i_b * H + i_h) * N_q + start
        if visits is None:
            p_list = None
            low, high = query_range(i_k, head, BLOCK_Q, BLOCK_K, IS_CAUSAL)
        else:
            p_list, first, last = list_of(
                visits, i_s * H + i_h, i_k, n_tiles, n_squares, BLOCK_K, BLOCK_Q
            )
            low = first + (last - first) * part // parts
            high = first + (last - first) * (part + 1) // parts
        for t in range(low, high):
            first_q = tile_at(p_list, t, BLOCK_Q) * BLOCK_Q
            # [BLOCK_Q, BLOCK_D] and [BLOCK_Q, BLOCK_DV]
            b_q = tiles.load_tile(p_q, first_q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
            b_do = tiles.load_tile(p_do, first_q, n_q, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
            b_top, b_theta, b_delta = load_rows(rows, row, first_q, n_q, BLOCK_Q)
            # [BLOCK_K, BLOCK_Q]
            b_s, b_c = tile_scores(b_q, b_k, first_q, first_k, factor, head, IS_CAUSAL, True)
            b_g, b_y = weight_pair(b_s, b_top[None, :], b_theta[None, :], s_h, p_h, unit, P, FAST)
            b_dv = dot.dot_acc(b_y.to(b_do.dtype), b_do, b_dv)
            b_dp = dot.dot(b_v, tl.trans(b_do)) - b_delta[None, :]
            b_dp *= b_g
            if softcap is not None:
                b_dp *= cap_slope(b_c, softcap)
            b_dk = dot.dot_acc(b_dp.to(b_q.dtype), b_q, b_dk)
    b_dk *= factor * unit
    if parts > 1:
        # Tile of the partial sums: [sequence and key head, rank, part, tile of the column].
        at = ((i_sg * n_split + rank) * n_parts + part) * tiles_per_side(BLOCK_K) + i_k % n_each
        tiles.store_tile(dk_part_ptr + at * BLOCK_K * D, b_dk, 0, BLOCK_K, D, BLOCK_K, D, BLOCK_D)
        tiles.store_tile(
            dv_part_ptr + at * BLOCK_K * D_V, b_dv, 0, BLOCK_K, D_V, BLOCK_K, D_V, BLOCK_DV
        )
    else:
        row = (i_b * H_kv + i_g) * N_k + start
        tiles.store_tile(dk_ptr + row * D, b_dk, first_k, n_k, D, BLOCK_K, D, BLOCK_D)
        tiles.store_tile(dv_ptr + row * D_V, b_dv, first_k, n_k, D_V, BLOCK_K, D_V, BLOCK_DV)


@triton.jit(do_not_specialize=["N_q", "N_k", "n_columns", "n_split", "n_parts"])
def _join_backward_kernel(
    part_ptr,
    order_ptr,
    sequences_ptr,
    out_ptr,
    H_kv,
    N_q,
    N_k,
    batch_step,
    n_columns,
    n_split,
    n_parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A split column of dk or dv: the sum of its parts, in their order."""
    n_each = tiles_per_side(BLOCK_K)
    i_tile, i_rank = tl.program_id(0) % n_each, tl.program_id(0) // n_each % n_split
    i_sg = (tl.program_id(0) // (n_each * n_split)).to(tl.int64)
    start, n_q, n_k = sequence_of(i_sg // H_kv, N_q, N_k, sequences_ptr)
    i_k = tl.load(order_ptr + i_sg * n_columns + i_rank) * n_each + i_tile
    if i_k * BLOCK_K >= n_k:
        return
    b_x = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for part in range(n_parts):
        at = ((i_sg * n_split + i_rank) * n_parts + part) * n_each + i_tile
        # [BLOCK_K, BLOCK_D]
        b_x += tiles.load_tile(part_ptr + at * BLOCK_K * D, 0, BLOCK_K, D, BLOCK_K, D, BLOCK_D)
    row = ((i_sg // H_kv) * batch_step * H_kv + i_sg % H_kv) * N_k + start
    tiles.store_tile(out_ptr + row * D, b_x, i_k * BLOCK_K, n_k, D, BLOCK_K, D, BLOCK_D)


@triton.jit(do_not_specialize=[*LENGTHS, "n_shared", "share_h"])
def _dbias_backward_kernel(
    q,
    k,
    v,
    do,
    mask,
    bias,
    alpha_ptr,
    slopes_ptr,
    sequences_ptr,
    rows,
    squares_ptr,
    out_ptr,
    s,
    factor,
    unit,
    window,
    softcap,
    H,
    G,
    N_q,
    N_k,
    batch_step,
    n_tiles,
    n_squares,
    n_shared,
    share_h,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_K: tl.constexpr,
):
    """ds = u (dp - delta), summed over the sequences, heads, queries or keys that share a bias.

    A program owns a tile of the bias and walks all that share it: `n_shared` sequences times
    heads, and all queries if SUM_Q, all keys if SUM_K.
    """
    n_each_q, n_each_k = tiles_per_side(BLOCK_Q), tiles_per_side(BLOCK_K)
    i_tile, i_q, i_k = tl.program_id(0), 0, 0
    if not SUM_K:
        i_tile, i_k = (
            i_tile // (n_squares * n_each_k),
            i_tile % (n_squares * n_each_k),
        )
    if not SUM_Q:
        i_tile, i_q = i_tile // n_tiles, i_tile % n_tiles
    n_cells_h = H // share_h
    i_cs, i_ch = (i_tile // n_cells_h).to(tl.int64), (i_tile % n_cells_h).to(tl.int64)
    # [BLOCK_Q, BLOCK_K]
    b_ds = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i in range(n_shared):
        i_s = i_cs * (n_shared // share_h) + i // share_h
        i_h = i_ch * share_h + i % share_h
        start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr)
        i_b = i_s * batch_step
        s_h, p_h = exponent_of(alpha_ptr, i_h, s)
        head = head_of(mask, bias, slopes_ptr, i_b, i_h, start, n_q, n_k, window, softcap)
        p_q, p_k, p_v = head_pointers(q, k, v, i_b, i_h, G, start)
        p_do = rows_at(do, i_b, i_h, start)
        row = (i_b * H + i_h) * N_q + start
        if SUM_Q:
            low, high = query_range(i_k, head, BLOCK_Q, BLOCK_K, IS_CAUSAL)
        else:
            low, high = key_range(i_q, head, BLOCK_Q, BLOCK_K, IS_CAUSAL)
            if not SUM_K:
                low, high = tl.maximum(low, i_k), tl.minimum(high, i_k + 1)
        for t in range(low, high):
            if SUM_Q:
                t_q, t_k = t, i_k
            else:
                t_q, t_k = i_q, t
            first_q, first_k = t_q * BLOCK_Q, t_k * BLOCK_K
            visit = (first_q < n_q) & (first_k < n_k)
            if squares_ptr is not None:
                square = (i_s * H + i_h) * (n_tiles // n_each_q) + t_q // n_each_q
                flag = tl.load(
                    squares_ptr + square * n_squares + t_k // n_each_k,
                    mask=visit,
                    other=0,
                )
                visit = flag != 0
            if visit:
                # [BLOCK_Q, BLOCK_D], [BLOCK_Q, BLOCK_DV], [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
                b_q = tiles.load_tile(p_q, first_q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
                b_do = tiles.load_tile(p_do, first_q, n_q, do.stride_n, BLOCK_Q, D_V, BLOCK_DV)
                b_k = tiles.load_tile(p_k, first_k, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
                b_v = tiles.load_tile(p_v, first_k, n_k, v.stride_n, BLOCK_K, D_V, BLOCK_DV)
                b_top, b_theta, b_delta = load_rows(rows, row, first_q, n_q, BLOCK_Q)
                # [BLOCK_Q, BLOCK_K]
                b_s, _ = tile_scores(b_q, b_k, first_q, first_k, factor, head, IS_CAUSAL)
                b_g, b_y = weight_pair(
                    b_s, b_top[:, None], b_theta[:, None], s_h, p_h, unit, P, FAST
                )
                b_ds += b_g * (dot.dot(b_do, tl.trans(b_v)) - b_delta[:, None])
    # A tile of packed sequences must not reach into the next one; elsewhere the rest is 0.
    start, n_q, n_k = sequence_of(i_cs, N_q, N_k, sequences_ptr)
    n_q = tl.where(batch_step == 0, n_q, N_q)
    n_k = tl.where(batch_step == 0, n_k, N_k)
    row = i_cs * batch_step * n_cells_h + i_ch
    if SUM_Q:
        tiles.store_row(out_ptr + row * N_k + start, tl.sum(b_ds, 0), i_k * BLOCK_K, n_k, BLOCK_K)
    elif SUM_K:
        tiles.store_row(out_ptr + row * N_q + start, tl.sum(b_ds, 1), i_q * BLOCK_Q, n_q, BLOCK_Q)
    else:
        o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        p_out = out_ptr + (row * N_q + start) * N_k + start
        p_out += o_q.to(tl.int64)[:, None] * N_k + o_k[None, :]
        tl.store(p_out, b_ds, mask=(o_q < n_q)[:, None] & (o_k < n_k)[None, :])


def _launch_dq_backward(
    given: Problem,
    from_above: dict[str, Any],
    dq: Tensor,
    ds: Tensor | None,
    d_slope: Tensor | None,
    squares: Tensor,
) -> None:
    edited = configs.DQ_EDITED if given.call.softcap is None else configs.DQ_CAPPED
    config = given.pick(configs.DQ, edited, configs.DQ_FP32)
    _dq_backward_kernel[given.grid_of_queries(config)](
        **given.arguments,
        **given.values,
        **from_above,
        visits=lists(squares != 0) if given.call.square else None,
        dq_ptr=dq,
        ds_ptr=ds,
        d_slope_ptr=d_slope,
        n_tiles=given.n_tiles(config),
        n_squares=given.n_squares[1],
        **config.meta(),
    )


def _launch_dkdv_backward(
    given: Problem, from_above: dict[str, Any], dk: Tensor, dv: Tensor, squares: Tensor
) -> None:
    config = given.pick(configs.DKDV, configs.DKDV_EDITED, configs.DKDV_FP32)
    n_rows, n_columns = given.n_squares
    n_groups, split = given.sequences.n * dk.shape[1], SQUARE // config["BLOCK_K"]
    visits = order = None
    n_split, n_parts = 0, 1
    if given.call.square:
        visits = lists((squares != 0).transpose(-1, -2))
        n_visits = visits.offsets.diff().view(n_groups, -1, n_columns).sum(1)
        order = torch.argsort(n_visits, dim=-1, descending=True, stable=True).int()
        if n_rows * given.arguments["G"] >= LONG_COLUMN:
            n_split, n_parts = triton.cdiv(n_columns, COLUMNS_PER_SPLIT), PARTS
    # Without a split they are empty, of one type all the same: one kernel serves both.
    shape = (n_groups, n_split, n_parts, SQUARE)
    parts = [torch.empty(*shape, x.shape[-1], device=x.device) for x in (dk, dv)]
    n_tiles = n_columns * split
    grid = ((n_tiles + n_split * (n_parts - 1) * split) * n_groups,)
    _dkdv_backward_kernel[grid](
        **given.arguments,
        **given.values,
        **from_above,
        visits=visits,
        order_ptr=order,
        dk_ptr=dk,
        dv_ptr=dv,
        dk_part_ptr=parts[0],
        dv_part_ptr=parts[1],
        n_tiles=n_tiles,
        n_squares=n_rows,
        n_split=n_split,
        n_parts=n_parts,
        **config.meta(),
    )
    if n_split == 0:
        return
    for x, part in zip((dk, dv), parts, strict=True):
        D = x.shape[-1]
        _join_backward_kernel[(n_groups * n_split * split,)](
            part,
            order,
            out_ptr=x,
            **{name: given.arguments[name] for name in _OF_SEQUENCES},
            H_kv=x.shape[1],
            n_columns=n_columns,
            n_split=n_split,
            n_parts=n_parts,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_K=config["BLOCK_K"],
            num_warps=4,
        )


def _launch_dbias_backward(
    given: Problem, from_above: dict[str, Any], bias: Tensor, squares: Tensor
) -> Tensor:
    """The gradient of ``bias``, in its shape: fp32."""
    B, H, N_q, _ = given.call.q.shape
    N_k, n = given.call.k.shape[2], given.sequences.n
    config = given.pick(configs.DBIAS, configs.DBIAS, configs.DBIAS_FP32)
    n_tiles, n_tiles_k = given.n_tiles(config), given.n_key_tiles(config)
    sum_k = bias.shape[3] != N_k
    sum_q = bias.shape[2] != N_q and not sum_k
    n_cells_h, share_s, share_h = H, 1, 1
    if sum_k or sum_q:  # one partial sum per sequence and head: a vector
        out = torch.zeros(B, H, *((N_q, 1) if sum_k else (1, N_k)), device=bias.device)
    else:  # a matrix: a program walks the sequences and heads that share it
        out = torch.zeros(bias.shape, device=bias.device)
        n_cells_h, share_h = bias.shape[1], H // bias.shape[1]
        share_s = B // bias.shape[0]
    n_programs = (
        (n // share_s) * n_cells_h * (1 if sum_q else n_tiles) * (1 if sum_k else n_tiles_k)
    )
    _dbias_backward_kernel[(n_programs,)](
        **given.arguments,
        **given.values,
        **from_above,
        squares_ptr=squares if given.call.square else None,
        out_ptr=out,
        n_tiles=n_tiles,
        n_squares=given.n_squares[1],
        n_shared=share_s * share_h,
        share_h=share_h,
        SUM_Q=sum_q,
        SUM_K=sum_k,
        **config.meta(),
    )
    return out.sum_to_size(bias.shape)


def _of_the_sink(given: Problem, s_aux: Tensor, rows: Solved) -> tuple[Tensor, Tensor]:
    """u = y^(1-s), as in the kernels, and h = y ln^2(y) phi(-s ln y) of the sink's weights y."""
    alpha = given.arguments["alpha_ptr"]
    s = given.arguments["s"] if alpha is None else (alpha - 1.0).clamp(min=SMALLEST_S.value)
    s = torch.as_tensor(s, device=s_aux.device).view(-1, 1)
    t = s * (given.arguments["unit"] * (s_aux.view(-1, 1) - rows.top) - rows.theta)
    outside = t <= -1
    ln_y = torch.log1p(t.masked_fill(outside, 0.0)) / s
    h = ln_y.exp() * ln_y.square() * phi((-s * ln_y).clamp(min=0.0))
    return ((1 - s) * ln_y).exp().masked_fill(outside, 0.0), h.masked_fill(outside, 0.0)


def launch_attention_backward(
    call: Attention, saved: Tiles, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k and v, and of alpha, bias, slopes and s_aux if they are needed."""
    q, k, v, alpha, bias, slopes = call.q, call.k, call.v, call.alpha, call.bias, call.slopes
    B, H, N_q, _ = q.shape
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    ds, d_slope = (
        torch.zeros(B, H, N_q, device=q.device) if name in needs else None
        for name in ("alpha", "slopes")
    )
    d_s_aux = torch.zeros(H, device=q.device)
    found = {"q": dq, "k": dk, "v": dv}
    if bias is not None and "bias" in needs:
        found["bias"] = torch.zeros(bias.shape, dtype=bias.dtype, device=q.device)
    if not call.is_empty:
        given = problem(call)
        delta = torch.linalg.vecdot(d_out.float(), saved.o2)
        rows = Solved(saved.top, saved.theta, delta)
        arguments = {"do": Rows.of(d_out), "rows": rows}
        _launch_dq_backward(given, arguments, dq, ds, d_slope, saved.squares)
        _launch_dkdv_backward(given, arguments, dk, dv, saved.squares)
        if bias is not None and "bias" in needs and bias.numel() > 0:
            d_bias = _launch_dbias_backward(given, arguments, bias, saved.squares)
            found["bias"] = d_bias.to(bias.dtype)
        if given.s_aux is not None:
            u, h = _of_the_sink(given, given.s_aux, rows)
            d_s_aux -= (u * delta).sum((0, 2))
            if ds is not None:
                ds += h * delta
    if call.s_aux is not None:
        found["s_aux"] = d_s_aux.to(call.s_aux.dtype)
    if alpha is not None and ds is not None:
        found["alpha"] = per_head_sums(ds.sum((0, 2)), alpha)
    if slopes is not None and d_slope is not None:
        found["slopes"] = d_slope.sum((0, 2)).to(slopes.dtype)
    return found
