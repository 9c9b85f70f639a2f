"""Sparse weights of rows on a GPU, and their gradients: one solver in s for every package.

    weights = [s x - tau]_+ ** (1/s),    tau such that a row sums to 1,    0 < s <= 1

diffmax has s = 1 - alpha, entmax s = alpha - 1. With v = s (x - max x) <= 0 a weight is
[c + v]_+ ** (1/s), and Newton's method lowers c from 1 to its root. Where s may be below 0.03 the
state is c - 1 and the logarithm is log1p: the base is then 1 - O(s), whose rounding error the
exponent 1/s would magnify. The approximate logarithm (FAST) is taken only where s is one number
of at least 0.1, for the same reason.

A short row stays in registers from its load to its store; a long row is read again, tile by tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.configs import Table

from . import configs, math, threshold

# 1/s that are multiplications
_INTEGER_EXPONENTS = (1, 2, 3, 4, 5, 6, 8, 10)
_SMALL_S = tl.constexpr(0.03)
_CAREFUL_BELOW = 0.1
# Half-type rows move in vectors of so many entries.
_VECTOR = tl.constexpr(8)


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
    """(F - F^(1-s)) / G, 0 for a row of -inf."""
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
def _multiple(n, IS_EVEN: tl.constexpr):
    """n; where the launcher knows it as a multiple of the vector, the compiler learns of it."""
    if IS_EVEN:
        return n // _VECTOR * _VECTOR
    else:
        return n


@triton.jit
def _load_rows(x_ptr, o_r, o_n, n_rows, n, stride_r, stride_n, other, dtype: tl.constexpr):
    """-> [BLOCK_R, BLOCK_N] of dtype, `other` outside."""
    p_x = x_ptr + o_r[:, None] * stride_r + o_n.to(tl.int64)[None, :] * stride_n
    m_x = (o_r < n_rows)[:, None] & (o_n < n)[None, :]
    return tl.load(p_x, mask=m_x, other=other).to(dtype)


@triton.jit
def _store_rows(y_ptr, b_y, o_r, o_n, n_rows, n):
    """[BLOCK_R, BLOCK_N] into contiguous rows of length n."""
    p_y = y_ptr + o_r[:, None] * n + o_n.to(tl.int64)[None, :]
    m_y = (o_r < n_rows)[:, None] & (o_n < n)[None, :]
    tl.store(p_y, math.cast(b_y, y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["n_rows", "n", "n_iter"])
def _rows_forward_kernel(
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
    IS_LONG: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_DIVISION: tl.constexpr,
    FAST: tl.constexpr,
):
    # the rows of this program
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    n = _multiple(n, IS_EVEN)
    stride_xr = _multiple(stride_xr, IS_EVEN)
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    # [BLOCK_R, 1]
    if HAS_S_ROWS:
        b_s = tl.load(s_ptr + o_r * stride_s, mask=o_r < n_rows, other=0.5).to(dtype)[:, None]
    else:
        b_s = tl.zeros([BLOCK_R, 1], dtype) + s
    # load: the maximum is taken off, so that c starts at 1. [BLOCK_R, BLOCK_N]
    b_v = _load_rows(x_ptr, o_r, o_n, n_rows, n, stride_xr, stride_xn, float("-inf"), dtype)
    if IS_LONG:
        b_top = b_v
        for start in range(BLOCK_N, n, BLOCK_N):
            o_x = start + o_n
            b_x = _load_rows(x_ptr, o_r, o_x, n_rows, n, stride_xr, stride_xn, float("-inf"), dtype)
            b_top = tl.maximum(b_top, b_x)
        b_m = tl.max(b_top, 1)[:, None]
    else:
        b_m = tl.max(b_v, 1)[:, None]
    # A row of -inf gives zeros, a row with +inf gives NaN.
    b_m = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_m = tl.where(b_m == float("inf"), float("nan"), b_m)
    if not IS_LONG:
        b_v = (b_v - b_m) * b_s
    # loop. [BLOCK_R, 1]
    if IS_CAREFUL:
        b_c = tl.where(b_s < _SMALL_S, 0.0, 1.0).to(dtype)
    else:
        b_c = tl.full([BLOCK_R, 1], 1.0, dtype)
    # A row that has converged keeps its c: its bits do not depend on the rows beside it. Triton
    # 3.7 cannot compile a loop that carries a tensor defined after a number such as `go`.
    m_late = b_s > 0.0
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        if IS_LONG:
            b_F = tl.zeros([BLOCK_R, BLOCK_N], dtype)
            b_G = tl.zeros([BLOCK_R, BLOCK_N], dtype)
            for start in range(0, n, BLOCK_N):
                o_x = start + o_n
                b_x = _load_rows(
                    x_ptr, o_r, o_x, n_rows, n, stride_xr, stride_xn, float("-inf"), dtype
                )
                b_g, b_w = _pair((b_x - b_m) * b_s + b_c, b_s, P, IS_CAREFUL, FAST)
                b_F += b_w
                b_G += b_g
        else:
            b_G, b_F = _pair(b_v + b_c, b_s, P, IS_CAREFUL, FAST)
        F = tl.sum(b_F, 1)[:, None]
        b_next = b_c - _step(F, tl.sum(b_G, 1)[:, None], b_s, P, IS_CAREFUL)
        b_next = tl.where(m_late, b_next, b_c)
        # one more step is taken after F - 1 falls below tol; none after c no longer moves
        m_late = m_late & (F - 1.0 > tol) & (b_next < b_c)
        b_c = b_next
        go = tl.max(tl.max(m_late.to(tl.int32), 1), 0)
        it += 1
    # the weights at the root
    if IS_LONG:
        b_scale = tl.full([BLOCK_R, 1], 1.0, dtype)
        if USE_DIVISION:
            b_F = tl.zeros([BLOCK_R, BLOCK_N], dtype)
            for start in range(0, n, BLOCK_N):
                o_x = start + o_n
                b_x = _load_rows(
                    x_ptr, o_r, o_x, n_rows, n, stride_xr, stride_xn, float("-inf"), dtype
                )
                _, b_w = _pair((b_x - b_m) * b_s + b_c, b_s, P, IS_CAREFUL, FAST)
                b_F += b_w
            F = tl.sum(b_F, 1)[:, None]
            b_scale = 1.0 / tl.where(F == 0.0, 1.0, F)
        for start in range(0, n, BLOCK_N):
            o_x = start + o_n
            b_x = _load_rows(x_ptr, o_r, o_x, n_rows, n, stride_xr, stride_xn, float("-inf"), dtype)
            _, b_w = _pair((b_x - b_m) * b_s + b_c, b_s, P, IS_CAREFUL, FAST)
            _store_rows(y_ptr, b_w * b_scale, o_r, o_x, n_rows, n)
    else:
        _, b_w = _pair(b_v + b_c, b_s, P, IS_CAREFUL, FAST)
        if USE_DIVISION:
            F = tl.sum(b_w, 1)[:, None]
            b_w = b_w / tl.where(F == 0.0, 1.0, F)
        _store_rows(y_ptr, b_w, o_r, o_n, n_rows, n)


@triton.jit
def _support_power(b_y, b_s, P: tl.constexpr, FAST: tl.constexpr):
    """y^(1-s): 0 where y is 0."""
    if P == 1:
        return tl.where(b_y <= 0.0, 0.0, 1.0 + 0.0 * b_y)
    elif P == 2:
        return tl.sqrt(b_y)
    else:
        return math.power(b_y, 1.0 - b_s, FAST)


@triton.jit(do_not_specialize=["n_rows", "n"])
def _rows_backward_kernel(
    dy_ptr,
    y_ptr,
    s_ptr,
    dx_ptr,
    ds_ptr,
    stride_dyr,
    stride_dyn,
    stride_yr,
    stride_yn,
    stride_s,
    s,
    n_rows,
    n,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_S_ROWS: tl.constexpr,
    HAS_S_GRAD: tl.constexpr,
    IS_LONG: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    # the rows of this program
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    n = _multiple(n, IS_EVEN)
    stride_dyr = _multiple(stride_dyr, IS_EVEN)
    stride_yr = _multiple(stride_yr, IS_EVEN)
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    # [BLOCK_R, 1]
    if HAS_S_ROWS:
        b_s = tl.load(s_ptr + o_r * stride_s, mask=o_r < n_rows, other=0.5).to(dtype)[:, None]
    else:
        b_s = tl.zeros([BLOCK_R, 1], dtype) + s
    # the mean of dy under g = y^(1-s). [BLOCK_R, BLOCK_N]
    b_y = _load_rows(y_ptr, o_r, o_n, n_rows, n, stride_yr, stride_yn, 0.0, dtype)
    b_dy = _load_rows(dy_ptr, o_r, o_n, n_rows, n, stride_dyr, stride_dyn, 0.0, dtype)
    b_g = _support_power(b_y, b_s, P, FAST)
    b_mass = b_g
    b_sum = b_g * b_dy
    if IS_LONG:
        for start in range(BLOCK_N, n, BLOCK_N):
            o_x = start + o_n
            b_y = _load_rows(y_ptr, o_r, o_x, n_rows, n, stride_yr, stride_yn, 0.0, dtype)
            b_dy = _load_rows(dy_ptr, o_r, o_x, n_rows, n, stride_dyr, stride_dyn, 0.0, dtype)
            b_g = _support_power(b_y, b_s, P, FAST)
            b_mass += b_g
            b_sum += b_g * b_dy
    mass = tl.sum(b_mass, 1)[:, None]
    b_mean = tl.sum(b_sum, 1)[:, None] / tl.where(mass == 0.0, 1.0, mass)
    # dx = g (dy - mean), ds = -sum h (dy - mean)
    if IS_LONG:
        b_ds = tl.zeros([BLOCK_R, BLOCK_N], dtype)
        for start in range(0, n, BLOCK_N):
            o_x = start + o_n
            b_y = _load_rows(y_ptr, o_r, o_x, n_rows, n, stride_yr, stride_yn, 0.0, dtype)
            b_dy = _load_rows(dy_ptr, o_r, o_x, n_rows, n, stride_dyr, stride_dyn, 0.0, dtype)
            b_g = _support_power(b_y, b_s, P, FAST)
            _store_rows(dx_ptr, b_g * (b_dy - b_mean), o_r, o_x, n_rows, n)
            if HAS_S_GRAD:
                b_ds -= threshold.curvature(b_y, b_g, b_s, FAST) * (b_dy - b_mean)
        if HAS_S_GRAD:
            tl.store(ds_ptr + o_r, tl.sum(b_ds, 1), mask=o_r < n_rows)
    else:
        _store_rows(dx_ptr, b_g * (b_dy - b_mean), o_r, o_n, n_rows, n)
        if HAS_S_GRAD:
            b_ds = threshold.curvature(b_y, b_g, b_s, FAST) * (b_dy - b_mean)
            tl.store(ds_ptr + o_r, -tl.sum(b_ds, 1), mask=o_r < n_rows)


def _integer_exponent(s: float | Tensor, is_wide: bool) -> int:
    """1/s where it is known as one of the small integers, else 0."""
    if isinstance(s, Tensor) or s <= 0.0:
        return 0
    exponent = round(1 / s)
    is_near = abs(s * exponent - 1.0) < (1e-14 if is_wide else 1e-7)
    return exponent if is_near and exponent in _INTEGER_EXPONENTS else 0


def _of_rows(s: float | Tensor, x: Tensor) -> tuple[float, Tensor | None, int]:
    """(number, None, 0), or (unused, one value per row, its stride): no wait for the GPU.

    A kernel's scalar arguments are fp32, so for fp64 rows a number becomes a tensor, too.
    """
    is_wide = x.dtype == torch.float64
    least = 2.0**-70 if is_wide else 2.0**-40
    if not isinstance(s, Tensor):
        if not is_wide:
            return max(s, least), None, 0
        s = torch.full((), s, dtype=torch.float64, device=x.device)
    s = s.detach().to(x.device, torch.float64 if is_wide else torch.float32).clamp(min=least)
    if s.numel() == 1:
        return 0.5, s.reshape(1), 0
    return 0.5, s.expand(*x.shape[:-1], 1).reshape(-1), 1


def _launch(x: Tensor, table: Table, *strides: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """Grid and meta-parameters for rows like those of x (R, N)."""
    R, N = x.shape
    meta = table.pick(device.target(x), N).meta()
    is_long = N > meta["BLOCK_N"]
    meta["BLOCK_N"] = min(meta["BLOCK_N"], triton.next_power_of_2(N))
    is_even = not any(n % _VECTOR.value for n in (N, *strides))
    return (triton.cdiv(R, meta["BLOCK_R"]),), {"IS_LONG": is_long, "IS_EVEN": is_even, **meta}


def launch_rows_forward(
    x: Tensor, s: float | Tensor, n_iter: int, divide: bool = True, fast: bool = True
) -> Tensor:
    """The weights of rows (..., N) of any strides, contiguous; s: a number or () or (..., 1)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows, is_wide = x.reshape(-1, x.shape[-1]), x.dtype == torch.float64
    P = _integer_exponent(s, is_wide)
    number, column, stride_s = _of_rows(s, x)
    is_careful = P == 0 and (column is not None or number < _CAREFUL_BELOW)
    # Steep powers (1/s < 2) leave an error of d^(1/s) after a step from F = 1 + d, the others d^2.
    is_steep = s > 0.5 if not isinstance(s, Tensor) else True
    tol = (1e-13 if is_steep else 1e-8) if is_wide else (1e-6 if is_steep else 1e-4)
    table = configs.ROWS_FORWARD_CAREFUL if is_careful else configs.ROWS_FORWARD
    grid, meta = _launch(rows, configs.ROWS_FORWARD_FP64 if is_wide else table, rows.stride(0))
    _rows_forward_kernel[grid](
        x_ptr=rows,
        s_ptr=rows if column is None else column,
        y_ptr=y,
        stride_xr=rows.stride(0),
        stride_xn=rows.stride(1),
        stride_s=stride_s,
        s=number,
        tol=tol,
        n_rows=rows.shape[0],
        n=rows.shape[1],
        n_iter=n_iter,
        P=P,
        HAS_S_ROWS=column is not None,
        IS_CAREFUL=is_careful,
        IS_WIDE=is_wide,
        USE_DIVISION=divide,
        FAST=fast and not is_careful and math.fast(device.target(x)),
        **meta,
    )
    return y


def launch_rows_backward(
    dy: Tensor, y: Tensor, s: float | Tensor, need_s: bool, fast: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradients in x, contiguous, and in s, one number per row (..., 1) in fp32 (fp64 for fp64)."""
    is_wide = y.dtype == torch.float64
    dx, ds = torch.empty(y.shape, dtype=y.dtype, device=y.device), None
    if need_s:
        wide = torch.float64 if is_wide else torch.float32
        ds = torch.empty((*y.shape[:-1], 1), dtype=wide, device=y.device)
    if y.numel() == 0:
        return dx, None if ds is None else ds.zero_()
    y_rows, dy_rows = y.reshape(-1, y.shape[-1]), dy.reshape(-1, y.shape[-1])
    P = _integer_exponent(s, is_wide)
    number, column, stride_s = _of_rows(s, y)
    table = configs.ROWS_BACKWARD_S if need_s else configs.ROWS_BACKWARD
    table = configs.ROWS_BACKWARD_FP64 if is_wide else table
    grid, meta = _launch(y_rows, table, y_rows.stride(0), dy_rows.stride(0))
    _rows_backward_kernel[grid](
        dy_ptr=dy_rows,
        y_ptr=y_rows,
        s_ptr=y_rows if column is None else column,
        dx_ptr=dx,
        ds_ptr=dx if ds is None else ds,
        stride_dyr=dy_rows.stride(0),
        stride_dyn=dy_rows.stride(1),
        stride_yr=y_rows.stride(0),
        stride_yn=y_rows.stride(1),
        stride_s=stride_s,
        s=number,
        n_rows=y_rows.shape[0],
        n=y_rows.shape[1],
        P=P if P <= 2 else 0,
        HAS_S_ROWS=column is not None,
        HAS_S_GRAD=need_s,
        IS_WIDE=is_wide,
        # y^(1-s) does not magnify the logarithm's error, however small s is
        FAST=fast and math.fast(device.target(y)),
        **meta,
    )
    return dx, ds
