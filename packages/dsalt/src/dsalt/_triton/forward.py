"""Forward: one program per tile of queries of one head, window tiles first, landmark lists after.

Scores are products of queries and keys as they are, biases in their unit; -inf hides a pair.
`scale` makes powers of 2 of their differences to the largest one of the row, and the factors of a
soft window multiply these. Packed sequences cost one vector of row starts, block-causal landmarks
one vector of list numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.configs import Config, Table
from shared_kernels.triton import dot, math, tiles
from shared_kernels.triton.arguments import Rows, units

from .._call import Attention, Normalized
from . import configs
from .band import (
    LOG2E,
    gather_rows,
    hide_landmarks,
    hide_window,
    landmark_factor,
    list_range,
    row_limits,
    rows_at,
    soft_edge,
    window_tiles,
)


@triton.jit
def _powers(b_s, b_bias, scale, b_top):
    """2^(scale (b_s - top + bias)) of a tile [Q, K], what it shrinks earlier ones by, the new top.

    b_bias [1, K] is added last: beside a large score it would lose its digits. None stands for 0.
    """
    b_most = b_s if b_bias is None else b_s + b_bias
    b_next = tl.maximum(b_top, tl.max(b_most, 1))
    # No difference of infinities in a row that has seen nothing yet.
    b_base = tl.where(b_next == float("-inf"), 0.0, b_next)
    b_x = b_s - b_base[:, None]
    if b_bias is not None:
        b_x += b_bias
    return tl.exp2(b_x * scale), tl.exp2((b_top - b_base) * scale), b_next


@triton.jit
def _add(b_e, b_shrink, b_v, b_z, b_o, PRECISION: tl.constexpr):
    """The sums z and o [Q, D] after a tile of weights b_e [Q, K] of values b_v [K, D]."""
    b_z = b_z * b_shrink + tl.sum(b_e, 1)
    b_o = dot.dot_acc(math.cast(b_e, b_v.dtype), b_v, b_o * b_shrink[:, None], PRECISION)
    return b_z, b_o


@triton.jit(do_not_specialize=["n_q", "n_k", "n_lists", "n_slots"])
def _attention_forward_kernel(
    q,
    k,
    v,
    w_ptr,
    l_ptr,
    bias_ptr,
    start_ptr,
    list_ptr,
    o_ptr,
    top_ptr,
    lse_ptr,
    scale,
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
    IS_HARD: tl.constexpr,
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
    # load
    # [BLOCK_Q, BLOCK_D]
    p_q = rows_at(q, i_b, i_h)
    b_q = tiles.load_tile(p_q, i_q * BLOCK_Q, n_q, q.stride_n, BLOCK_Q, D, BLOCK_D)
    # [BLOCK_Q]
    b_w = tiles.load_row(w_ptr + i_bh * n_q, i_q * BLOCK_Q, n_q, BLOCK_Q)
    b_start, b_list = row_limits(start_ptr, list_ptr, o_r, m_r, HAS_STARTS, HAS_LISTS)
    b_top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_z = tl.zeros([BLOCK_Q], tl.float32)
    b_o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    # loop over the window: tiles inside every row's window, from f_0 to f_1, hide no pair
    stop = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n_q) + (n_k - n_q)
    lo, f_0, hi = window_tiles(b_p, b_w, b_start, m_r, ramp, n_k, stop, BLOCK_K)
    f_1 = (i_q * BLOCK_Q + n_k - n_q + 1) // BLOCK_K
    for i_k in range(lo, hi):
        first = i_k * BLOCK_K
        # [BLOCK_K, BLOCK_D]
        b_k = tiles.load_tile(p_k, first, n_k, k.stride_n, BLOCK_K, D, BLOCK_D)
        b_v = tiles.load_tile(p_v, first, n_k, v.stride_n, BLOCK_K, D, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        b_s = dot.dot(b_q, tl.trans(b_k), PRECISION)
        if (i_k < f_0) | (i_k >= f_1):
            b_s = hide_window(b_s, b_p, first, b_w, b_start, ramp, IS_HARD)
        b_e, b_shrink, b_top = _powers(b_s, None, scale, b_top)
        if not IS_HARD:
            if i_k < f_0:
                b_e *= soft_edge(b_p, first, b_w, ramp, BLOCK_K)
        b_z, b_o = _add(b_e, b_shrink, b_v, b_z, b_o, PRECISION)
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
        # [BLOCK_K, BLOCK_D]
        b_k = gather_rows(p_k, b_l, b_l >= 0, k.stride_n, D, BLOCK_D)
        b_v = gather_rows(p_v, b_l, b_l >= 0, v.stride_n, D, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        b_s = dot.dot(b_q, tl.trans(b_k), PRECISION)
        b_bias = None
        if HAS_BIAS:
            b_bias = tl.load(bias_ptr + o_s, mask=m_l, other=0.0)[None, :]
        b_s = hide_landmarks(b_s, b_p, b_l, b_w, b_start, ramp, IS_HARD)
        if HAS_LISTS:
            b_s = tl.where((b_list == i_c)[:, None], b_s, float("-inf"))
        b_e, b_shrink, b_top = _powers(b_s, b_bias, scale, b_top)
        if not IS_HARD:
            b_e *= landmark_factor(b_p[:, None], b_l[None, :], b_w[:, None], b_start[:, None], ramp)
        b_z, b_o = _add(b_e, b_shrink, b_v, b_z, b_o, PRECISION)
    # epilogue: a row without a score has the weight 0 for every pair
    b_z = tl.where(b_z == 0.0, 1.0, b_z)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    # store
    p_o = o_ptr + i_bh * n_q * D
    tiles.store_tile(p_o, b_o / b_z[:, None], i_q * BLOCK_Q, n_q, D, BLOCK_Q, D, BLOCK_D)
    tiles.store_row(top_ptr + i_bh * n_q, b_top, i_q * BLOCK_Q, n_q, BLOCK_Q)
    tiles.store_row(lse_ptr + i_bh * n_q, tl.log2(b_z), i_q * BLOCK_Q, n_q, BLOCK_Q)


class Arguments:
    """What every launch of one call shares: sizes, row vectors, tables by dtype."""

    def __init__(self, call: Attention) -> None:
        q, landmarks, bias, block = call.q, call.landmarks, call.bias, call.block
        self.B, self.H, self.n_q, self.D = q.shape
        self.H_kv, self.n_k = call.k.shape[1:3]
        self.n_slots = landmarks.shape[-1]
        self.n_lists = landmarks.shape[2] if block else 1
        self.BLOCK_D = max(16, triton.next_power_of_2(self.D))
        self.target = device.target(q)
        self.is_fp32 = q.dtype == torch.float32
        sign, self.unit = units(call.factor)
        self.q = Rows.of(q if sign == 1.0 else q * sign)
        self.bias = None if bias is None else (bias / self.unit).contiguous()
        start, lists = call.rows()
        self.start, self.lists = start.to(torch.int32), lists.to(torch.int32)
        self.flags = {
            "HAS_STARTS": call.cu_seqlens is not None,
            "HAS_LISTS": block is not None,
            "PRECISION": "ieee",
        }
        self.sizes = (self.H, self.H // self.H_kv, self.n_q, self.n_k, self.n_lists, self.n_slots)
        self.dims = {"D": self.D, "BLOCK_D": self.BLOCK_D}

    def config(self, table: Table, table_fp32: Table) -> Config:
        return (table_fp32 if self.is_fp32 else table).pick(self.target, self.D)


def launch_attention_forward(call: Attention) -> tuple[Tensor, Normalized]:
    a = Arguments(call)
    q, bias = call.q, a.bias
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    top, lse = (torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2))
    if out.numel() == 0:
        return out, Normalized(out, top, lse)
    config = a.config(configs.FORWARD, configs.FORWARD_FP32)
    grid = (triton.cdiv(a.n_q, config["BLOCK_Q"]), a.B * a.H)
    landmarks = call.landmarks.to(torch.int32).contiguous()
    _attention_forward_kernel[grid](
        a.q,
        Rows.of(call.k),
        Rows.of(call.v),
        call.windows.contiguous(),
        landmarks,
        landmarks if bias is None else bias,
        a.start,
        a.lists,
        out,
        top,
        lse,
        a.unit * LOG2E,
        call.ramp,
        *a.sizes,
        **a.dims,
        **a.flags,
        HAS_BIAS=bias is not None,
        IS_HARD=call.hard,
        **config.meta(),
    )
    return out, Normalized(out, top, lse)
