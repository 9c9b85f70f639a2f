"""Forward kernels: a row in registers up to N = 16384, a row in tiles above.

With s = 1 - alpha, weights = [c + v]_+ ** (1/s), v = s (x - max x) <= 0, and the root c in (0, 1]
found by Newton from c = 1. For s < 0.03 the state is c - 1 and the logarithm is log1p: the base is
then 1 - O(s), whose rounding error the exponent 1/s would magnify.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton import math, threshold

from .._rows import spread
from . import configs

# 1/s that are run as multiplications: alpha = 1/2, 2/3, 3/4, 4/5, 5/6, 7/8, 9/10.
_INTEGER_EXPONENTS = (2, 3, 4, 5, 6, 8, 10)
_SMALL_S = tl.constexpr(0.03)
# One more Newton step is taken after sum - 1 falls below this: it squares the error.
_TOLERANCE = 1e-4
_TOLERANCE_WIDE = 1e-8


@triton.jit
def _integer_power(u, N: tl.constexpr):
    """u^N by squaring, N >= 1."""
    if N == 1:
        return u
    elif N % 2 == 0:
        b_h = _integer_power(u, N // 2)
        return b_h * b_h
    else:
        return u * _integer_power(u, N - 1)


@triton.jit
def _careful_pair(u, s):
    """(b^(1/s-1), b^(1/s)) of b = [1 + u]_+ where s < 0.03, of b = [u]_+ elsewhere."""
    one = tl.where(s < _SMALL_S, 1.0, 0.0)
    base = u + one
    m_out = base <= 0.0  # False at NaN, which then survives
    base = tl.where(m_out, 1.0, base)
    # log1p(u) = log(1 + u) + (what rounding 1 + u lost) / (1 + u)
    log = math.log2(base) + tl.where(m_out, 0.0, u - (base - one)) * 1.4426950408889634 / base
    b_w = tl.exp2(log / s)
    b_g = tl.exp2(log / s * (1.0 - s))
    return tl.where(m_out, 0.0, b_g), tl.where(m_out, 0.0, b_w)


@triton.jit
def _pair(u, s, P: tl.constexpr, IS_CAREFUL: tl.constexpr, FAST: tl.constexpr):
    """(share of G, share of F) of entries u = c + v."""
    if IS_CAREFUL:
        return _careful_pair(u, s)
    elif P > 4:
        u = math.relu(u)
        b_g = _integer_power(u, P - 1)
        return b_g, b_g * u
    else:
        return threshold.weight_pair(math.relu(u), 1.0 / s, P, FAST)


@triton.jit
def _step(F, G, s, P: tl.constexpr, IS_CAREFUL: tl.constexpr):
    """(F - F^(1-s)) / G, 0 for a dead row."""
    if IS_CAREFUL:
        y = s * math.log2(tl.where(F > 0.0, F, 1.0)) * 0.6931471805599453
        # 1 - e^-y, by its series where the difference would cancel
        b_d = tl.where(y < 0.03, y * (1.0 - y * (0.5 - y * 0.16666667)), 1.0 - tl.exp(-y))
        return tl.where(G == 0.0, 0.0, F * b_d / tl.where(G == 0.0, 1.0, G))
    elif P > 4:
        return threshold.newton_update(F, G, 1.0 / s, 0)
    else:
        return threshold.newton_update(F, G, 1.0 / s, P)


@triton.jit
def _centre(m):
    """What to subtract from a row: its maximum; 0 for a dead row, NaN for +inf."""
    m = tl.where(m == float("-inf"), 0.0, m)
    return tl.where(m == float("inf"), float("nan"), m)


@triton.jit(do_not_specialize=["n_rows", "n", "n_iter"])
def _bisect_forward_kernel(
    x_ptr,
    s_ptr,
    y_ptr,
    stride_xr,
    stride_xn,
    stride_s,
    s,
    tol,
    n_rows,
    n,
    n_iter,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_S_ROWS: tl.constexpr,
    IS_CAREFUL: tl.constexpr,
    USE_DIVISION: tl.constexpr,
    IS_WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    # who am I
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_r = o_r < n_rows
    m_x = m_r[:, None] & (o_n < n)[None, :]
    # load
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    # [BLOCK_R, BLOCK_N]
    b_x = tl.load(
        x_ptr + o_r[:, None] * stride_xr + o_n[None, :] * stride_xn, mask=m_x, other=float("-inf")
    ).to(dtype)
    # [BLOCK_R]
    if HAS_S_ROWS:
        b_s = tl.load(s_ptr + o_r * stride_s, mask=m_r, other=0.5).to(dtype)
    else:
        b_s = tl.zeros([BLOCK_R], dtype) + s
    # [BLOCK_R, BLOCK_N]
    b_v = (b_x - _centre(tl.max(b_x, 1))[:, None]) * b_s[:, None]
    # loop
    if IS_CAREFUL:
        b_c = tl.where(b_s < _SMALL_S, 0.0, 1.0).to(dtype)
    else:
        b_c = tl.full([BLOCK_R], 1.0, dtype)
    # A row that has converged stays as it is: its bits do not depend on the rows beside it. Triton
    # 3.7 cannot compile a loop that carries a tensor defined after a number such as `go`.
    m_late = b_s > 0.0
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        b_g, b_w = _pair(b_v + b_c[:, None], b_s[:, None], P, IS_CAREFUL, FAST)
        b_F = tl.sum(b_w, 1)
        b_c -= tl.where(m_late, _step(b_F, tl.sum(b_g, 1), b_s, P, IS_CAREFUL), 0.0)
        m_late = m_late & (b_F - 1.0 > tol)
        go = tl.max(m_late.to(tl.int32), 0)
        it += 1
    # epilogue
    _, b_y = _pair(b_v + b_c[:, None], b_s[:, None], P, IS_CAREFUL, FAST)
    if USE_DIVISION:
        b_F = tl.sum(b_y, 1)
        b_y = b_y / tl.where(b_F == 0.0, 1.0, b_F)[:, None]
    # store
    tl.store(
        y_ptr + o_r[:, None] * n + o_n[None, :], math.cast(b_y, y_ptr.dtype.element_ty), mask=m_x
    )


@triton.jit
def _load_tile(p_x, i_n, n, stride_xn, BLOCK_N: tl.constexpr, dtype: tl.constexpr):
    """Scores of one tile of a row, -inf beyond it. -> [BLOCK_N]"""
    o_n = tl.cast(i_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(p_x + o_n * stride_xn, mask=o_n < n, other=float("-inf")).to(dtype)


@triton.jit(do_not_specialize=["n", "n_iter"])
def _bisect_forward_stream_kernel(
    x_ptr,
    s_ptr,
    y_ptr,
    stride_xr,
    stride_xn,
    stride_s,
    s,
    tol,
    n,
    n_iter,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_S_ROWS: tl.constexpr,
    IS_CAREFUL: tl.constexpr,
    USE_DIVISION: tl.constexpr,
    IS_WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    # who am I
    i_r = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + i_r * stride_xr
    n_tiles = tl.cdiv(n, BLOCK_N)
    # load
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    if HAS_S_ROWS:
        b_s = tl.load(s_ptr + i_r * stride_s).to(dtype)
    else:
        b_s = s
    b_top = tl.full([BLOCK_N], float("-inf"), dtype)
    for i_n in range(n_tiles):
        b_top = tl.maximum(b_top, _load_tile(p_x, i_n, n, stride_xn, BLOCK_N, dtype))
    b_m = _centre(tl.max(b_top, 0))
    # loop
    b_c = tl.cast(1.0, dtype)
    if IS_CAREFUL:
        b_c = tl.where(b_s < _SMALL_S, 0.0, 1.0).to(dtype)
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        # [BLOCK_N]
        b_F = tl.zeros([BLOCK_N], dtype)
        b_G = tl.zeros([BLOCK_N], dtype)
        for i_n in range(n_tiles):
            b_v = (_load_tile(p_x, i_n, n, stride_xn, BLOCK_N, dtype) - b_m) * b_s
            b_g, b_w = _pair(b_v + b_c, b_s, P, IS_CAREFUL, FAST)
            b_F += b_w
            b_G += b_g
        F = tl.sum(b_F, 0)
        b_c -= _step(F, tl.sum(b_G, 0), b_s, P, IS_CAREFUL)
        go = (F - 1.0 > tol).to(tl.int32)
        it += 1
    # epilogue
    b_scale = tl.cast(1.0, dtype)
    if USE_DIVISION:
        b_F = tl.zeros([BLOCK_N], dtype)
        for i_n in range(n_tiles):
            b_v = (_load_tile(p_x, i_n, n, stride_xn, BLOCK_N, dtype) - b_m) * b_s
            _, b_w = _pair(b_v + b_c, b_s, P, IS_CAREFUL, FAST)
            b_F += b_w
        F = tl.sum(b_F, 0)
        b_scale = 1.0 / tl.where(F == 0.0, 1.0, F)
    # store
    for i_n in range(n_tiles):
        b_v = (_load_tile(p_x, i_n, n, stride_xn, BLOCK_N, dtype) - b_m) * b_s
        _, b_y = _pair(b_v + b_c, b_s, P, IS_CAREFUL, FAST)
        o_n = tl.cast(i_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_y = math.cast(b_y * b_scale, y_ptr.dtype.element_ty)
        tl.store(y_ptr + i_r * n + o_n, b_y, mask=o_n < n)


def row_parameter(alpha: Tensor, Y: Tensor, dim: int) -> tuple[float, Tensor | None, int]:
    """(number, None, 0), or (unused, one value per row, its stride): no wait for the GPU.

    A kernel's scalar arguments are fp32, so for fp64 scores a number becomes a row parameter too.
    """
    is_wide = Y.dtype == torch.float64
    alpha = spread(alpha, Y.shape, dim)
    if alpha.dim() == 0 and alpha.device.type == "cpu":
        if not is_wide:
            return alpha.item(), None, 0
        return 0.5, torch.full((1,), alpha.item(), dtype=torch.float64, device=Y.device), 0
    rows = alpha.reshape(-1)
    keep = is_wide or rows.dtype == torch.float64
    return 0.5, rows.double() if keep else rows.float(), int(alpha.dim() > 0)


def launch_bisect_forward(
    X: Tensor, alpha: Tensor, dim: int, n_iter: int, ensure_sum_one: bool
) -> Tensor:
    rows = X.movedim(dim, -1)
    Y = torch.empty(rows.shape, dtype=X.dtype, device=X.device)
    if X.numel() == 0:
        return Y.movedim(-1, dim)
    N = rows.shape[-1]
    x = rows.reshape(-1, N)
    is_wide = X.dtype == torch.float64
    number, column, stride_s = row_parameter(alpha, X, dim)
    s = 1.0 - number
    if column is not None:
        column = (1 - column).to(torch.float64 if is_wide else torch.float32)
        column = column.clamp_(min=2.0**-70 if is_wide else 2.0**-40)
    exponent = round(1 / s)
    is_integer = column is None and exponent in _INTEGER_EXPONENTS and abs(s * exponent - 1) < 1e-7
    target = device.target(X)
    is_careful = not is_integer and (column is not None or s < 0.1)
    flags = {
        "P": exponent if is_integer else 0,
        "HAS_S_ROWS": column is not None,
        "IS_CAREFUL": is_careful,
        "USE_DIVISION": ensure_sum_one,
        "IS_WIDE": is_wide,
        "FAST": math.fast(target),
    }
    tol = _TOLERANCE_WIDE if is_wide else _TOLERANCE
    inputs = (x, x if column is None else column, Y, *x.stride(), stride_s, s, tol)
    table = configs.FORWARD_CAREFUL if is_careful else configs.FORWARD
    longest = configs.LONGEST_ROW_ALPHA if is_careful else configs.LONGEST_ROW
    if is_wide:
        table, longest = configs.FORWARD_WIDE, configs.LONGEST_ROW_WIDE
    if N > longest:
        config = (configs.STREAM_WIDE if is_wide else configs.STREAM).pick(target, N)
        _bisect_forward_stream_kernel[(x.shape[0],)](*inputs, N, n_iter, **flags, **config.meta())
    else:
        config = table.pick(target, N)
        grid = (triton.cdiv(x.shape[0], config["BLOCK_R"]),)
        flags["BLOCK_N"] = triton.next_power_of_2(N)
        _bisect_forward_kernel[grid](*inputs, x.shape[0], N, n_iter, **flags, **config.meta())
    return Y.movedim(-1, dim)
