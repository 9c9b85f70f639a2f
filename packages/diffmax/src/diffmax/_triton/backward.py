"""Backward kernels: dX = S (G - q), S = Y^alpha on the support, q = sum(S G) / sum(S).

The gradient in alpha is sum H (G - q) per row, H = Y L^2 phi(-a L), L = log Y, a = 1 - alpha; rows
write their own number and PyTorch adds them up, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels import device
from shared_kernels.triton import math

from .._rows import collect
from . import configs
from .forward import row_parameter


@triton.jit
def _alpha_share(y, S, alpha, IS_WIDE: tl.constexpr):
    """H, an entry's weight in dalpha: (S - Y (1 + u)) / a^2, u = -a log Y, by series if u < 1/2."""
    a = 1.0 - alpha
    log = math.log2(tl.where(y > 0.0, y, 1.0)) * 0.6931471805599453
    u = -a * log
    small = tl.minimum(u, 0.5)
    # phi(u) = sum_k u^k / (k + 2)!
    if IS_WIDE:
        phi = 1.0 / 87178291200 + small * (1.0 / 1307674368000)
        phi = 1.0 / 6227020800 + small * phi
        phi = 1.0 / 479001600 + small * phi
        phi = 1.0 / 39916800 + small * phi
        phi = 1.0 / 3628800 + small * phi
    else:
        phi = 1.0 / 3628800 + small * (1.0 / 39916800)
    phi = 1.0 / 362880 + small * phi
    phi = 1.0 / 40320 + small * phi
    phi = 1.0 / 5040 + small * phi
    phi = 1.0 / 720 + small * phi
    phi = 1.0 / 120 + small * phi
    phi = 1.0 / 24 + small * phi
    phi = 1.0 / 6 + small * phi
    phi = 0.5 + small * phi
    return tl.where(u < 0.5, y * log * log * phi, (S - y * (1.0 + u)) / (a * a))


@triton.jit(do_not_specialize=["n_rows", "n"])
def _bisect_backward_kernel(
    g_ptr,
    y_ptr,
    alpha_ptr,
    dx_ptr,
    d_alpha_ptr,
    stride_gr,
    stride_gn,
    stride_yr,
    stride_yn,
    stride_alpha,
    alpha,
    n_rows,
    n,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ALPHA_ROWS: tl.constexpr,
    HAS_ALPHA_GRAD: tl.constexpr,
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
    p_g = g_ptr + o_r[:, None] * stride_gr + o_n[None, :] * stride_gn
    p_y = y_ptr + o_r[:, None] * stride_yr + o_n[None, :] * stride_yn
    b_g = tl.load(p_g, mask=m_x, other=0.0).to(dtype)
    b_y = tl.load(p_y, mask=m_x, other=0.0).to(dtype)
    # [BLOCK_R]
    if HAS_ALPHA_ROWS:
        b_alpha = tl.load(alpha_ptr + o_r * stride_alpha, mask=m_r, other=0.5).to(dtype)
    else:
        b_alpha = tl.zeros([BLOCK_R], dtype) + alpha
    # epilogue
    b_S = math.power(b_y, b_alpha[:, None], FAST)
    b_mass = tl.sum(b_S, 1)
    b_q = tl.sum(b_S * b_g, 1) / tl.where(b_mass == 0.0, 1.0, b_mass)
    b_g = b_g - b_q[:, None]
    # store
    p_dx = dx_ptr + o_r[:, None] * n + o_n[None, :]
    tl.store(p_dx, math.cast(b_S * b_g, dx_ptr.dtype.element_ty), mask=m_x)
    if HAS_ALPHA_GRAD:
        b_h = _alpha_share(b_y, b_S, b_alpha[:, None], IS_WIDE)
        tl.store(d_alpha_ptr + o_r, tl.sum(b_h * b_g, 1), mask=m_r)


@triton.jit(do_not_specialize=["n"])
def _bisect_backward_stream_kernel(
    g_ptr,
    y_ptr,
    alpha_ptr,
    dx_ptr,
    d_alpha_ptr,
    stride_gr,
    stride_gn,
    stride_yr,
    stride_yn,
    stride_alpha,
    alpha,
    n,
    BLOCK_N: tl.constexpr,
    HAS_ALPHA_ROWS: tl.constexpr,
    HAS_ALPHA_GRAD: tl.constexpr,
    IS_WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    # who am I
    i_r = tl.program_id(0).to(tl.int64)
    p_g = g_ptr + i_r * stride_gr
    p_y = y_ptr + i_r * stride_yr
    n_tiles = tl.cdiv(n, BLOCK_N)
    # load
    dtype: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    if HAS_ALPHA_ROWS:
        b_alpha = tl.load(alpha_ptr + i_r * stride_alpha).to(dtype)
    else:
        b_alpha = alpha
    # loop
    # [BLOCK_N]
    b_mass = tl.zeros([BLOCK_N], dtype)
    b_mean = tl.zeros([BLOCK_N], dtype)
    for i_n in range(n_tiles):
        o_n = tl.cast(i_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_g = tl.load(p_g + o_n * stride_gn, mask=o_n < n, other=0.0).to(dtype)
        b_y = tl.load(p_y + o_n * stride_yn, mask=o_n < n, other=0.0).to(dtype)
        b_S = math.power(b_y, b_alpha, FAST)
        b_mass += b_S
        b_mean += b_S * b_g
    mass = tl.sum(b_mass, 0)
    b_q = tl.sum(b_mean, 0) / tl.where(mass == 0.0, 1.0, mass)
    # store
    b_d = tl.zeros([BLOCK_N], dtype)
    for i_n in range(n_tiles):
        o_n = tl.cast(i_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_g = tl.load(p_g + o_n * stride_gn, mask=o_n < n, other=0.0).to(dtype) - b_q
        b_y = tl.load(p_y + o_n * stride_yn, mask=o_n < n, other=0.0).to(dtype)
        b_S = math.power(b_y, b_alpha, FAST)
        b_dx = math.cast(b_S * b_g, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + i_r * n + o_n, b_dx, mask=o_n < n)
        if HAS_ALPHA_GRAD:
            b_d += _alpha_share(b_y, b_S, b_alpha, IS_WIDE) * b_g
    if HAS_ALPHA_GRAD:
        tl.store(d_alpha_ptr + i_r, tl.sum(b_d, 0))


def launch_bisect_backward(
    G: Tensor, Y: Tensor, alpha: Tensor, dim: int, alpha_grad: bool
) -> tuple[Tensor, Tensor]:
    y_rows = Y.movedim(dim, -1)
    dX = torch.empty(y_rows.shape, dtype=Y.dtype, device=Y.device)
    if Y.numel() == 0:
        return dX.movedim(-1, dim), alpha.new_zeros(alpha.shape)
    N = y_rows.shape[-1]
    g, y = G.movedim(dim, -1).reshape(-1, N), y_rows.reshape(-1, N)
    is_wide = Y.dtype == torch.float64
    number, column, stride_alpha = row_parameter(alpha, Y, dim)
    wide = torch.float64 if is_wide else torch.float32
    d_rows = torch.empty(y_rows.shape[:-1] + (1,), dtype=wide, device=Y.device)
    target = device.target(Y)
    flags = {
        "HAS_ALPHA_ROWS": column is not None,
        "HAS_ALPHA_GRAD": alpha_grad,
        "IS_WIDE": is_wide,
        "FAST": math.fast(target),
    }
    inputs = (g, y, y if column is None else column, dX, d_rows)
    inputs = (*inputs, *g.stride(), *y.stride(), stride_alpha, number)
    table = configs.BACKWARD_ALPHA if alpha_grad else configs.BACKWARD
    longest = configs.LONGEST_ROW_ALPHA if alpha_grad else configs.LONGEST_ROW
    if is_wide:
        table, longest = configs.BACKWARD_WIDE, configs.LONGEST_ROW_WIDE
    if N > longest:
        config = (configs.STREAM_WIDE if is_wide else configs.STREAM).pick(target, N)
        _bisect_backward_stream_kernel[(y.shape[0],)](*inputs, N, **flags, **config.meta())
    else:
        config = table.pick(target, N)
        grid = (triton.cdiv(y.shape[0], config["BLOCK_R"]),)
        flags["BLOCK_N"] = triton.next_power_of_2(N)
        _bisect_backward_kernel[grid](*inputs, y.shape[0], N, **flags, **config.meta())
    if not alpha_grad:
        return dX.movedim(-1, dim), alpha.new_zeros(alpha.shape)
    return dX.movedim(-1, dim), collect(d_rows, alpha, dim)
