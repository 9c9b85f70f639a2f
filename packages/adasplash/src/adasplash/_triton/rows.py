"""Entmax of rows: a few rows per program, on chip when they fit, else streamed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton import math, threshold

from . import configs
from .weights import SMALLEST_S, curvature, exponent, theta_step, weight_pair


@triton.jit
def _load_rows(x_ptr, o_r, o_n, n_rows, n, stride_r, other):
    """-> [BLOCK_R, BLOCK_N] fp32 (fp64 for fp64), `other` outside."""
    p_x = x_ptr + o_r.to(tl.int64)[:, None] * stride_r + o_n[None, :]
    b_x = tl.load(p_x, mask=(o_r < n_rows)[:, None] & (o_n < n)[None, :], other=other)
    if b_x.dtype == tl.float64:
        return b_x
    else:
        return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "n"])
def _entmax_forward_kernel(
    x_ptr, alpha_ptr, y_ptr, stride_xr, stride_yr, s, n_iter, n_rows, n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
    HAS_ALPHA: tl.constexpr, IS_LONG: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    # [BLOCK_R, 1]
    if HAS_ALPHA:
        b_s = exponent(tl.load(alpha_ptr + o_r, mask=o_r < n_rows, other=1.5)[:, None])
    else:
        b_s = s + tl.zeros([BLOCK_R, 1], tl.float32)
    b_p = 1.0 / b_s

    # The largest entry of each row, where Newton starts. NaN must win.
    b_x = _load_rows(x_ptr, o_r, o_n, n_rows, n, stride_xr, float("-inf"))
    wide: tl.constexpr = b_x.dtype
    b_top = tl.max(b_x, 1)
    b_bad = tl.max((b_x != b_x).to(tl.int32), 1)
    if IS_LONG:
        for start in range(BLOCK_N, n, BLOCK_N):
            b_x = _load_rows(x_ptr, o_r, start + o_n, n_rows, n, stride_xr, float("-inf"))
            b_top = tl.maximum(b_top, tl.max(b_x, 1))
            b_bad = tl.maximum(b_bad, tl.max((b_x != b_x).to(tl.int32), 1))
    b_bad = (b_bad > 0) | (b_top == float("inf"))
    b_dead = b_top == float("-inf")
    b_top = tl.where(b_dead | b_bad, 0.0, b_top)[:, None]
    # Scores relative to the maximum, so that theta starts at 0.
    b_theta = tl.zeros([BLOCK_R, 1], wide)
    if not IS_LONG:
        b_x = b_x - b_top

    # A row that has converged stays as it is: its bits do not depend on the rows beside it. Triton
    # 3.7 cannot compile a loop that carries a tensor defined after a number such as `go`.
    m_late = o_r >= 0
    it = 0
    go = 1
    while (it < n_iter) & (go > 0):
        if IS_LONG:
            b_F = tl.zeros([BLOCK_R], wide)
            b_G = tl.zeros([BLOCK_R], wide)
            for start in range(0, n, BLOCK_N):
                b_x = _load_rows(x_ptr, o_r, start + o_n, n_rows, n, stride_xr, float("-inf"))
                b_g, b_y = weight_pair(b_x - b_top, b_theta, b_s, b_p, P, FAST)
                b_F += tl.sum(b_y, 1)
                b_G += tl.sum(b_g, 1)
        else:
            b_g, b_y = weight_pair(b_x, b_theta, b_s, b_p, P, FAST)
            b_F = tl.sum(b_y, 1)
            b_G = tl.sum(b_g, 1)
        b_step = theta_step(b_F[:, None], b_G[:, None], b_s, b_p, P)
        b_theta += tl.where(m_late[:, None], b_step, 0.0)
        it += 1
        if wide == tl.float64:
            m_late = m_late & (b_F > 1.00000001)
        else:
            m_late = m_late & (b_F > 1.000001)
        go = tl.max(m_late.to(tl.int32), 0)

    b_nan = tl.where(b_bad, float("nan"), 0.0)[:, None]
    if IS_LONG:
        b_F = tl.zeros([BLOCK_R], wide)
        for start in range(0, n, BLOCK_N):
            b_x = _load_rows(x_ptr, o_r, start + o_n, n_rows, n, stride_xr, float("-inf"))
            b_g, b_y = weight_pair(b_x - b_top, b_theta, b_s, b_p, P, FAST)
            b_F += tl.sum(b_y, 1)
        b_F = tl.where(b_F > 0.0, b_F, 1.0)
        for start in range(0, n, BLOCK_N):
            b_x = _load_rows(x_ptr, o_r, start + o_n, n_rows, n, stride_xr, float("-inf"))
            b_g, b_y = weight_pair(b_x - b_top, b_theta, b_s, b_p, P, FAST)
            p_y = y_ptr + o_r[:, None] * stride_yr + (start + o_n)[None, :]
            b_y = math.cast(b_y / b_F[:, None] + b_nan, y_ptr.dtype.element_ty)
            tl.store(p_y, b_y, mask=(o_r < n_rows)[:, None] & (start + o_n < n)[None, :])
    else:
        b_g, b_y = weight_pair(b_x, b_theta, b_s, b_p, P, FAST)
        b_F = tl.sum(b_y, 1)
        b_F = tl.where(b_F > 0.0, b_F, 1.0)
        p_y = y_ptr + o_r[:, None] * stride_yr + o_n[None, :]
        b_y = math.cast(b_y / b_F[:, None] + b_nan, y_ptr.dtype.element_ty)
        tl.store(p_y, b_y, mask=(o_r < n_rows)[:, None] & (o_n < n)[None, :])


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
def _entmax_backward_kernel(
    dy_ptr, y_ptr, alpha_ptr, dx_ptr, ds_ptr, stride_dyr, stride_yr, stride_dxr, s, n_rows, n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
    HAS_ALPHA: tl.constexpr, NEED_ALPHA: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if HAS_ALPHA:
        b_s = exponent(tl.load(alpha_ptr + o_r, mask=o_r < n_rows, other=1.5)[:, None])
    else:
        b_s = s + tl.zeros([BLOCK_R, 1], tl.float32)
    # Sums over the row. One trip unless the row is longer than a block.
    wide: tl.constexpr = ds_ptr.dtype.element_ty
    b_G = tl.zeros([BLOCK_R], wide)
    b_Gdy = tl.zeros([BLOCK_R], wide)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_y = _load_rows(y_ptr, o_r, o_n, n_rows, n, stride_yr, 0.0)
        b_dy = _load_rows(dy_ptr, o_r, o_n, n_rows, n, stride_dyr, 0.0)
        b_g = _support_power(b_y, b_s, P, FAST)
        b_G += tl.sum(b_g, 1)
        b_Gdy += tl.sum(b_g * b_dy, 1)
    b_mean = (b_Gdy / tl.where(b_G == 0.0, 1.0, b_G))[:, None]
    b_ds = tl.zeros([BLOCK_R], wide)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_y = _load_rows(y_ptr, o_r, o_n, n_rows, n, stride_yr, 0.0)
        b_dy = _load_rows(dy_ptr, o_r, o_n, n_rows, n, stride_dyr, 0.0)
        b_g = _support_power(b_y, b_s, P, FAST)
        b_dx = math.cast(b_g * (b_dy - b_mean), dx_ptr.dtype.element_ty)
        p_dx = dx_ptr + o_r[:, None] * stride_dxr + o_n[None, :]
        tl.store(p_dx, b_dx, mask=(o_r < n_rows)[:, None] & (o_n < n)[None, :])
        if NEED_ALPHA:
            b_ds -= tl.sum(curvature(b_y, b_g, b_s, FAST) * (b_dy - b_mean), 1)
    if NEED_ALPHA:
        tl.store(ds_ptr + o_r, b_ds, mask=o_r < n_rows)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """(R, N) with unit stride along the row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _alphas(x: Tensor, alpha: Tensor) -> tuple[Tensor, float, int]:
    """One alpha per row, or x and the s that all rows share; and P. Kernels take numbers as fp32,
    so for fp64 a number is an alpha per row, too."""
    wide, P = _sum_dtype(x), 0
    if alpha.dim() == 0 and alpha.device.type == "cpu":
        value = alpha.item()
        s = value - 1.0
        P = threshold.integer_exponent(s) if s > 0 else 0
        if wide == torch.float32:
            return x, max(s, SMALLEST_S.value), P
        P = P if abs(s * P - 1.0) < 1e-14 else 0
        alpha = torch.full((1,), value, dtype=wide, device=x.device)
    alpha = alpha.detach().to(wide)
    return alpha.expand(*x.shape[:-1], 1).reshape(-1).contiguous(), 1.0, P


def _launch(x: Tensor, table, table_fp64) -> tuple[dict, tuple[int, ...], device.Target]:
    """Meta-parameters and grid for rows like those of x."""
    target = device.target(x)
    table = table_fp64 if x.dtype == torch.float64 else table
    R, N = x.shape
    meta = table.pick(target, N).meta()
    meta["BLOCK_N"] = min(meta["BLOCK_N"], triton.next_power_of_2(max(N, 16)))
    return meta, (triton.cdiv(R, meta["BLOCK_R"]),), target


def launch_entmax_forward(x: Tensor, alpha: Tensor, n_iter: int, fast_math: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = _rows(x)
    alphas, s, P = _alphas(x, alpha)
    y_rows = y.view(rows.shape)
    meta, grid, target = _launch(rows, configs.ROWS_FORWARD, configs.ROWS_FORWARD_FP64)
    _entmax_forward_kernel[grid](
        rows, alphas, y_rows, rows.stride(0), y_rows.stride(0), s, n_iter, *rows.shape,
        P=P, HAS_ALPHA=alphas is not x, IS_LONG=rows.shape[1] > meta["BLOCK_N"],
        FAST=fast_math and math.fast(target), **meta,
    )  # fmt: skip
    return y


def launch_entmax_backward(
    dy: Tensor, y: Tensor, alpha: Tensor, need_alpha: bool, fast_math: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    ds = torch.zeros(
        (*y.shape[:-1], 1) if need_alpha else (0,), dtype=_sum_dtype(y), device=y.device
    )
    if y.numel() == 0:
        return dx, ds
    dy_rows, y_rows, dx_rows = _rows(dy), _rows(y), dx.view(-1, y.shape[-1])
    alphas, s, P = _alphas(y, alpha)
    meta, grid, target = _launch(y_rows, configs.ROWS_BACKWARD, configs.ROWS_BACKWARD_FP64)
    _entmax_backward_kernel[grid](
        dy_rows, y_rows, alphas, dx_rows, ds, dy_rows.stride(0), y_rows.stride(0),
        dx_rows.stride(0), s, *y_rows.shape, P=P, HAS_ALPHA=alphas is not y,
        NEED_ALPHA=need_alpha, FAST=fast_math and math.fast(target), **meta,
    )  # fmt: skip
    return dx, ds
