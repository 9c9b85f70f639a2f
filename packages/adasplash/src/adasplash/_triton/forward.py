"""Attention forward: which tiles matter, the threshold by Newton from below, the output.

One program owns BLOCK_Q queries of one head. With a tile list the scores are made once to find the
row maxima and the tiles that can matter (``_score_forward_kernel``); the threshold and the output
then visit only those. Without a list they visit all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, tiles

from .._call import Attention, Statistics, Tiles
from . import configs
from .problem import LENGTHS, Problem, lists, merged, problem, splits
from .scores import (
    DEAD,
    HIDDEN,
    edit_scores,
    edits_of,
    exponent_of,
    key_range,
    list_of,
    query_program,
    sequence_of,
    tile_at,
)
from .weights import theta_step, weight_pair

# What the score pass finds of a square: hidden from its queries (0), or too low, or worth a visit.
SEEN, KEPT = 1, 2
# The lead of a tile in which every score is too low for its row.
LOW = tl.constexpr(-1e20)


@triton.jit(do_not_specialize=LENGTHS)
def _score_forward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    top_ptr, lead_ptr, gain_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    s, scale, window, n_iter, H, G, N_q, N_k, batch_step, n_tiles, n_squares,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    P: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SEQUENCES: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The maximum of each row, and which tiles may hold a score within p = 1/s of it.

    A tile whose scores are p below the maxima so far is out. The others are judged when the
    maxima are final: their lead over the maxima of the first tile, less what these have gained,
    bounds their distance to the final ones from above.
    """
    i_q, i_s, i_h = query_program(n_tiles, H)
    start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr, HAS_SEQUENCES)
    if i_q * BLOCK_Q >= n_q:
        return
    i_b = i_s * batch_step
    s, p = exponent_of(alpha_ptr, i_h, s, HAS_ALPHA)
    edits = edits_of(
        i_b, i_h, start, n_q, n_k, window, slopes_ptr, mask_ptr, bias_ptr, stride_mb, stride_mh,
        stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak, HAS_ALIBI,
    )  # fmt: skip
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + start * stride_qn
    p_k = k_ptr + i_b * stride_kb + (i_h // G) * stride_kh + start * stride_kn
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
    b_top = tl.full([BLOCK_Q], HIDDEN, tl.float32)
    low, high = key_range(i_q, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
    p_lead = lead_ptr + ((i_s * H + i_h) * n_tiles + i_q) * n_squares
    # The diagonal first: its maxima rule out most of what follows.
    diagonal = tl.maximum(i_q * BLOCK_Q + BLOCK_Q - 1 + n_k - n_q, 0) // BLOCK_K
    diagonal = tl.maximum(tl.minimum(diagonal, high - 1), low)
    b_first = b_top
    for t in range(low, high):
        i_k = diagonal - (t - low)
        i_k = tl.where(i_k < low, i_k + high - low, i_k)
        # [BLOCK_K, BLOCK_D]
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        b_s = edit_scores(
            dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], edits,
            IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        b_tile = tl.max(b_s, 1)
        b_top = tl.maximum(b_top, b_tile)
        b_first = tl.where(t == low, b_top, b_first)
        # Not (below): a NaN keeps its tile.
        b_lead = tl.where(b_tile < b_top - p, LOW, b_tile - b_first)
        b_lead = tl.where(b_tile < 0.5 * HIDDEN, HIDDEN, b_lead)
        tl.store(p_lead + i_k, tl.max(b_lead, 0))
    b_gain = tl.where(b_top < 0.5 * HIDDEN, -HIDDEN, b_top - b_first)
    tl.store(gain_ptr + (i_s * H + i_h) * n_tiles + i_q, tl.min(b_gain, 0))
    row = (i_b * H + i_h) * N_q + start
    tiles.store_row(top_ptr + row, b_top, i_q * BLOCK_Q, n_q, BLOCK_Q)


@triton.jit(do_not_specialize=LENGTHS)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    top_ptr, offsets_ptr, list_ptr, o_ptr, theta_ptr, o2_ptr, support_ptr, squares_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    s, scale, window, n_iter, H, G, N_q, N_k, batch_step, n_tiles, n_squares,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_Q: tl.constexpr, SPLIT_K: tl.constexpr,
    P: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SEQUENCES: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
    HAS_BLOCK_MASK: tl.constexpr, SAVE: tl.constexpr, IS_COUNT: tl.constexpr,
):  # fmt: skip
    """theta by Newton, then o = sum p v and, if SAVE, o2 = sum u v / sum u and the exact flags.

    IS_COUNT: the number of weights above 0 instead of o and o2.
    """
    i_q, i_s, i_h = query_program(n_tiles, H)
    start, n_q, n_k = sequence_of(i_s, N_q, N_k, sequences_ptr, HAS_SEQUENCES)
    if i_q * BLOCK_Q >= n_q:
        return
    i_b, i_sh = i_s * batch_step, i_s * H + i_h
    s, p = exponent_of(alpha_ptr, i_h, s, HAS_ALPHA)
    edits = edits_of(
        i_b, i_h, start, n_q, n_k, window, slopes_ptr, mask_ptr, bias_ptr, stride_mb, stride_mh,
        stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak, HAS_ALIBI,
    )  # fmt: skip
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + start * stride_qn
    p_k = k_ptr + i_b * stride_kb + (i_h // G) * stride_kh + start * stride_kn
    p_v = v_ptr + i_b * stride_vb + (i_h // G) * stride_vh + start * stride_vn
    row = (i_b * H + i_h) * N_q + start
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
    if HAS_BLOCK_MASK:
        p_list, low, high = list_of(
            offsets_ptr, list_ptr, i_sh, i_q, n_tiles, n_squares, SPLIT_Q, SPLIT_K
        )
        b_top = tiles.load_row(top_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q, HIDDEN)
    else:
        p_list = list_ptr
        low, high = key_range(i_q, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
        b_top = tl.full([BLOCK_Q], HIDDEN, tl.float32)
        for i_k in range(low, high):
            b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_s = edit_scores(
                dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], edits,
                IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
            b_top = tl.maximum(b_top, tl.max(b_s, 1))
    # Newton from the maximum, a lower bound of theta, while some row still weighs more than 1
    b_theta = tl.where(b_top < 0.5 * HIDDEN, DEAD, b_top)
    # A row that has converged stays as it is: its bits do not depend on the rows beside it. Triton
    # 3.7 cannot compile a loop that carries a tensor defined after a number such as `go`.
    b_late = tl.full([BLOCK_Q], 1, tl.int32)
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        b_F = tl.zeros([BLOCK_Q], tl.float32)
        b_G = tl.zeros([BLOCK_Q], tl.float32)
        for t in range(low, high):
            i_k = tile_at(p_list, t, SPLIT_K, HAS_BLOCK_MASK)
            b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_s = edit_scores(
                dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], edits,
                IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
            b_g, b_y = weight_pair(b_s, b_theta[:, None], s, p, P, FAST)
            b_F += tl.sum(b_y, 1)
            b_G += tl.sum(b_g, 1)
        b_theta += tl.where(b_late > 0, theta_step(b_F, b_G, s, p, P), 0.0)
        it += 1
        b_late = tl.where(b_F > 1.00001, b_late, 0)
        go = tl.max(b_late, 0)

    # output
    if IS_COUNT:
        b_n = tl.zeros([BLOCK_Q], tl.int32)
    else:
        b_o = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        b_F = tl.zeros([BLOCK_Q], tl.float32)
        if SAVE:
            b_o2 = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
            b_G = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(low, high):
        i_k = tile_at(p_list, t, SPLIT_K, HAS_BLOCK_MASK)
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_s = edit_scores(
            dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], edits,
            IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        b_g, b_y = weight_pair(b_s, b_theta[:, None], s, p, P, FAST)
        if IS_COUNT:
            b_n += tl.sum((b_y > 0.0).to(tl.int32), 1)
        else:
            # [BLOCK_K, BLOCK_DV]
            b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, stride_vn, BLOCK_K, D_V, BLOCK_DV)
            b_F += tl.sum(b_y, 1)
            b_o = dot.dot_acc(b_y.to(b_v.dtype), b_v, b_o)
            if SAVE:
                b_G += tl.sum(b_g, 1)
                b_o2 = dot.dot_acc(b_g.to(b_v.dtype), b_v, b_o2)
        if SAVE and HAS_BLOCK_MASK:
            keep = tl.max(tl.max(tl.where(b_g == 0.0, 0, 1), 1), 0)
            p_squares = squares_ptr + (i_sh * n_tiles + i_q) * n_squares * SPLIT_K
            tl.store(p_squares + i_k, keep.to(tl.int8))
    if SAVE:
        tiles.store_row(theta_ptr + row, b_theta, i_q * BLOCK_Q, n_q, BLOCK_Q)
    if IS_COUNT:
        tiles.store_row(support_ptr + row, b_n, i_q * BLOCK_Q, n_q, BLOCK_Q)
    else:
        p_o = o_ptr + row * D_V
        b_o = b_o / tl.where(b_F == 0.0, 1.0, b_F)[:, None]
        tiles.store_tile(p_o, b_o, i_q * BLOCK_Q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)
        if SAVE:
            p_o2 = o2_ptr + row * D_V
            b_o2 = b_o2 / tl.where(b_G == 0.0, 1.0, b_G)[:, None]
            tiles.store_tile(p_o2, b_o2, i_q * BLOCK_Q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)


def _launch_score_forward(call: Problem) -> tuple[Tensor, Tensor]:
    """Row maxima (B, H, N_q), and what is found of the squares (sequences * H, T_q, T_k)."""
    config = call.pick(configs.SCORE, configs.SCORE_EDITED, configs.SCORE_FP32)
    top = torch.empty(call.q.shape[:3], device=call.q.device)
    lead = torch.full(call.tiles_of(config), HIDDEN.value, device=call.q.device)
    gain = torch.zeros(lead.shape[:2], device=call.q.device)
    _score_forward_kernel[call.grid_of_queries(config)](
        **call.arguments, top_ptr=top, lead_ptr=lead, gain_ptr=gain, n_tiles=lead.shape[1],
        n_squares=lead.shape[2], **call.blocks(), **call.flags, **config.meta(),
    )  # fmt: skip
    gain = gain.unsqueeze(-1)
    rounding = torch.finfo(torch.float32).eps * 8 * (lead.abs() + gain.abs())
    low = (lead <= LOW.value) | (lead - gain < -call.reach() - rounding)
    found = torch.where(low, SEEN, KEPT) * (lead != HIDDEN.value)
    return top, merged(found.to(torch.int8), config)


def _launch_output_forward(
    call: Problem, o: Tensor, theta: Tensor, o2: Tensor, block_mask: bool, save: bool, count: bool
) -> tuple[Tensor, Tensor]:
    """Fill o, theta and o2; what the score pass found, and the exact flags of the squares."""
    config = call.pick(configs.FORWARD, configs.FORWARD_EDITED, configs.FORWARD_FP32)
    top = offsets = tile_list = squares = found = call.q
    if block_mask:
        top, found = _launch_score_forward(call)
        offsets, tile_list = lists(found == KEPT)
        if save:
            squares = torch.zeros(call.tiles_of(config), dtype=torch.int8, device=o.device)
    _attention_forward_kernel[call.grid_of_queries(config)](
        **call.arguments, top_ptr=top, offsets_ptr=offsets, list_ptr=tile_list, o_ptr=o,
        theta_ptr=theta, o2_ptr=o2, support_ptr=o, squares_ptr=squares,
        n_tiles=call.n_tiles(config), n_squares=call.n_squares[1],
        HAS_BLOCK_MASK=block_mask, SAVE=save, IS_COUNT=count,
        **call.blocks(), **call.flags, **config.meta(), **splits(config),
    )  # fmt: skip
    return found, merged(squares, config) if save and block_mask else squares


def launch_attention_forward(call: Attention) -> tuple[Tensor, Tiles]:
    """o, and if ``save``: theta, o2 and the flags of the squares that do matter."""
    q, save, block_mask = call.q, call.save, call.square > 0
    o = torch.zeros(*q.shape[:3], call.v.shape[-1], dtype=q.dtype, device=q.device)
    theta = torch.full(q.shape[:3] if save else (0,), DEAD.value, device=q.device)
    o2 = torch.zeros(o.shape if save else (0,), device=q.device)
    squares = Tiles.fake(call).squares.zero_()
    if call.is_empty:
        return o, Tiles(theta, o2, squares)
    _, exact = _launch_output_forward(problem(call), o, theta, o2, block_mask, save, count=False)
    return o, Tiles(theta, o2, exact if save and block_mask else squares)


def launch_attention_stats(call: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Support and tau of each query; per head the squares with a weight, visited, visible."""
    q, alpha = call.q, call.alpha
    B, H, N_q, _ = q.shape
    support = torch.zeros(B, H, N_q, dtype=torch.int32, device=q.device)
    theta = torch.full((B, H, N_q), DEAD.value, device=q.device)
    if call.is_empty:
        none = (torch.zeros(B, H, dtype=torch.int64, device=q.device) for _ in range(3))
        return support.long(), torch.full_like(theta, torch.nan), *none
    given = problem(call)
    found, exact = _launch_output_forward(given, support, theta, theta, True, True, count=True)
    s = given.arguments["s"] if alpha is None else alpha.detach().float().reshape(-1, 1) - 1
    tau = (s * theta - 1).masked_fill(theta == DEAD.value, torch.nan)

    def per_head(flags: Tensor) -> Tensor:
        count = flags.sum((1, 2)).view(given.sequences.n, H)
        return count.sum(0, keepdim=True) if given.sequences.packed else count

    visited, seen = per_head(found == KEPT), per_head(found >= SEEN)
    return support.long(), tau, per_head(exact != 0), visited, seen
