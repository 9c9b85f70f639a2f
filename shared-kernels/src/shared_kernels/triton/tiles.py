"""Tiles of rows between memory and chip: masked, int64 offsets, any head dim up to its block.

A tile is rows [start, start + BLOCK_N) of a matrix of n rows and D columns, D <= BLOCK_D
(BLOCK_D a power of two). Rows beyond n and columns beyond D are read as zero and never written.
`start` may be a Python int (the interpreter's loop variables are), int32 or int64. `stride` is
the step between rows, `stride_d` between columns, in elements.
"""

import triton
import triton.language as tl

from .math import cast


@triton.jit
def offsets(start, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, stride_d=1):
    """Element offsets of a tile. -> [BLOCK_N, BLOCK_D] int64"""
    o_n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    return o_n[:, None] * stride + o_d[None, :] * stride_d


@triton.jit
def load_tile(
    p,
    start,
    n,
    stride,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    stride_d=1,
):
    """Rows start.. of the matrix at p -> [BLOCK_N, BLOCK_D], zeros outside."""
    m_n = tl.arange(0, BLOCK_N) < n - start
    m_d = tl.arange(0, BLOCK_D) < D
    # One pointer moves from tile to tile: what is added to it for each entry stays the same in a
    # loop, so that 64-bit products are made once.
    p_x = p + tl.cast(start, tl.int64) * stride + offsets(0, stride, BLOCK_N, BLOCK_D, stride_d)
    if D == BLOCK_D:
        return tl.load(p_x, mask=m_n[:, None], other=0.0)
    else:
        return tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_tile(
    p,
    x,
    start,
    n,
    stride,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    stride_d=1,
):
    """x [BLOCK_N, BLOCK_D], rounded to p's dtype, into rows start.. of the matrix at p."""
    o_n = start + tl.arange(0, BLOCK_N)
    m_d = tl.arange(0, BLOCK_D) < D
    p_x = p + offsets(start, stride, BLOCK_N, BLOCK_D, stride_d)
    tl.store(p_x, cast(x, p.dtype.element_ty), mask=(o_n < n)[:, None] & m_d[None, :])


@triton.jit
def load_row(p, start, n, BLOCK_N: tl.constexpr, other=0.0):
    """Entries start.. of the contiguous vector at p -> [BLOCK_N]; `other` beyond n."""
    o_n = start + tl.arange(0, BLOCK_N)
    p_x = p + tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
    return tl.load(p_x, mask=o_n < n, other=other)


@triton.jit
def store_row(p, x, start, n, BLOCK_N: tl.constexpr):
    """x [BLOCK_N], rounded to p's dtype, into entries start.. of the contiguous vector at p."""
    o_n = start + tl.arange(0, BLOCK_N)
    p_x = p + tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
    tl.store(p_x, cast(x, p.dtype.element_ty), mask=o_n < n)
