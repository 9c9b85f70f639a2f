"""Attention forward: which tiles matter, the threshold by Newton from below, the output.

One program owns BLOCK_Q queries of one head. With a tile list the scores are made once to find the
row maxima and the tiles that can matter (``_score_kernel``); the threshold and the output then
visit only those. Without a list they visit all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, tiles

from . import configs
from .problem import SQUARE, Problem, lists, problem
from .weights import DEAD, HIDDEN, edit_scores, key_range, theta_step, weight_pair

LENGTHS = ["N_q", "N_k", "window", "n_iter", "n_tiles", "n_squares"]


@triton.jit
def start_of(i_b, N_q, N_k, sequences_ptr, HAS_SEQUENCES: tl.constexpr):
    """Start and lengths of sequence i_b: start, n_q, n_k."""
    if HAS_SEQUENCES:
        p_sequence = sequences_ptr + 3 * i_b
        start = tl.load(p_sequence).to(tl.int64)
        return start, tl.load(p_sequence + 1), tl.load(p_sequence + 2)
    else:
        return 0, N_q, N_k


@triton.jit
def exponent_of(alpha_ptr, i_h, s, HAS_ALPHA: tl.constexpr):
    if HAS_ALPHA:
        s = tl.maximum(tl.load(alpha_ptr + i_h) - 1.0, 9.5367431640625e-07)
    return s, 1.0 / s


@triton.jit(do_not_specialize=LENGTHS)
def _score_forward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    top_ptr, squares_ptr,
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
    """The maximum of each row, and a flag for each tile that holds a score within 1/s of it."""
    # who am I: longest rows first
    i_q = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    start, n_q, n_k = start_of(i_b, N_q, N_k, sequences_ptr, HAS_SEQUENCES)
    if i_q * BLOCK_Q >= n_q:
        return
    i_b = i_b * batch_step
    s, p = exponent_of(alpha_ptr, i_h, s, HAS_ALPHA)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + i_h)
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + start * stride_qn
    p_k = k_ptr + i_b * stride_kb + (i_h // G) * stride_kh + start * stride_kn
    p_m = mask_ptr + i_b * stride_mb + i_h * stride_mh + start * stride_mq + start * stride_mk
    p_a = bias_ptr + i_b * stride_ab + i_h * stride_ah + start * stride_aq + start * stride_ak
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
    b_top = tl.full([BLOCK_Q], HIDDEN, tl.float32)
    low, high = key_range(i_q, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
    p_squares = squares_ptr + (i_bh * n_tiles + i_q) * n_squares
    for t in range(low, high):
        # The diagonal first: its maximum already rules out most of what follows.
        i_k = high - 1 - (t - low)
        # [BLOCK_K, BLOCK_D]
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        b_s = edit_scores(
            dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], n_q, n_k, window,
            slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
            IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        b_tile = tl.max(b_s, 1)
        b_top = tl.maximum(b_top, b_tile)
        # Not (below): a NaN keeps its tile.
        b_out = (b_tile < b_top - p) | (b_tile < 0.5 * HIDDEN)
        keep = tl.max(tl.where(b_out, 0, 1), 0)
        tl.store(p_squares + i_k, keep.to(tl.int8))
    row = (i_b * H + i_h) * N_q + start
    tiles.store_row(top_ptr + row, b_top, i_q * BLOCK_Q, n_q, BLOCK_Q)


@triton.jit(do_not_specialize=LENGTHS)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    top_ptr, offsets_ptr, list_ptr, o_ptr, theta_ptr, o2_ptr, squares_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    s, scale, window, n_iter, H, G, N_q, N_k, batch_step, n_tiles, n_squares,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    P: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SEQUENCES: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
    HAS_BLOCK_MASK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """theta by Newton, then o = sum p v and, if SAVE, o2 = sum u v / sum u and the exact flags."""
    # who am I: longest rows first
    i_q = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    start, n_q, n_k = start_of(i_b, N_q, N_k, sequences_ptr, HAS_SEQUENCES)
    if i_q * BLOCK_Q >= n_q:
        return
    i_b = i_b * batch_step
    s, p = exponent_of(alpha_ptr, i_h, s, HAS_ALPHA)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + i_h)
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + start * stride_qn
    p_k = k_ptr + i_b * stride_kb + (i_h // G) * stride_kh + start * stride_kn
    p_v = v_ptr + i_b * stride_vb + (i_h // G) * stride_vh + start * stride_vn
    p_m = mask_ptr + i_b * stride_mb + i_h * stride_mh + start * stride_mq + start * stride_mk
    p_a = bias_ptr + i_b * stride_ab + i_h * stride_ah + start * stride_aq + start * stride_ak
    row = (i_b * H + i_h) * N_q + start
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, BLOCK_D]
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
    if HAS_BLOCK_MASK:
        p_list = list_ptr + i_bh * n_tiles * n_squares
        low = tl.load(offsets_ptr + i_bh * (n_tiles + 1) + i_q) * SPLIT
        high = tl.load(offsets_ptr + i_bh * (n_tiles + 1) + i_q + 1) * SPLIT
        b_top = tiles.load_row(top_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q, HIDDEN)
    else:
        p_list = list_ptr
        low, high = key_range(i_q, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
        b_top = tl.full([BLOCK_Q], HIDDEN, tl.float32)
        for i_k in range(low, high):
            b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_s = edit_scores(
                dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], n_q, n_k, window,
                slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
                IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
            b_top = tl.maximum(b_top, tl.max(b_s, 1))
    # Newton from the maximum, a lower bound of theta, while some row still weighs more than 1
    b_theta = tl.where(b_top < 0.5 * HIDDEN, DEAD, b_top)
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        b_F = tl.zeros([BLOCK_Q], tl.float32)
        b_G = tl.zeros([BLOCK_Q], tl.float32)
        for t in range(low, high):
            if HAS_BLOCK_MASK:
                i_k = tl.load(p_list + t // SPLIT) * SPLIT + t % SPLIT
            else:
                i_k = t
            b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_s = edit_scores(
                dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], n_q, n_k, window,
                slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
                IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
            b_g, b_y = weight_pair(b_s, b_theta[:, None], s, p, P, FAST)
            b_F += tl.sum(b_y, 1)
            b_G += tl.sum(b_g, 1)
        b_theta += theta_step(b_F, b_G, s, p, P)
        it += 1
        go = tl.max((b_F > 1.00001).to(tl.int32), 0)

    # output
    b_o = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    b_F = tl.zeros([BLOCK_Q], tl.float32)
    if SAVE:
        b_o2 = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        b_G = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(low, high):
        if HAS_BLOCK_MASK:
            i_k = tl.load(p_list + t // SPLIT) * SPLIT + t % SPLIT
        else:
            i_k = t
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_s = edit_scores(
            dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], n_q, n_k, window,
            slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
            IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        # [BLOCK_K, BLOCK_DV]
        b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, stride_vn, BLOCK_K, D_V, BLOCK_DV)
        b_g, b_y = weight_pair(b_s, b_theta[:, None], s, p, P, FAST)
        b_F += tl.sum(b_y, 1)
        b_o = dot.dot_acc(b_y.to(b_v.dtype), b_v, b_o)
        if SAVE:
            b_G += tl.sum(b_g, 1)
            b_o2 = dot.dot_acc(b_g.to(b_v.dtype), b_v, b_o2)
            if HAS_BLOCK_MASK:
                keep = tl.max(tl.max(tl.where(b_g == 0.0, 0, 1), 1), 0)
                p_square = squares_ptr + (i_bh * n_tiles + i_q) * n_squares * SPLIT + i_k
                tl.store(p_square, keep.to(tl.int8))
    b_o = b_o / tl.where(b_F == 0.0, 1.0, b_F)[:, None]
    tiles.store_tile(o_ptr + row * D_V, b_o, i_q * BLOCK_Q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)
    if SAVE:
        tiles.store_row(theta_ptr + row, b_theta, i_q * BLOCK_Q, n_q, BLOCK_Q)
        b_o2 = b_o2 / tl.where(b_G == 0.0, 1.0, b_G)[:, None]
        tiles.store_tile(o2_ptr + row * D_V, b_o2, i_q * BLOCK_Q, n_q, D_V, BLOCK_Q, D_V, BLOCK_DV)


def _launch_score_forward(call: Problem) -> tuple[Tensor, Tensor]:
    """Row maxima (B, H, N_q) and flags (sequences * H, T_q, T_k) of the squares that may matter."""
    B, H, N_q, _ = call.q.shape
    config = call.pick(configs.SCORE, configs.SCORE_EDITED)
    T_q, T_k = call.n_tiles(SQUARE), triton.cdiv(call.k.shape[2], SQUARE)
    split = SQUARE // config["BLOCK_K"]
    top = torch.empty(B, H, N_q, device=call.q.device)
    squares = torch.zeros(
        call.sequences.n * H, T_q, T_k * split, dtype=torch.int8, device=call.q.device
    )
    _score_forward_kernel[call.grid_of_queries(SQUARE)](
        **call.arguments, top_ptr=top, squares_ptr=squares, n_tiles=T_q, n_squares=T_k * split,
        **call.blocks(), **call.flags, **config.meta(),
    )  # fmt: skip
    return top, _merged(squares, split)


def _merged(squares: Tensor, split: int) -> Tensor:
    """Flags of whole squares from those of their parts."""
    if split == 1:
        return squares
    return squares.unflatten(-1, (-1, split)).amax(-1)


def launch_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    value: float,
    is_causal: bool,
    varlen: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    window: int | None,
    scale: float,
    n_iter: int,
    block_mask: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, and if ``save``: theta, o2 and the flags of the squares that do matter."""
    B, H, N_q, _ = q.shape
    D_v = v.shape[-1]
    o = torch.zeros(B, H, N_q, D_v, dtype=q.dtype, device=q.device)
    theta = torch.full((B, H, N_q) if save else (0,), DEAD.value, device=q.device)
    o2 = torch.zeros(o.shape if save else (0,), device=q.device)
    nothing = (o.new_empty(0, dtype=torch.int32), o.new_empty(0, dtype=torch.int32))
    if o.numel() == 0 or k.shape[2] == 0:
        return o, theta, o2, o.new_empty(0, dtype=torch.int8), *nothing
    call = problem(
        q, k, v, alpha, value, is_causal, varlen, cu_seqlens, mask, bias, slopes, window, scale,
        n_iter,
    )  # fmt: skip
    config = call.pick(configs.FORWARD, configs.FORWARD_EDITED)
    split = SQUARE // config["BLOCK_K"]
    T_q, T_k = call.n_tiles(SQUARE), triton.cdiv(k.shape[2], SQUARE)
    top = offsets = tile_list = squares = call.q
    if block_mask:
        top, flags = _launch_score_forward(call)
        offsets, tile_list = lists(flags)
        if save:
            squares = torch.zeros(
                call.sequences.n * H, T_q, T_k * split, dtype=torch.int8, device=q.device
            )
    _attention_forward_kernel[call.grid_of_queries(SQUARE)](
        **call.arguments, top_ptr=top, offsets_ptr=offsets, list_ptr=tile_list, o_ptr=o,
        theta_ptr=theta, o2_ptr=o2, squares_ptr=squares, n_tiles=T_q, n_squares=T_k,
        SPLIT=split, HAS_BLOCK_MASK=block_mask, SAVE=save,
        **call.blocks(), **call.flags, **config.meta(),
    )  # fmt: skip
    if not (save and block_mask):
        return o, theta, o2, o.new_empty(0, dtype=torch.int8), *nothing
    return o, theta, o2, _merged(squares, split), *nothing
