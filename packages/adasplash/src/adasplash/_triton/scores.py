"""Device functions: where a program stands, which tiles it visits, the scores of a tile."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from shared_kernels.triton import dot, tiles

from .weights import exponent

# Scores of hidden pairs, below every number, also the smallest one that a bias may hold. A row that
# sees nothing has this maximum, LOWEST or 0 in its place where scores are subtracted from it, and
# DEAD as its theta.
HIDDEN = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
DEAD = tl.constexpr(1e30)


class Head(NamedTuple):
    """One head of one sequence: its lengths, and what changes its scores (None: nothing does)."""

    n_q: Any
    n_k: Any
    window: Any
    slope: Any
    p_mask: Any
    stride_mq: Any
    stride_mk: Any
    p_bias: Any
    stride_bq: Any
    stride_bk: Any
    softcap: Any


@triton.jit
def query_program(n_tiles, H):
    """Longest rows first -> tile of queries, sequence, head."""
    i_q = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_sh = (tl.program_id(0) // n_tiles).to(tl.int64)
    return i_q, i_sh // H, i_sh % H


@triton.jit
def sequence_of(i_s, N_q, N_k, sequences_ptr):
    """Start and lengths of sequence i_s: start, n_q, n_k."""
    if sequences_ptr is None:
        return 0, N_q, N_k
    else:
        p_sequence = sequences_ptr + 3 * i_s
        start = tl.load(p_sequence).to(tl.int64)
        return start, tl.load(p_sequence + 1), tl.load(p_sequence + 2)


@triton.jit
def exponent_of(alpha_ptr, i_h, s):
    """s of head i_h, and 1/s."""
    if alpha_ptr is not None:
        s = exponent(tl.load(alpha_ptr + i_h))
    return s, 1.0 / s


@triton.jit
def rows_at(x, i_b, i_h, start):
    """Where the rows of head i_h of a sequence begin in x."""
    return x.ptr + i_b * x.stride_b + i_h * x.stride_h + start * x.stride_n


@triton.jit
def load_rows(rows, row, first_q, n_q, BLOCK_Q: tl.constexpr):
    """top, theta and delta of the queries from first_q on of rows that begin at `row`."""
    b_top = tiles.load_row(rows.top + row, first_q, n_q, BLOCK_Q)
    b_theta = tiles.load_row(rows.theta + row, first_q, n_q, BLOCK_Q, DEAD)
    b_delta = tiles.load_row(rows.delta + row, first_q, n_q, BLOCK_Q)
    return b_top, b_theta, b_delta


@triton.jit
def head_pointers(q, k, v, i_b, i_h, G, start):
    """Where the queries, keys and values of head i_h of a sequence begin."""
    p_q = rows_at(q, i_b, i_h, start)
    return p_q, rows_at(k, i_b, i_h // G, start), rows_at(v, i_b, i_h // G, start)


@triton.jit
def head_of(mask, bias, slopes_ptr, i_b, i_h, start, n_q, n_k, window, softcap=None):
    """Head i_h of a sequence, for :func:`tile_scores`."""
    slope, p_mask, stride_mq, stride_mk = None, None, 0, 0
    p_bias, stride_bq, stride_bk = None, 0, 0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + i_h)
    if mask is not None:
        stride_mq, stride_mk = mask.stride_q, mask.stride_k
        p_mask = mask.ptr + i_b * mask.stride_b + i_h * mask.stride_h
        p_mask += start * (stride_mq + stride_mk)
    if bias is not None:
        stride_bq, stride_bk = bias.stride_q, bias.stride_k
        p_bias = bias.ptr + i_b * bias.stride_b + i_h * bias.stride_h
        p_bias += start * (stride_bq + stride_bk)
    return Head(
        n_q, n_k, window, slope, p_mask, stride_mq, stride_mk, p_bias, stride_bq, stride_bk, softcap
    )


@triton.jit
def tanh(x):
    """tanh x in fp32, with the relative precision of x near 0."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = 62.0 / 2835.0 - y * (1382.0 / 155925.0)
    near = 2.0 / 15.0 - y * (17.0 / 315.0 - y * near)
    near = x * (1.0 - y * (1.0 / 3.0 - y * near))
    return tl.where(y < 0.0625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def cap_slope(b_c, softcap):
    """The derivative of capped products b_c in those without a cap: 1 - tanh^2."""
    b_t = b_c / softcap
    return 1.0 - b_t * b_t


@triton.jit
def tile_scores(
    b_q,
    b_k,
    first_q,
    first_k,
    factor,
    head,
    IS_CAUSAL: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr = False,
):
    """Scores of the queries from first_q on and the keys from first_k on, HIDDEN if not visible.

    -> [BLOCK_Q, BLOCK_K], or [BLOCK_K, BLOCK_Q] if IS_TRANSPOSED; and the capped products of which
    they are made
    """
    o_q = first_q + tl.arange(0, b_q.shape[0])
    o_k = first_k + tl.arange(0, b_k.shape[0])
    if IS_TRANSPOSED:
        b_c = capped(dot.dot(b_k, tl.trans(b_q)) * factor, head)
        b_s = edit_scores(b_c, o_q[None, :], o_k[:, None], first_q, first_k, head, IS_CAUSAL)
    else:
        b_c = capped(dot.dot(b_q, tl.trans(b_k)) * factor, head)
        b_s = edit_scores(b_c, o_q[:, None], o_k[None, :], first_q, first_k, head, IS_CAUSAL)
    return b_s, b_c


@triton.jit
def capped(b_s, head):
    """softcap tanh(b_s / softcap), or b_s where there is no cap."""
    if head.softcap is not None:
        b_s = head.softcap * tanh(b_s / head.softcap)
        # A maximum keeps this product out of a multiply-add with what is subtracted from it next:
        # the difference to another capped score would carry the rounding error of that one.
        b_s = tl.maximum(b_s, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return b_s


@triton.jit
def edit_scores(b_s, q_at, k_at, first_q, first_k, head, IS_CAUSAL: tl.constexpr):
    """Add bias and slopes to a tile of scores and hide what must not be seen.

    q_at and k_at are indices in the sequence that broadcast to the tile.
    """
    BLOCK_Q: tl.constexpr = q_at.shape[0] * q_at.shape[1]
    BLOCK_K: tl.constexpr = k_at.shape[0] * k_at.shape[1]
    offset = head.n_k - head.n_q
    if head.slope is not None:
        b_s -= head.slope * tl.abs(q_at + offset - k_at).to(tl.float32)
    if head.p_bias is not None:
        o_bias = q_at.to(tl.int64) * head.stride_bq + k_at.to(tl.int64) * head.stride_bk
        inside = (q_at < head.n_q) & (k_at < head.n_k)
        b_s += tl.load(head.p_bias + o_bias, mask=inside, other=0.0).to(tl.float32)
    if head.p_mask is not None:
        o_mask = q_at.to(tl.int64) * head.stride_mq + k_at.to(tl.int64) * head.stride_mk
        inside = (q_at < head.n_q) & (k_at < head.n_k)
        b_s = tl.where(tl.load(head.p_mask + o_mask, mask=inside, other=0) != 0, b_s, HIDDEN)
    # Most tiles lie inside of all borders and need no comparison.
    last_q, last_k = first_q + BLOCK_Q - 1, first_k + BLOCK_K - 1
    is_edge = (last_q >= head.n_q) | (last_k >= head.n_k)
    if IS_CAUSAL:
        is_edge = is_edge | (last_k > first_q + offset)
    if head.window is not None:
        is_edge = is_edge | (last_q + offset - first_k >= head.window)
        is_edge = is_edge | (last_k - first_q - offset >= head.window)
    if is_edge:
        distance = q_at + offset - k_at
        seen = (q_at < head.n_q) & (k_at < head.n_k)
        if IS_CAUSAL:
            seen = seen & (distance >= 0)
        if head.window is not None:
            seen = seen & (distance < head.window) & (distance > -head.window)
        b_s = tl.where(seen, b_s, HIDDEN)
    return b_s


@triton.jit
def key_scores(
    b_q,
    p_k,
    stride_kn,
    first_q,
    i_k,
    factor,
    head,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """:func:`tile_scores` with key tile i_k, which is loaded. -> [BLOCK_Q, BLOCK_K]"""
    BLOCK_D: tl.constexpr = b_q.shape[1]
    # [BLOCK_K, BLOCK_D]
    b_k = tiles.load_tile(p_k, i_k * BLOCK_K, head.n_k, stride_kn, BLOCK_K, D, BLOCK_D)
    b_s, _ = tile_scores(b_q, b_k, first_q, i_k * BLOCK_K, factor, head, IS_CAUSAL)
    return b_s


@triton.jit
def key_range(i_q, head, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """First and last + 1 key tile that the queries of tile i_q may see."""
    offset = head.n_k - head.n_q
    first = i_q * BLOCK_Q + offset
    last = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, head.n_q) - 1 + offset
    low, high = 0, head.n_k
    if IS_CAUSAL:
        high = tl.minimum(high, last + 1)
    if head.window is not None:
        low = tl.maximum(low, first - head.window + 1)
        high = tl.minimum(high, last + head.window)
    high = tl.maximum(high, 0)
    return low // BLOCK_K, tl.cdiv(high, BLOCK_K)


@triton.jit
def query_range(i_k, head, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """First and last + 1 query tile that may see the keys of tile i_k."""
    offset = head.n_k - head.n_q
    first = i_k * BLOCK_K - offset
    last = tl.minimum(i_k * BLOCK_K + BLOCK_K, head.n_k) - 1 - offset
    low, high = 0, head.n_q
    if IS_CAUSAL:
        low = tl.maximum(low, first)
    if head.window is not None:
        low = tl.maximum(low, first - head.window + 1)
        high = tl.minimum(high, last + head.window)
    high = tl.maximum(high, 0)
    return low // BLOCK_Q, tl.cdiv(high, BLOCK_Q)


@triton.jit
def tiles_per_side(BLOCK: tl.constexpr):
    """How many tiles of BLOCK make the side of a square that is kept or skipped."""
    return 64 // BLOCK  # SQUARE of _call.py: a constexpr is no int in the interpreter


@triton.jit
def list_of(
    visits, i_sh, i_tile, n_tiles, n_squares, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr
):
    """The list of tile i_tile, one of n_tiles of BLOCK rows, among n_squares columns of squares.

    -> its start, first and last + 1 of its tiles of BLOCK_OTHER columns
    """
    n_rows = n_tiles // tiles_per_side(BLOCK)
    p_offset = visits.offsets + i_sh * (n_rows + 1) + i_tile // tiles_per_side(BLOCK)
    n_each = tiles_per_side(BLOCK_OTHER)
    low, high = tl.load(p_offset) * n_each, tl.load(p_offset + 1) * n_each
    return visits.tiles + i_sh * n_rows * n_squares, low, high


@triton.jit
def tile_at(p_list, t, BLOCK: tl.constexpr):
    """The t-th tile of BLOCK to visit, in the squares of a list; without a list the t-th of all."""
    if p_list is None:
        return t
    else:
        n_each = tiles_per_side(BLOCK)
        return tl.load(p_list + t // n_each) * n_each + t % n_each


@triton.jit
def keys_to_visit(
    visits,
    i_sh,
    i_q,
    n_tiles,
    n_squares,
    head,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """The list of the key tiles of query tile i_q, or None for all that it may see; its range."""
    if visits is None:
        low, high = key_range(i_q, head, BLOCK_Q, BLOCK_K, IS_CAUSAL)
        return None, low, high
    else:
        return list_of(visits, i_sh, i_q, n_tiles, n_squares, BLOCK_Q, BLOCK_K)
