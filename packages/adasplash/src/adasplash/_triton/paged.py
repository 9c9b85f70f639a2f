"""Decoding over pages: bounds of pages, pages in falling order of them, reading until it is proven.

Rows (query heads of one kv head times new queries) read together, BLOCK_R of them in a program. One
kernel finds the largest bound that a page has for its rows; pages are sorted by it; the second
kernel reads them in that order, solves for the thresholds of what it has read, and stops when the
next bound is at most the lowest threshold. Scores, bounds and sinks are in units.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton import dot, math, threshold, tiles
from shared_kernels.triton.arguments import Rows

from .._paged_call import PagedDecode
from . import configs
from .problem import LEAST_FAST_S, blocks, in_units, units_of
from .scores import HIDDEN, LOWEST, capped
from .weights import SMALLEST_S, exponent, theta_step, weight_pair

LENGTHS = ["window", "n_iter", "n", "M", "n_pages", "n_tiles"]
# A threshold above every bound: of rows that need nothing.
SETTLED = tl.constexpr(1e29)
# What a threshold in units of s * score may lie below its computed value by.
TAU_ERROR = tl.constexpr(1e-5)
FIRST = tl.constexpr(8)


class Pool(NamedTuple):
    """Pages (H_kv, pages, size, D) whose rows are contiguous."""

    ptr: Tensor
    stride_h: int
    stride_p: int
    stride_n: int


class Group(NamedTuple):
    """The rows of a program: where they stand, which keys they see, how their scores are made."""

    at: Any  # [BLOCK_R] positions
    alive: Any  # [BLOCK_R]
    slope: Any  # [BLOCK_R] or None
    factor: Any
    window: Any
    softcap: Any


@triton.jit
def _rows_of(i_p, n_tiles, H_kv, G, n, BLOCK_R: tl.constexpr):
    """Batch element, kv head; of each row its head, its query, whether it is there."""
    o_r = (i_p % n_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_bh = i_p // n_tiles
    i_b, i_kv = i_bh // H_kv, i_bh % H_kv
    m_r = o_r < G * n
    h = i_kv * G + tl.minimum(o_r // n, G - 1)
    return i_b, i_kv, h, o_r % n, m_r


@triton.jit
def _group(i_b, h, i_n, m_r, lengths_ptr, slopes_ptr, n, factor, window, softcap):
    at = (tl.load(lengths_ptr + i_b) - n + i_n).to(tl.int32)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h)
    return Group(at, m_r & (at >= 0), slope, factor, window, softcap)


@triton.jit
def _load_queries(q, i_b, h, i_n, m_r, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> [BLOCK_R, BLOCK_D]"""
    o_d = tl.arange(0, BLOCK_D)
    p_q = q.ptr + i_b * q.stride_b + h * q.stride_h + i_n * q.stride_n
    return tl.load(p_q[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _page_bound_kernel(
    q,
    bounds_ptr,
    table_ptr,
    lengths_ptr,
    slopes_ptr,
    best_ptr,
    factor,
    window,
    softcap,
    H_kv,
    G,
    n,
    M,
    n_pages,
    n_tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The largest bound of each page for the rows of a program; HIDDEN if none sees it."""
    n_blocks = tl.cdiv(M, BLOCK_P)
    i_p = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_p = (tl.program_id(0) % n_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_b, i_kv, h, i_n, m_r = _rows_of(i_p, n_tiles, H_kv, G, n, BLOCK_R)
    rows = _group(i_b, h, i_n, m_r, lengths_ptr, slopes_ptr, n, factor, window, softcap)
    last = tl.load(lengths_ptr + i_b).to(tl.int32) - 1
    m_p = (o_p < M) & (o_p * SIZE <= last)
    page = tl.load(table_ptr + i_b * M + o_p, mask=m_p, other=0)
    o_d = tl.arange(0, BLOCK_D)
    m_pd = m_p[:, None] & (o_d < D)[None, :]
    p_bound = bounds_ptr + ((i_kv * n_pages + page) * (2 * D))[:, None] + o_d[None, :]
    # [BLOCK_P, BLOCK_D]
    b_high = tl.load(p_bound, mask=m_pd, other=0.0)
    b_low = tl.load(p_bound + D, mask=m_pd, other=0.0)
    # [BLOCK_R, BLOCK_D]
    b_q = _load_queries(q, i_b, h, i_n, m_r, D, BLOCK_D).to(tl.float32) * factor
    b_u = dot.dot(math.relu(b_q), tl.trans(b_high))
    b_u = dot.dot_acc(-math.relu(-b_q), tl.trans(b_low), b_u)
    b_u = capped(b_u, rows)
    far = rows.at[:, None] - (o_p * SIZE)[None, :]
    near = tl.maximum(far - (SIZE - 1), 0)
    if slopes_ptr is not None:
        slope = rows.slope[:, None]
        b_u -= slope * tl.where(slope >= 0.0, near, far).to(tl.float32)
    seen = rows.alive[:, None] & m_p[None, :] & (far >= 0)
    if window is not None:
        seen = seen & (near < window)
    # Of a page whose bound is NaN nothing is known: it is read first.
    b_u = tl.where(b_u == b_u, b_u, float("inf"))
    b_best = tl.max(tl.where(seen, b_u, HIDDEN), 0)
    tl.store(best_ptr + i_p * M + o_p, b_best, mask=o_p < M)


@triton.jit
def _page_scores(
    b_q,
    p_k,
    stride_n,
    first,
    rows,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores of BLOCK_K keys at p_k, the first of them at position `first`; HIDDEN if not seen."""
    BLOCK_D: tl.constexpr = b_q.shape[1]
    # [BLOCK_K, BLOCK_D]
    b_k = tiles.load_tile(p_k, 0, BLOCK_K, stride_n, BLOCK_K, D, BLOCK_D)
    # [BLOCK_R, BLOCK_K]
    b_s = capped(dot.dot(b_q, tl.trans(b_k)) * rows.factor, rows)
    distance = rows.at[:, None] - (first + tl.arange(0, BLOCK_K))[None, :]
    if rows.slope is not None:
        b_s -= rows.slope[:, None] * distance.to(tl.float32)
    seen = rows.alive[:, None] & (distance >= 0)
    if rows.window is not None:
        seen = seen & (distance < rows.window)
    return tl.where(seen, b_s, HIDDEN)


@triton.jit
def _page_at(p_order, p_table, t):
    """The t-th page to read: its place in the sequence, and in the pool."""
    place = tl.load(p_order + t)
    return place, tl.load(p_table + place)


@triton.jit
def _solved(
    b_theta,
    b_top,
    b_sink,
    b_q,
    keys,
    p_keys,
    p_order,
    p_table,
    end,
    b_s_row,
    b_p_row,
    n_iter,
    unit,
    rows,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    """theta of the first `end` pages, by Newton from a lower bound of it. -> [BLOCK_R]"""
    # A row that has converged keeps its theta: its bits do not depend on the rows beside it.
    b_late = tl.full([b_q.shape[0]], 1, tl.int32)
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        b_F = tl.zeros([b_q.shape[0]], tl.float32)
        b_G = tl.zeros([b_q.shape[0]], tl.float32)
        for t in range(end):
            place, page = _page_at(p_order, p_table, t)
            for j in range(0, SIZE, BLOCK_K):
                p_k = p_keys + page * keys.stride_p + j * keys.stride_n
                first = place.to(tl.int32) * SIZE + j
                b_s = _page_scores(b_q, p_k, keys.stride_n, first, rows, D, BLOCK_K)
                b_g, b_y = weight_pair(
                    b_s,
                    b_top[:, None],
                    b_theta[:, None],
                    b_s_row[:, None],
                    b_p_row[:, None],
                    unit,
                    P,
                    FAST,
                )
                b_F += tl.sum(b_y, 1)
                b_G += tl.sum(b_g, 1)
        if b_sink is not None:
            b_g, b_y = weight_pair(b_sink, b_top, b_theta, b_s_row, b_p_row, unit, P, FAST)
            b_F += b_y
            b_G += b_g
        b_theta += tl.where(b_late > 0, theta_step(b_F, b_G, b_s_row, b_p_row, P), 0.0)
        it += 1
        b_late = tl.where(b_F > 1.00001, b_late, 0)
        go = tl.max(b_late)
    return b_theta


@triton.jit(do_not_specialize=LENGTHS)
def _paged_decode_kernel(
    q,
    keys,
    values,
    table_ptr,
    lengths_ptr,
    alpha_ptr,
    slopes_ptr,
    s_aux_ptr,
    best_ptr,
    order_ptr,
    o_ptr,
    read_ptr,
    s,
    factor,
    unit,
    window,
    softcap,
    n_iter,
    H,
    H_kv,
    G,
    n,
    M,
    n_tiles,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SIZE: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    """Read pages in falling order of their bound until the next is too low; then o = sum p v."""
    i_p = tl.program_id(0).to(tl.int64)
    i_b, i_kv, h, i_n, m_r = _rows_of(i_p, n_tiles, H_kv, G, n, BLOCK_R)
    rows = _group(i_b, h, i_n, m_r, lengths_ptr, slopes_ptr, n, factor, window, softcap)
    b_q = _load_queries(q, i_b, h, i_n, m_r, D, BLOCK_D)
    b_s_row = tl.zeros([BLOCK_R], tl.float32) + s
    if alpha_ptr is not None:
        b_s_row = exponent(tl.load(alpha_ptr + h))
    b_top = tl.full([BLOCK_R], LOWEST, tl.float32)
    b_sink = None
    if s_aux_ptr is not None:
        b_sink = tl.load(s_aux_ptr + h)
        b_top = tl.maximum(b_sink, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    b_theta = tl.zeros([BLOCK_R], tl.float32)
    b_p_row = 1.0 / b_s_row
    b_reach = b_p_row * (1.0 + TAU_ERROR)
    per_unit = 1.0 / unit
    p_order, p_best, p_table = order_ptr + i_p * M, best_ptr + i_p * M, table_ptr + i_b * M
    p_keys = keys.ptr + i_kv * keys.stride_h
    o_p = tl.arange(0, BLOCK_P)

    # pages
    end = 0
    chunk = FIRST
    go = 1
    while go > 0:
        # A lower bound of the lowest score with a weight; rounded down by what solving may err by.
        b_low = b_top + (b_theta - b_reach) * per_unit
        b_low -= 1e-6 * tl.abs(b_low)
        b_low = tl.where(rows.alive & (b_low == b_low), b_low, SETTLED)
        lowest = tl.min(b_low)
        above = 0
        for j in range(0, M, BLOCK_P):
            b_best = tl.load(p_best + j + o_p, mask=j + o_p < M, other=HIDDEN)
            above += tl.sum((b_best > lowest).to(tl.int32))
        start = end
        b_before = b_top
        end = tl.maximum(end, tl.minimum(above, end + chunk))
        for t in range(start, end):
            place, page = _page_at(p_order, p_table, t)
            for j in range(0, SIZE, BLOCK_K):
                p_k = p_keys + page * keys.stride_p + j * keys.stride_n
                first = place.to(tl.int32) * SIZE + j
                b_s = _page_scores(b_q, p_k, keys.stride_n, first, rows, D, BLOCK_K)
                b_top = tl.maximum(b_top, tl.max(b_s, 1))
        if end > start:
            # What was a lower bound above the maximum before is one above that of now, or 0 is.
            b_theta = tl.maximum(b_theta - (b_top - b_before) * unit, 0.0)
            b_theta = _solved(
                b_theta,
                b_top,
                b_sink,
                b_q,
                keys,
                p_keys,
                p_order,
                p_table,
                end,
                b_s_row,
                b_p_row,
                n_iter,
                unit,
                rows,
                D,
                SIZE,
                BLOCK_K,
                P,
                FAST,
            )
        go = (end > start).to(tl.int32)
        chunk = tl.maximum(end, FIRST)
    tl.store(read_ptr + i_p, end)

    # output
    p_values = values.ptr + i_kv * values.stride_h
    b_o = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    b_F = tl.zeros([BLOCK_R], tl.float32)
    for t in range(end):
        place, page = _page_at(p_order, p_table, t)
        for j in range(0, SIZE, BLOCK_K):
            p_k = p_keys + page * keys.stride_p + j * keys.stride_n
            p_v = p_values + page * values.stride_p + j * values.stride_n
            first = place.to(tl.int32) * SIZE + j
            b_s = _page_scores(b_q, p_k, keys.stride_n, first, rows, D, BLOCK_K)
            _, b_y = weight_pair(
                b_s,
                b_top[:, None],
                b_theta[:, None],
                b_s_row[:, None],
                b_p_row[:, None],
                unit,
                P,
                FAST,
            )
            # [BLOCK_K, BLOCK_DV]
            b_v = tiles.load_tile(p_v, 0, BLOCK_K, values.stride_n, BLOCK_K, D_V, BLOCK_DV)
            b_F += tl.sum(b_y, 1)
            b_o = dot.dot_acc(b_y.to(b_v.dtype), b_v, b_o)
    if b_sink is not None:
        _, b_y = weight_pair(b_sink, b_top, b_theta, b_s_row, b_p_row, unit, P, FAST)
        b_F += b_y
    b_o = b_o / tl.where(b_F == 0.0, 1.0, b_F)[:, None]
    o_d = tl.arange(0, BLOCK_DV)
    p_o = o_ptr + ((i_b * H + h) * n + i_n) * D_V
    b_o = math.cast(b_o, o_ptr.dtype.element_ty)
    m_o = rows.alive[:, None] & (o_d < D_V)[None, :]
    tl.store(p_o[:, None] + o_d[None, :], b_o, mask=m_o)


def _pool(x: Tensor) -> Pool:
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return Pool(x, x.stride(0), x.stride(1), x.stride(2))


def launch_paged_decode(call: PagedDecode) -> tuple[Tensor, Tensor]:
    """o (B, H, n, D_v) and how many pages were read (B, H_kv)."""
    out, n_read = (x.zero_() for x in call.fake())
    q, alpha = call.q, call.alpha
    (B, H, n, D), (H_kv, n_pages, size, D_v), M = q.shape, call.values.shape, call.table.shape[1]
    if 0 in (out.numel(), M):
        return out, n_read
    target, G = device.target(q), H // H_kv
    table = configs.PAGED if q.dtype != torch.float32 else configs.PAGED_FP32
    meta = table.pick(target, max(D, D_v)).meta()
    meta["BLOCK_K"] = min(meta["BLOCK_K"], size)
    n_tiles = triton.cdiv(G * n, meta["BLOCK_R"])
    n_programs = B * H_kv * n_tiles
    s = call.alpha_value - 1.0
    factor, unit = units_of(call.scale, call.slopes, call.softcap)
    slopes = None if call.slopes is None else call.slopes.detach().float().contiguous()
    if alpha is not None:
        alpha = alpha.detach().to(q.device).float().reshape(-1).expand(H).contiguous()
    shared = {
        "q": Rows.of(q),
        "table_ptr": call.table.to(torch.int64).clamp(0, n_pages - 1).contiguous(),
        "lengths_ptr": call.lengths.to(torch.int64).contiguous(),
        "slopes_ptr": slopes,
        "factor": factor,
        "window": call.window,
        "softcap": call.softcap,
        "H_kv": H_kv,
        "G": G,
        "n": n,
        "M": M,
        "n_tiles": n_tiles,
        "D": D,
        "BLOCK_D": blocks(D),
        "SIZE": size,
    }
    best = torch.empty(n_programs, M, device=q.device)
    n_blocks = triton.cdiv(M, meta["BLOCK_P"])
    for_bounds = {name: x for name, x in meta.items() if name != "BLOCK_K"}
    for_bounds["num_warps"] = max(4, meta["num_warps"])  # two spill
    _page_bound_kernel[(n_programs * n_blocks,)](
        **shared,
        bounds_ptr=call.bounds.contiguous(),
        best_ptr=best,
        n_pages=n_pages,
        **for_bounds,
    )
    best, order = best.sort(dim=1, descending=True, stable=True)
    read = torch.empty(n_programs, dtype=torch.int32, device=q.device)
    _paged_decode_kernel[(n_programs,)](
        **shared,
        keys=_pool(call.keys),
        values=_pool(call.values),
        alpha_ptr=alpha,
        s_aux_ptr=None if call.s_aux is None else in_units(call.s_aux, unit),
        best_ptr=best,
        order_ptr=order,
        o_ptr=out,
        read_ptr=read,
        s=max(s, SMALLEST_S.value) if alpha is None else 1.0,
        unit=unit,
        n_iter=call.n_iter,
        H=H,
        D_V=D_v,
        BLOCK_DV=blocks(D_v),
        P=threshold.integer_exponent(s) if alpha is None and s > 0 else 0,
        FAST=alpha is None and s >= LEAST_FAST_S and math.fast(target),
        **meta,
    )
    return out, read.view(B, H_kv, n_tiles).amax(2).long()
