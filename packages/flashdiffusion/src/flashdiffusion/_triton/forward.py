"""exp(-beta |x - y|^2) V on tensor cores, in pieces of fp16 that add up to fp32.

The rows are augmented until their inner product is the exponent in powers of two:
[sqrt(2 beta log2 e) x, -n_x, (rest of -n_x), 1, 1] and [.. y, 1, 1, -n_y, (rest)], n = beta log2 e
|x|^2: d + 4 features. Every operand is a sum of two fp16 numbers, hi + lo, and three products of
the four are taken (lo * lo is below fp32's last digit). The columns of V are scaled to at most 1,
and the weights carry a factor 2^14 that keeps small ones out of fp16's denormals.

Exponents above 0 are rounding, and count as 0; so does that of a point and itself: K_ii = 1 (not in
IS_HALF, whose product another mends).

IS_HALF leaves all lo parts out: a third of the products, for a first solve that another mends. The
points are centred and beta |x|^2 is at most 128, so an exponent is off by 0.4 at worst and the
weights, at most 2^14.4, stay within fp16; the norms are those of the exact points, hi + lo.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton.dot import dot, dot_acc
from shared_kernels.triton.math import cast

from .._problem import LOG2_E, Problem
from . import configs

_LIFT = tl.constexpr(14.0)
# Rows are padded to a multiple of every tile, so that the loop has no mask.
_PAD = 128


@triton.jit
def _load(p, i, BLOCK: tl.constexpr, D: tl.constexpr):
    """Tile i of a contiguous matrix with D columns and whole tiles. -> [BLOCK, D]"""
    o_n = tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(p + o_n[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit(do_not_specialize=["n_q", "n_k", "first"])
def _matvec_forward_kernel(
    xh_ptr,
    xl_ptr,
    yh_ptr,
    yl_ptr,
    vh_ptr,
    vl_ptr,
    o_ptr,
    n_q,
    n_k,
    first,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_HALF: tl.constexpr,
):
    # the tile of queries of this program
    i_q = tl.program_id(0).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, D]
    b_xh = _load(xh_ptr, i_q, BLOCK_Q, D)
    if not IS_HALF:
        b_xl = _load(xl_ptr, i_q, BLOCK_Q, D)
    # [BLOCK_Q, C]
    b_o = tl.zeros([BLOCK_Q, C], tl.float32)
    for i_k in range(tl.cdiv(n_k, BLOCK_K)):
        # [BLOCK_K, D]
        b_yh = _load(yh_ptr, i_k, BLOCK_K, D)
        # [BLOCK_Q, BLOCK_K]
        if IS_HALF:
            b_s = dot(b_xh, tl.trans(b_yh))
        else:
            b_yl = _load(yl_ptr, i_k, BLOCK_K, D)
            b_s = dot(b_xl, tl.trans(b_yh))
            b_s = dot_acc(b_xh, tl.trans(b_yl), b_s)
            b_s = dot_acc(b_xh, tl.trans(b_yh), b_s)
        if not IS_HALF:
            # rounding puts no entry above 1, and K_ii is 1: query i is key i + first
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_s = tl.where((o_q + first)[:, None] == o_k[None, :], 0.0, tl.minimum(b_s, 0.0))
        b_w = tl.exp2(b_s + _LIFT)
        b_wh = cast(b_w, tl.float16)
        # [BLOCK_K, C]
        b_vh = _load(vh_ptr, i_k, BLOCK_K, C)
        if not IS_HALF:
            b_wl = cast(b_w - b_wh.to(tl.float32), tl.float16)
            b_vl = _load(vl_ptr, i_k, BLOCK_K, C)
            b_o = dot_acc(b_wl, b_vh, b_o)
            b_o = dot_acc(b_wh, b_vl, b_o)
        b_o = dot_acc(b_wh, b_vh, b_o)
    b_o = b_o * tl.exp2(-_LIFT)
    p_o = o_ptr + o_q[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(p_o, b_o, mask=(o_q < n_q)[:, None])


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = hi + lo in fp16, to about 22 bits."""
    hi = x.to(torch.float16)
    return hi, (x - hi.to(x.dtype)).to(torch.float16)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    padded = x.new_zeros(rows, columns)  # torch 2.7 cannot pad what is empty
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def features(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    """(x hi, x lo, y hi, y lo): (padded N, padded d + 4) fp16, of rows x of the problem's."""
    d = x.shape[1]
    D = max(16, triton.next_power_of_2(d + 4))
    parts = []
    for points, left in ((x, True), (problem.y, False)):
        points = points.double() - problem.centre
        norm = -problem.beta * LOG2_E * (points * points).sum(1, keepdim=True)
        coarse = norm.to(torch.float16).double()
        one = torch.ones_like(norm)
        norms = (coarse, norm - coarse, one, one) if left else (one, one, coarse, norm - coarse)
        rows = torch.cat(((2.0 * problem.beta * LOG2_E) ** 0.5 * points, *norms), 1)
        n_rows = -(-len(rows) // _PAD) * _PAD
        parts += [_padded(part, n_rows, D) for part in _split(rows)]
    return tuple(parts)


def launch_matvec_forward(
    prepared: tuple[Tensor, ...], V: Tensor, N: int, first: int | None, *, is_half: bool
) -> Tensor:
    """K V: (M, r) -> (N, r) float32, from `features`; x_i is y_(i + first), or no row of y."""
    xh, xl, yh, yl = prepared
    M, r = V.shape
    if N == 0 or M == 0 or r == 0:
        return torch.zeros(N, r, dtype=torch.float32, device=V.device)
    # far beyond every key, where the points are not the keys
    first = -(2**40) if first is None else first
    D = xh.shape[1]
    table = configs.MATVEC_HALF if is_half else configs.MATVEC_FORWARD
    meta = table.pick(device.target(V), D).meta()
    size = V.abs().amax(0)
    size = size.where(size > 0, 1.0)
    out = torch.empty(N, r, dtype=torch.float32, device=V.device)
    for start in range(0, r, 32):
        columns = (V / size)[:, start : start + 32]
        C = 16 if columns.shape[1] <= 16 else 32
        vh, vl = _split(columns)
        vh, vl = _padded(vh, len(yh), C), _padded(vl, len(yh), C)
        o = torch.empty(N, C, dtype=torch.float32, device=V.device)
        grid = (triton.cdiv(N, meta["BLOCK_Q"]),)
        _matvec_forward_kernel[grid](
            xh, xl, yh, yl, vh, vl, o, N, M, first, D=D, C=C, IS_HALF=is_half, **meta
        )
        out[:, start : start + 32] = o[:, : columns.shape[1]]
    return out * size.to(torch.float32)
