"""What the kernels share on the device: the factors of window and landmarks, and their bounds."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = 1.0 / math.log(2.0)
FAR = tl.constexpr(1.0e9)  # windows are cut to this before they become integers
DEAD = tl.constexpr(-1.0e30)  # exponent of a pair that is not attended


@triton.jit
def window_factor(b_p, o_k, b_w, b_start, ramp):
    """m = clamp((R + w - d) / R, 0, 1) of a tile; 0 outside the row's sequence and future."""
    b_d = b_p - o_k
    b_m = tl.minimum(tl.maximum((b_w + ramp - b_d.to(tl.float32)) / ramp, 0.0), 1.0)
    return tl.where((b_d >= 0) & (o_k >= b_start), b_m, 0.0)


@triton.jit
def landmark_factor(b_p, b_l, b_w, b_start, ramp):
    """1 - m of landmarks, clamp((d - w) / R, 0, 1); 0 for empty slots and other sequences."""
    b_d = b_p - b_l
    b_u = tl.minimum(tl.maximum((b_d.to(tl.float32) - b_w) / ramp, 0.0), 1.0)
    return tl.where((b_l >= 0) & (b_l >= b_start), b_u, 0.0)


@triton.jit
def soft_edge(b_p, first, b_w, ramp, BLOCK_K: tl.constexpr):
    """clamp((R + w - d) / R, 0, 1) of the keys from first on, wherever they are. -> [Q, K]"""
    # w - d as a sum of two vectors: 0 or more exactly where d <= w
    o_k = tl.arange(0, BLOCK_K).to(tl.float32)
    b_t = (b_w - (b_p - first).to(tl.float32))[:, None] + o_k[None, :]
    return tl.where(b_t >= 0.0, 1.0, tl.maximum(b_t + ramp, 0.0) * (1.0 / ramp))


@triton.jit
def hide_window(b_s, b_p, first, b_w, b_start, ramp, IS_HARD: tl.constexpr):
    """b_s [Q, K] of the keys from first on, -inf where m = 0."""
    o_k = tl.arange(0, b_s.shape[1])
    b_low = b_start
    if IS_HARD:
        b_low = tl.maximum(b_p - tl.minimum(b_w, FAR).to(tl.int32), b_start)
    else:
        b_edge = soft_edge(b_p, first, b_w, ramp, b_s.shape[1])
        b_s = tl.where(b_edge > 0.0, b_s, float("-inf"))
    # low <= o_k <= p in one comparison: a negative number is a large one without its sign
    b_d = (first + o_k)[None, :] - b_low[:, None]
    b_is_seen = (
        b_d.to(tl.uint32, bitcast=True) <= (b_p - b_low).to(tl.uint32, bitcast=True)[:, None]
    )
    return tl.where(b_is_seen, b_s, float("-inf"))


@triton.jit
def hide_landmarks(b_s, b_p, b_l, b_w, b_start, ramp, IS_HARD: tl.constexpr):
    """b_s [Q, K] of the landmarks b_l, -inf where 1 - m = 0."""
    if IS_HARD:
        b_far = b_p - tl.minimum(b_w, FAR).to(tl.int32)
        # an empty slot lies behind every query
        b_is_far = tl.where(b_l >= 0, b_l, 2147483647)[None, :] < b_far[:, None]
        b_is_seen = b_is_far & (b_l[None, :] >= b_start[:, None])
    else:
        b_is_seen = (
            landmark_factor(b_p[:, None], b_l[None, :], b_w[:, None], b_start[:, None], ramp) > 0.0
        )
    return tl.where(b_is_seen, b_s, float("-inf"))


@triton.jit
def first_key(b_p, b_w, b_start, ramp):
    """A key before which the row's window certainly has no weight."""
    reach = tl.ceil(tl.minimum(b_w + ramp, FAR)).to(tl.int32)
    return tl.maximum(b_p - reach + 1, b_start)


@triton.jit
def first_full_key(b_p, b_w, b_start):
    """The first key that lies in the flat part of the row's window."""
    return tl.maximum(b_p - tl.floor(tl.minimum(b_w, FAR)).to(tl.int32), b_start)


@triton.jit
def rows_at(x, i_b, i_h):
    """Where the rows of a head begin in x, a :class:`~shared_kernels.triton.arguments.Rows`."""
    return x.ptr + i_b * x.stride_b + i_h * x.stride_h


@triton.jit
def gather_rows(p, b_i, m_i, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows b_i of the matrix at p -> [BLOCK, BLOCK_D], zeros where not m_i."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = p + b_i.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_x, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def row_limits(start_ptr, list_ptr, o_r, m_r, HAS_STARTS: tl.constexpr, HAS_LISTS: tl.constexpr):
    """First visible key and landmark list of rows o_r -> [BLOCK_Q] each; list -1 beyond n_q."""
    b_start = tl.zeros_like(o_r)
    if HAS_STARTS:
        b_start = tl.load(start_ptr + o_r, mask=m_r, other=0)
    b_list = tl.zeros_like(o_r)
    if HAS_LISTS:
        b_list = tl.load(list_ptr + o_r, mask=m_r, other=-1)
    return b_start, b_list


@triton.jit
def window_tiles(b_p, b_w, b_start, m_r, ramp, n_k, stop, BLOCK_K: tl.constexpr):
    """Key tiles [lo, hi) that rows at b_p < stop may see; from f_0 on only the future is masked."""
    lo = tl.min(tl.where(m_r, first_key(b_p, b_w, b_start, ramp), n_k), 0) // BLOCK_K
    hi = tl.cdiv(stop, BLOCK_K)
    full = tl.max(tl.where(m_r, first_full_key(b_p, b_w, b_start), 0), 0)
    f_0 = tl.minimum(tl.maximum(tl.cdiv(full, BLOCK_K), lo), hi)
    return lo, f_0, hi


@triton.jit
def list_range(b_list, m_r, n_lists, HAS_LISTS: tl.constexpr):
    """Landmark lists [c_0, c_1) of the rows."""
    c_0 = 0
    c_1 = 1
    if HAS_LISTS:
        c_0 = tl.min(tl.where(m_r, b_list, n_lists), 0)
        c_1 = tl.max(b_list, 0) + 1
    return c_0, c_1
