"""Attention backward from theta and delta = do . o2: dq and alpha by rows, dk, dv by columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels.triton import dot, tiles

from . import configs
from .forward import LENGTHS, exponent_of, start_of
from .problem import SQUARE, lists, problem, rows_contiguous
from .weights import DEAD, curvature, edit_scores, key_range, query_range, weight_pair


@triton.jit(do_not_specialize=LENGTHS)
def _dq_backward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    do_ptr, theta_ptr, delta_ptr, offsets_ptr, list_ptr, dq_ptr, ds_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_ob, stride_oh, stride_on,
    s, scale, window, n_iter, H, G, N_q, N_k, batch_step, n_tiles, n_squares,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    P: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SEQUENCES: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
    HAS_BLOCK_MASK: tl.constexpr, NEED_ALPHA: tl.constexpr,
):  # fmt: skip
    """dq = scale sum u (dp - delta) k; ds = -sum h (dp - delta), per row, if NEED_ALPHA."""
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
    p_do = do_ptr + i_b * stride_ob + i_h * stride_oh + start * stride_on
    p_k = k_ptr + i_b * stride_kb + (i_h // G) * stride_kh + start * stride_kn
    p_v = v_ptr + i_b * stride_vb + (i_h // G) * stride_vh + start * stride_vn
    p_m = mask_ptr + i_b * stride_mb + i_h * stride_mh + start * stride_mq + start * stride_mk
    p_a = bias_ptr + i_b * stride_ab + i_h * stride_ah + start * stride_aq + start * stride_ak
    row = (i_b * H + i_h) * N_q + start
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, BLOCK_D] and [BLOCK_Q, BLOCK_DV]
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
    b_do = tiles.load_tile(p_do, i_q * BLOCK_Q, n_q, stride_on, BLOCK_Q, D_V, BLOCK_DV)
    b_theta = tiles.load_row(theta_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q, DEAD)
    b_delta = tiles.load_row(delta_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q)
    if HAS_BLOCK_MASK:
        p_list = list_ptr + i_bh * n_tiles * n_squares
        low = tl.load(offsets_ptr + i_bh * (n_tiles + 1) + i_q) * SPLIT
        high = tl.load(offsets_ptr + i_bh * (n_tiles + 1) + i_q + 1) * SPLIT
    else:
        p_list = list_ptr
        low, high = key_range(i_q, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if NEED_ALPHA:
        b_ds = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(low, high):
        if HAS_BLOCK_MASK:
            i_k = tl.load(p_list + t // SPLIT) * SPLIT + t % SPLIT
        else:
            i_k = t
        b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, stride_vn, BLOCK_K, D_V, BLOCK_DV)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        b_s = edit_scores(
            dot.dot(b_q, tl.trans(b_k)) * scale, o_q[:, None], o_k[None, :], n_q, n_k, window,
            slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
            IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        b_g, b_y = weight_pair(b_s, b_theta[:, None], s, p, P, FAST)
        b_dp = dot.dot(b_do, tl.trans(b_v)) - b_delta[:, None]
        b_dq = dot.dot_acc((b_g * b_dp).to(b_k.dtype), b_k, b_dq)
        if NEED_ALPHA:
            b_ds -= tl.sum(curvature(b_y, b_g, s, FAST) * b_dp, 1)
    tiles.store_tile(dq_ptr + row * D, b_dq * scale, i_q * BLOCK_Q, n_q, D, BLOCK_Q, D, BLOCK_D)
    if NEED_ALPHA:
        tiles.store_row(ds_ptr + row, b_ds, i_q * BLOCK_Q, n_q, BLOCK_Q)


@triton.jit(do_not_specialize=LENGTHS)
def _dkdv_backward_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, slopes_ptr, mask_ptr, bias_ptr, sequences_ptr,
    do_ptr, theta_ptr, delta_ptr, offsets_ptr, list_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_ob, stride_oh, stride_on,
    s, scale, window, n_iter, H, G, N_q, N_k, batch_step, n_tiles, n_squares,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    P: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SEQUENCES: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr, HAS_BLOCK_MASK: tl.constexpr,
):  # fmt: skip
    """dv = sum p do, dk = scale sum u (dp - delta) q, over the query heads that share the key."""
    i_k = tl.program_id(0) % n_tiles
    i_bg = (tl.program_id(0) // n_tiles).to(tl.int64)
    H_kv = H // G
    i_s, i_g = i_bg // H_kv, i_bg % H_kv
    start, n_q, n_k = start_of(i_s, N_q, N_k, sequences_ptr, HAS_SEQUENCES)
    if i_k * BLOCK_K >= n_k:
        return
    i_b = i_s * batch_step
    p_k = k_ptr + i_b * stride_kb + i_g * stride_kh + start * stride_kn
    p_v = v_ptr + i_b * stride_vb + i_g * stride_vh + start * stride_vn
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    # [BLOCK_K, BLOCK_D] and [BLOCK_K, BLOCK_DV]
    b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
    b_v = tiles.load_tile(p_v, i_k * BLOCK_K, n_k, stride_vn, BLOCK_K, D_V, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for g in range(G):
        i_h = i_g * G + g
        s_h, p_h = exponent_of(alpha_ptr, i_h, s, HAS_ALPHA)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + i_h)
        p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + start * stride_qn
        p_do = do_ptr + i_b * stride_ob + i_h * stride_oh + start * stride_on
        p_m = mask_ptr + i_b * stride_mb + i_h * stride_mh + start * stride_mq + start * stride_mk
        p_a = bias_ptr + i_b * stride_ab + i_h * stride_ah + start * stride_aq + start * stride_ak
        row = (i_b * H + i_h) * N_q + start
        i_sh = i_s * H + i_h
        if HAS_BLOCK_MASK:
            p_list = list_ptr + i_sh * n_tiles * n_squares
            low = tl.load(offsets_ptr + i_sh * (n_tiles + 1) + i_k) * SPLIT
            high = tl.load(offsets_ptr + i_sh * (n_tiles + 1) + i_k + 1) * SPLIT
        else:
            p_list = list_ptr
            low, high = query_range(i_k, n_q, n_k, window, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW)
        for t in range(low, high):
            if HAS_BLOCK_MASK:
                i_q = tl.load(p_list + t // SPLIT) * SPLIT + t % SPLIT
            else:
                i_q = t
            o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
            b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, stride_qn, BLOCK_Q, D, BLOCK_D)
            b_do = tiles.load_tile(p_do, i_q * BLOCK_Q, n_q, stride_on, BLOCK_Q, D_V, BLOCK_DV)
            b_theta = tiles.load_row(theta_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q, DEAD)
            b_delta = tiles.load_row(delta_ptr + row, i_q * BLOCK_Q, n_q, BLOCK_Q)
            # [BLOCK_K, BLOCK_Q]
            b_s = edit_scores(
                dot.dot(b_k, tl.trans(b_q)) * scale, o_q[None, :], o_k[:, None], n_q, n_k, window,
                slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak,
                IS_CAUSAL, HAS_WINDOW, HAS_ALIBI, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
            b_g, b_y = weight_pair(b_s, b_theta[None, :], s_h, p_h, P, FAST)
            b_dv = dot.dot_acc(b_y.to(b_do.dtype), b_do, b_dv)
            b_dp = dot.dot(b_v, tl.trans(b_do)) - b_delta[None, :]
            b_dk = dot.dot_acc((b_g * b_dp).to(b_q.dtype), b_q, b_dk)
    row = (i_b * H_kv + i_g) * N_k + start
    tiles.store_tile(dk_ptr + row * D, b_dk * scale, i_k * BLOCK_K, n_k, D, BLOCK_K, D, BLOCK_D)
    tiles.store_tile(dv_ptr + row * D_V, b_dv, i_k * BLOCK_K, n_k, D_V, BLOCK_K, D_V, BLOCK_DV)


def launch_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    o2: Tensor,
    squares: Tensor,
    keys: Tensor,
    counts: Tensor,
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
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dalpha (H,) if needed; the gradient of bias is another backend's."""
    B, H, N_q, _ = q.shape
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    ds = torch.zeros((B, H, N_q) if need_alpha else (0,), device=q.device)
    no_bias = torch.zeros(0, device=q.device)
    if o2.numel() == 0 or k.shape[2] == 0:
        return dq, dk, dv, torch.zeros(H if need_alpha else 0, device=q.device), no_bias
    call = problem(
        q, k, v, alpha, value, is_causal, varlen, cu_seqlens, mask, bias, slopes, window, scale,
        n_iter,
    )  # fmt: skip
    do = rows_contiguous(do)
    delta = torch.linalg.vecdot(do.float(), o2)
    shared = {
        **call.arguments,
        "do_ptr": do,
        "theta_ptr": theta,
        "delta_ptr": delta,
        **{f"stride_o{name}": do.stride(i) for i, name in enumerate("bhn")},
        **call.blocks(),
        **call.flags,
        "HAS_BLOCK_MASK": block_mask,
    }
    T_q, T_k = call.n_tiles(SQUARE), triton.cdiv(k.shape[2], SQUARE)
    offsets = tile_list = call.q
    if block_mask:
        offsets, tile_list = lists(squares)
    config = call.pick(configs.DQ, configs.DQ_EDITED)
    _dq_backward_kernel[call.grid_of_queries(SQUARE)](
        **shared, offsets_ptr=offsets, list_ptr=tile_list, dq_ptr=dq, ds_ptr=ds, n_tiles=T_q,
        n_squares=T_k, SPLIT=SQUARE // config["BLOCK_K"], NEED_ALPHA=need_alpha, **config.meta(),
    )  # fmt: skip
    if block_mask:
        offsets, tile_list = lists(squares.transpose(-1, -2))
    config = call.pick(configs.DKDV, configs.DKDV_EDITED)
    _dkdv_backward_kernel[call.grid_of_keys(SQUARE)](
        **shared, offsets_ptr=offsets, list_ptr=tile_list, dk_ptr=dk, dv_ptr=dv, n_tiles=T_k,
        n_squares=T_q, SPLIT=SQUARE // config["BLOCK_Q"], **config.meta(),
    )  # fmt: skip
    return dq, dk, dv, ds.sum((0, 2)) if need_alpha else ds, no_bias
