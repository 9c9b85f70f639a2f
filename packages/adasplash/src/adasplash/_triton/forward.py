"""Attention forward: which tiles matter, the threshold by Newton from below, the output.

One program owns BLOCK_Q queries of one head. With a tile list the scores are made once to find the
row maxima and the tiles that can matter (``_score_forward_kernel``); the threshold and the output
then visit only those. Without a list they visit all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, tiles

from .._call import Attention, Statistics, Tiles
from . import configs
from .problem import LENGTHS, Problem, lists, merged, problem
from .scores import (
    DEAD,
    HIDDEN,
    exponent_of,
    head_of,
    head_pointers,
    key_range,
    key_scores,
    keys_to_visit,
    query_program,
    rows_at,
    sequence_of,
    tile_at,
    tiles_per_side,
)
from .weights import theta_step, weight_pair

# What the score pass finds of a square: hidden from its queries (0), or too low, or worth a visit.
SEEN, KEPT = 1, 2
# The lead of a tile in which every score is too low for its row.
LOW = tl.constexpr(-1e28)


@triton.jit(do_not_specialize=LENGTHS)
def _score_forward_kernel(
    q,
    k,
    mask,
    bias,
    alpha_ptr,
    slopes_ptr,
    sequences_ptr,
    top_ptr,
    lead_ptr,
    gain_ptr,
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
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
):
    """The maximum of each row, and which tiles may hold a score within 1/s of it.

    A tile whose scores are 1/s below the maxima so far is out. The others are judged when the
    maxima are final: their lead over the maxima of the first tile, less what these have gained,
    bounds their distance to the final ones from above.
    """
    i_q, i_s, i_h = query_program(n_tiles, H)
    start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr)
    first_q = i_q * BLOCK_Q
    if first_q >= n_q:
        return
    i_b = i_s * batch_step
    s, p = exponent_of(alpha_ptr, i_h, s)
    reach = p / unit
    head = head_of(mask, bias, slopes_ptr, i_b, i_h, start, n_q, n_k, window, softcap)
    p_q, p_k = rows_at(q, i_b, i_h, start), rows_at(k, i_b, i_h // G, start)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, first_q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
    b_top = tl.full([BLOCK_Q], HIDDEN, tl.float32)
    low, high = key_range(i_q, head, BLOCK_Q, BLOCK_K, IS_CAUSAL)
    p_lead = lead_ptr + ((i_s * H + i_h) * n_tiles + i_q) * n_squares * tiles_per_side(BLOCK_K)
    # The diagonal first: its maxima rule out most of what follows.
    diagonal = tl.maximum(first_q + BLOCK_Q - 1 + n_k - n_q, 0) // BLOCK_K
    diagonal = tl.maximum(tl.minimum(diagonal, high - 1), low)
    b_first = b_top
    for t in range(low, high):
        i_k = diagonal - (t - low)
        i_k = tl.where(i_k < low, i_k + high - low, i_k)
        # [BLOCK_Q, BLOCK_K]
        b_s = key_scores(b_q, p_k, k.stride_n, first_q, i_k, factor, head, D, BLOCK_K, IS_CAUSAL)
        b_tile = tl.max(b_s, 1)
        b_top = tl.maximum(b_top, b_tile)
        b_first = tl.where(t == low, b_top, b_first)
        # Not (below): a NaN keeps its tile.
        b_lead = tl.where(b_tile - b_top < -reach, LOW, b_tile - b_first)
        b_lead = tl.where(b_tile == HIDDEN, HIDDEN, b_lead)
        tl.store(p_lead + i_k, tl.max(b_lead))
    b_gain = tl.where(b_top == HIDDEN, float("inf"), b_top - b_first)
    tl.store(gain_ptr + (i_s * H + i_h) * n_tiles + i_q, tl.min(b_gain))
    row = (i_b * H + i_h) * N_q + start
    tiles.store_row(top_ptr + row, b_top, first_q, n_q, BLOCK_Q)


@triton.jit
def _row_maxima(
    b_q,
    p_k,
    stride_kn,
    first_q,
    low,
    high,
    factor,
    head,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """The largest score of each row, HIDDEN where there is none. -> [BLOCK_Q]"""
    b_top = tl.full([b_q.shape[0]], HIDDEN, tl.float32)
    for i_k in range(low, high):
        b_s = key_scores(b_q, p_k, stride_kn, first_q, i_k, factor, head, D, BLOCK_K, IS_CAUSAL)
        b_top = tl.maximum(b_top, tl.max(b_s, 1))
    return b_top


@triton.jit
def _threshold(
    b_theta,
    b_top,
    sink,
    b_q,
    p_k,
    stride_kn,
    first_q,
    p_list,
    low,
    high,
    s,
    p,
    n_iter,
    factor,
    unit,
    head,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
):
    """theta by Newton from a lower bound of it. -> [BLOCK_Q]"""
    # A row that has converged keeps its theta: its bits do not depend on the rows beside it.
    # Triton 3.7 cannot compile a loop that carries a tensor defined after a number such as `go`.
    b_late = tl.full([b_q.shape[0]], 1, tl.int32)
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        # Sums over the columns of all tiles: threads meet once in a sweep, not in each tile.
        b_Fs = tl.zeros([b_q.shape[0], BLOCK_K], tl.float32)
        b_Gs = tl.zeros([b_q.shape[0], BLOCK_K], tl.float32)
        for t in range(low, high):
            i_k = tile_at(p_list, t, BLOCK_K)
            b_s = key_scores(b_q, p_k, stride_kn, first_q, i_k, factor, head, D, BLOCK_K, IS_CAUSAL)
            b_g, b_y = weight_pair(b_s, b_top[:, None], b_theta[:, None], s, p, unit, P, FAST)
            b_Fs += b_y
            b_Gs += b_g
        b_F, b_G = tl.sum(b_Fs, 1), tl.sum(b_Gs, 1)
        if sink is not None:
            b_g, b_y = weight_pair(sink, b_top, b_theta, s, p, unit, P, FAST)
            b_F += b_y
            b_G += b_g
        b_theta += tl.where(b_late > 0, theta_step(b_F, b_G, s, p, P), 0.0)
        it += 1
        b_late = tl.where(b_F > 1.00001, b_late, 0)
        go = tl.max(b_late)
    return b_theta


@triton.jit
def _store_flag(p_squares, i_k, b_sums):
    """Write whether a row of the tile holds a weight above 0 (or a NaN), by the rows' sums."""
    tl.store(p_squares + i_k, tl.max(tl.where(b_sums == 0.0, 0, 1)).to(tl.int8))


@triton.jit(do_not_specialize=LENGTHS)
def _attention_forward_kernel(
    q,
    k,
    v,
    mask,
    bias,
    alpha_ptr,
    slopes_ptr,
    sequences_ptr,
    visits,
    top_ptr,
    o_ptr,
    theta_ptr,
    o2_ptr,
    support_ptr,
    squares_ptr,
    s_aux_ptr,
    s,
    factor,
    unit,
    window,
    softcap,
    n_iter,
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
    """theta by Newton, then o = sum p v.

    What has a pointer is written: theta, o2 = sum u v / sum u, the flags of the squares; with
    `support_ptr` the number of weights above 0 instead of o. With `visits` the score pass found
    them, and the maxima at `top_ptr`; with theta the maxima are written there, sinks among them.
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
    row = (i_b * H + i_h) * N_q + start
    p_list, low, high = keys_to_visit(
        visits, i_sh, i_q, n_tiles, n_squares, head, BLOCK_Q, BLOCK_K, IS_CAUSAL
    )
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, first_q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)

    # top
    if visits is None:
        b_top = _row_maxima(
            b_q, p_k, k.stride_n, first_q, low, high, factor, head, D, BLOCK_K, IS_CAUSAL
        )
    else:
        b_top = tiles.load_row(top_ptr + row, first_q, n_q, BLOCK_Q, HIDDEN)

    # threshold
    b_theta = tl.where(b_top == HIDDEN, DEAD, 0.0)
    b_top = tl.where(b_top == HIDDEN, 0.0, b_top)
    sink = None
    if s_aux_ptr is not None:
        sink = tl.load(s_aux_ptr + i_h)
        b_top = tl.maximum(b_top, sink, propagate_nan=tl.PropagateNan.ALL)
    b_theta = _threshold(
        b_theta,
        b_top,
        sink,
        b_q,
        p_k,
        k.stride_n,
        first_q,
        p_list,
        low,
        high,
        s,
        p,
        n_iter,
        factor,
        unit,
        head,
        D,
        BLOCK_K,
        P,
        IS_CAUSAL,
        FAST,
    )
    if theta_ptr is not None:
        tiles.store_row(theta_ptr + row, b_theta, first_q, n_q, BLOCK_Q)
        tiles.store_row(top_ptr + row, b_top, first_q, n_q, BLOCK_Q)

    # output
    p_squares = squares_ptr
    if squares_ptr is not None:
        p_squares += (i_sh * n_tiles + i_q) * n_squares * tiles_per_side(BLOCK_K)
    if support_ptr is not None:
        b_n = tl.zeros([BLOCK_Q], tl.int32)
        for t in range(low, high):
            i_k = tile_at(p_list, t, BLOCK_K)
            b_s = key_scores(
                b_q, p_k, k.stride_n, first_q, i_k, factor, head, D, BLOCK_K, IS_CAUSAL
            )
            b_g, b_y = weight_pair(b_s, b_top[:, None], b_theta[:, None], s, p, unit, P, FAST)
            b_n += tl.sum((b_y > 0.0).to(tl.int32), 1)
            if squares_ptr is not None:
                _store_flag(p_squares, i_k, tl.sum(b_g, 1))
        tiles.store_row(support_ptr + row, b_n, first_q, n_q, BLOCK_Q)
    else:
        b_o, b_o2 = _output(
            b_theta,
            b_top,
            sink,
            b_q,
            p_k,
            k.stride_n,
            p_v,
            v.stride_n,
            first_q,
            p_list,
            low,
            high,
            s,
            p,
            factor,
            unit,
            head,
            p_squares,
            D,
            D_V,
            BLOCK_DV,
            BLOCK_K,
            P,
            IS_CAUSAL,
            FAST,
            o2_ptr is not None,
        )
        tiles.store_tile(o_ptr + row * D_V, b_o, first_q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)
        if o2_ptr is not None:
            tiles.store_tile(o2_ptr + row * D_V, b_o2, first_q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)


@triton.jit
def _output(
    b_theta,
    b_top,
    sink,
    b_q,
    p_k,
    stride_kn,
    p_v,
    stride_vn,
    first_q,
    p_list,
    low,
    high,
    s,
    p,
    factor,
    unit,
    head,
    p_squares,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FAST: tl.constexpr,
    SAVE: tl.constexpr,
):
    """o = sum p v, and if SAVE o2 = sum u v / sum u (else o again). -> [BLOCK_Q, BLOCK_DV] twice"""
    BLOCK_Q: tl.constexpr = b_q.shape[0]
    b_o = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    b_F = tl.zeros([BLOCK_Q], tl.float32)
    if SAVE:
        b_o2 = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        b_G = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(low, high):
        i_k = tile_at(p_list, t, BLOCK_K)
        b_s = key_scores(b_q, p_k, stride_kn, first_q, i_k, factor, head, D, BLOCK_K, IS_CAUSAL)
        b_g, b_y = weight_pair(b_s, b_top[:, None], b_theta[:, None], s, p, unit, P, FAST)
        # [BLOCK_K, BLOCK_DV]
        b_v = tiles.load_tile(p_v, i_k * BLOCK_K, head.n_k, stride_vn, BLOCK_K, D_V, BLOCK_DV)
        b_F += tl.sum(b_y, 1)
        b_o = dot.dot_acc(b_y.to(b_v.dtype), b_v, b_o)
        if SAVE:
            b_sums = tl.sum(b_g, 1)
            b_G += b_sums
            b_o2 = dot.dot_acc(b_g.to(b_v.dtype), b_v, b_o2)
            if p_squares is not None:
                _store_flag(p_squares, i_k, b_sums)
    if sink is not None:
        b_g, b_y = weight_pair(sink, b_top, b_theta, s, p, unit, P, FAST)
        b_F += b_y
        if SAVE:
            b_G += b_g
    b_o = b_o / tl.where(b_F == 0.0, 1.0, b_F)[:, None]
    if SAVE:
        return b_o, b_o2 / tl.where(b_G == 0.0, 1.0, b_G)[:, None]
    else:
        return b_o, b_o


def _launch_score_forward(given: Problem, top: Tensor) -> Tensor:
    """Fill the row maxima; -> what is found of the squares (sequences * H, T_q, T_k)."""
    config = given.pick(configs.SCORE, configs.SCORE_EDITED, configs.SCORE_FP32)
    lead = torch.full(given.tiles_of(config), HIDDEN.value, device=top.device)
    gain = torch.zeros(lead.shape[:2], device=top.device)
    _score_forward_kernel[given.grid_of_queries(config)](
        **given.arguments,
        top_ptr=top,
        lead_ptr=lead,
        gain_ptr=gain,
        n_tiles=given.n_tiles(config),
        n_squares=given.n_squares[1],
        **config.meta(),
    )
    gain = gain.unsqueeze(-1)
    rounding = torch.finfo(torch.float32).eps * 8 * (lead.abs() + gain.abs())
    low = (lead <= LOW.value) | (lead - gain < -given.reach() - rounding)
    found = torch.where(low, SEEN, KEPT) * (lead != HIDDEN.value)
    return merged(found.to(torch.int8), config)


def _launch_output_forward(
    given: Problem,
    *,
    o: Tensor | None = None,
    top: Tensor | None = None,
    theta: Tensor | None = None,
    o2: Tensor | None = None,
    support: Tensor | None = None,
) -> tuple[Any, Any]:
    """Fill what is given; what the score pass found and the exact flags of the squares, or None."""
    config = given.pick(configs.FORWARD, configs.FORWARD_EDITED, configs.FORWARD_FP32)
    visits = squares = found = None
    if given.call.square:
        q = given.call.q
        top = torch.empty(q.shape[:3], device=q.device) if top is None else top
        found = _launch_score_forward(given, top)
        visits = lists(found == KEPT)
        if theta is not None:
            squares = torch.zeros(given.tiles_of(config), dtype=torch.int8, device=theta.device)
    _attention_forward_kernel[given.grid_of_queries(config)](
        **given.arguments,
        **given.values,
        visits=visits,
        top_ptr=top,
        o_ptr=o,
        theta_ptr=theta,
        o2_ptr=o2,
        support_ptr=support,
        squares_ptr=squares,
        s_aux_ptr=given.s_aux,
        n_iter=given.call.n_iter,
        n_tiles=given.n_tiles(config),
        n_squares=given.n_squares[1],
        **config.meta(),
    )
    return found, None if squares is None else merged(squares, config)


def launch_attention_forward(call: Attention) -> tuple[Tensor, Tiles]:
    """o, and if ``save``: top, theta, o2 and the flags of the squares that do matter."""
    q, save = call.q, call.save
    o = torch.zeros(*q.shape[:3], call.v.shape[-1], dtype=q.dtype, device=q.device)
    theta = torch.full(q.shape[:3] if save else (0,), DEAD.value, device=q.device)
    top = torch.zeros_like(theta)
    o2 = torch.zeros(o.shape if save else (0,), device=q.device)
    squares = Tiles.fake(call).squares.zero_()
    if call.is_empty:
        return o, Tiles(top, theta, o2, squares)
    kept = {"top": top, "theta": theta, "o2": o2} if save else {}
    _, exact = _launch_output_forward(problem(call), o=o, **kept)
    return o, Tiles(top, theta, o2, squares if exact is None else exact)


def launch_attention_stats(call: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support and tau of each query; per head the squares with a weight, visited, visible."""
    q, alpha = call.q, call.alpha
    B, H, N_q, _ = q.shape
    support = torch.zeros(B, H, N_q, dtype=torch.int32, device=q.device)
    theta = torch.full((B, H, N_q), DEAD.value, device=q.device)
    top = torch.zeros_like(theta)
    if call.is_empty:
        none = [torch.zeros(B, H, dtype=torch.int64, device=q.device) for _ in range(3)]
        return support.long(), torch.full_like(theta, torch.nan), none[0], none[1], none[2]
    given = problem(call)
    found, exact = _launch_output_forward(given, support=support, top=top, theta=theta)
    s = given.arguments["s"] if alpha is None else alpha.detach().float().reshape(-1, 1) - 1
    tau = s * (theta + given.arguments["unit"] * top) - 1
    tau = tau.masked_fill(theta == DEAD.value, torch.nan)

    def per_head(flags: Tensor) -> Tensor:
        count = flags.sum((1, 2)).view(given.sequences.n, H)
        return count.sum(0, keepdim=True) if given.sequences.packed else count

    visited, seen = per_head(found == KEPT), per_head(found >= SEEN)
    return support.long(), tau, per_head(exact != 0), visited, seen
