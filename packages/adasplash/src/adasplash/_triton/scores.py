"""Device functions: where a program stands, which tiles it visits, the scores of a tile."""

import triton
import triton.language as tl

from .weights import exponent

# Scores of hidden pairs. A row that sees nothing has this maximum, and DEAD as its theta.
HIDDEN = tl.constexpr(-1e30)
DEAD = tl.constexpr(1e30)


@triton.jit
def query_program(n_tiles, H):
    """Longest rows first -> tile of queries, sequence, head."""
    i_q = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_sh = (tl.program_id(0) // n_tiles).to(tl.int64)
    return i_q, i_sh // H, i_sh % H


@triton.jit
def sequence_of(i_s, N_q, N_k, sequences_ptr, HAS_SEQUENCES: tl.constexpr):
    """Start and lengths of sequence i_s: start, n_q, n_k."""
    if HAS_SEQUENCES:
        p_sequence = sequences_ptr + 3 * i_s
        start = tl.load(p_sequence).to(tl.int64)
        return start, tl.load(p_sequence + 1), tl.load(p_sequence + 2)
    else:
        return 0, N_q, N_k


@triton.jit
def exponent_of(alpha_ptr, i_h, s, HAS_ALPHA: tl.constexpr):
    """s of head i_h, and 1/s."""
    if HAS_ALPHA:
        s = exponent(tl.load(alpha_ptr + i_h))
    return s, 1.0 / s


@triton.jit
def edits_of(
    i_b, i_h, start, n_q, n_k, window, slopes_ptr, mask_ptr, bias_ptr,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah, stride_aq, stride_ak,
    HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """What :func:`edit_scores` needs to know of one sequence and head."""
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + i_h)
    p_m = mask_ptr + i_b * stride_mb + i_h * stride_mh + start * (stride_mq + stride_mk)
    p_a = bias_ptr + i_b * stride_ab + i_h * stride_ah + start * (stride_aq + stride_ak)
    return n_q, n_k, window, slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak


@triton.jit
def edit_scores(
    b_s, q_at, k_at, edits,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add bias and slopes to a tile of scores and hide what must not be seen.

    q_at [BLOCK_Q, 1] and k_at [1, BLOCK_K] are indices in the sequence, or [1, BLOCK_Q] and
    [BLOCK_K, 1] for a transposed tile.
    """
    n_q, n_k, window, slope, p_m, stride_mq, stride_mk, p_a, stride_aq, stride_ak = edits
    inside = (q_at < n_q) & (k_at < n_k)
    distance = q_at + (n_k - n_q) - k_at
    if HAS_ALIBI:
        b_s -= slope * tl.abs(distance).to(tl.float32)
    if HAS_BIAS:
        o_bias = q_at.to(tl.int64) * stride_aq + k_at.to(tl.int64) * stride_ak
        b_s += tl.load(p_a + o_bias, mask=inside, other=0.0).to(tl.float32)
    seen = inside
    if IS_CAUSAL:
        seen = seen & (distance >= 0)
    if HAS_WINDOW:
        seen = seen & (distance < window) & (distance > -window)
    if HAS_MASK:
        o_mask = q_at.to(tl.int64) * stride_mq + k_at.to(tl.int64) * stride_mk
        seen = seen & (tl.load(p_m + o_mask, mask=inside, other=0) != 0)
    return tl.where(seen, b_s, HIDDEN)


@triton.jit
def key_range(
    i_q, n_q, n_k, window,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """First and last + 1 key tile that the queries of tile i_q may see."""
    offset = n_k - n_q
    first, last = i_q * BLOCK_Q + offset, tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n_q) - 1 + offset
    low, high = 0, n_k
    if IS_CAUSAL:
        high = tl.minimum(high, last + 1)
    if HAS_WINDOW:
        low = tl.maximum(low, first - window + 1)
        high = tl.minimum(high, last + window)
    high = tl.maximum(high, 0)
    return low // BLOCK_K, tl.cdiv(high, BLOCK_K)


@triton.jit
def query_range(
    i_k, n_q, n_k, window,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """First and last + 1 query tile that may see the keys of tile i_k."""
    offset = n_k - n_q
    first, last = i_k * BLOCK_K - offset, tl.minimum(i_k * BLOCK_K + BLOCK_K, n_k) - 1 - offset
    low, high = 0, n_q
    if IS_CAUSAL:
        low = tl.maximum(low, first)
    if HAS_WINDOW:
        low = tl.maximum(low, first - window + 1)
        high = tl.minimum(high, last + window)
    high = tl.maximum(high, 0)
    return low // BLOCK_Q, tl.cdiv(high, BLOCK_Q)


@triton.jit
def list_of(
    offsets_ptr, list_ptr, i_sh, i_tile, n_tiles, n_squares,
    SPLIT: tl.constexpr, SPLIT_OTHER: tl.constexpr,
):  # fmt: skip
    """The list of tile i_tile, SPLIT of which make a square: its start, its range of tiles."""
    n_rows, row = n_tiles // SPLIT, i_tile // SPLIT
    p_offset = offsets_ptr + i_sh * (n_rows + 1) + row
    low, high = tl.load(p_offset), tl.load(p_offset + 1)
    return list_ptr + i_sh * n_rows * n_squares, low * SPLIT_OTHER, high * SPLIT_OTHER


@triton.jit
def tile_at(p_list, t, SPLIT: tl.constexpr, HAS_BLOCK_MASK: tl.constexpr):
    """The t-th tile to visit, SPLIT of which make a square of the list; or the t-th of all."""
    if HAS_BLOCK_MASK:
        return tl.load(p_list + t // SPLIT) * SPLIT + t % SPLIT
    else:
        return t
