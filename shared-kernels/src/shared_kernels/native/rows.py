"""Rows of sparse weights by the native library: the twin of `shared_kernels.qexp`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..rows import Entmax, Weights
from .library import DTYPES, call, in_ranges, zeros
from .library import why_not as no_library

__all__ = ["backward", "entmax_backward", "entmax_forward", "normalize", "why_not"]

_SECONDS_PER_ENTRY = 6e-10


def why_not(call: Entmax) -> str | None:
    """None where the library runs the call; else the reason."""
    return no_library(call.x)


def _per_row(s: float | Tensor, x: Tensor) -> tuple[Any, int, int]:
    """s as fp64: what holds it, its address, and how far one row's lies behind the next one's."""
    if isinstance(s, Tensor) and s.numel() != 1:
        of_rows = s.detach().double().expand(*x.shape[:-1], 1).contiguous()
        return of_rows, of_rows.data_ptr(), 8
    number = ctypes.c_double(float(s))  # all rows share it
    return number, ctypes.addressof(number), 0


def normalize(x: Tensor, s: float | Tensor, n_iter: int = 40, divide: bool = True) -> Tensor:
    """Weights [s x - tau]_+ ** (1/s) of rows, tau such that each row sums to 1; softmax at s = 0.

    Args:
        x: (..., N), fp16, bf16, fp32 or fp64. A row of -inf gives zeros, a row with NaN is NaN.
        s: in [0, 1]; a number, or a tensor that broadcasts to (..., 1).
        n_iter: cap on Newton's steps; the first few, which only bring it near, do not count.
        divide: whether the weights are divided by their sum at the end.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Example:
        >>> import torch
        >>> from shared_kernels import native
        >>> if not native.why_not(torch.ones(1)):
        ...     assert normalize(torch.tensor([2.0, 1.0, -1.0]), 1.0).tolist() == [1.0, 0.0, 0.0]
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.numel()
    if not size:
        return out
    N = x.shape[-1]
    width, dtype, R = N * x.element_size(), DTYPES[x.dtype], size // N
    held, of_s, step = _per_row(s, x)
    of_x, of_out = x.data_ptr(), out.data_ptr()

    def part(start: int, stop: int) -> None:
        far = start * width
        call(
            "rows_forward",
            *(of_x + far, of_s + start * step, step // 8, of_out + far, stop - start, N),
            *(n_iter, divide, dtype),
        )

    in_ranges(part, R, size * _SECONDS_PER_ENTRY)
    return out


def backward(
    dy: Tensor, p: Tensor, s: float | Tensor, need_x: bool = True, need_s: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `normalize` in x and in s, from the divided weights p alone.

        dx = g (dy - mean(dy)),    ds = -sum h (dy - mean(dy)),    h = p L^2 phi(-s L)

    with g = p^(1-s) on the support, the mean under g, L = log p, phi(u) = (e^u - 1 - u) / u^2.

    Args:
        dy, p: (..., N) of one dtype.
        s: as in `normalize`.

    Returns:
        dx like p, and ds (..., 1) in fp32 (fp64 for fp64), one number per row; None if not needed.
    """
    dy, p = dy.to(p.dtype).contiguous(), p.contiguous()
    dx = torch.empty_like(p) if need_x else None
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    ds = zeros((*p.shape[:-1], 1), torch.float64) if need_s else None
    size = p.numel()
    if size:
        N = p.shape[-1]
        width, dtype = N * p.element_size(), DTYPES[p.dtype]
        held, of_s, step = _per_row(s, p)
        of_dy, of_p = dy.data_ptr(), p.data_ptr()
        of_dx, of_ds = (None if x is None else x.data_ptr() for x in (dx, ds))

        def part(start: int, stop: int) -> None:
            far = start * width
            call(
                "rows_backward",
                *(of_dy + far, of_p + far, of_s + start * step, step // 8),
                None if of_dx is None else of_dx + far,
                None if of_ds is None else of_ds + start * 8,
                *(stop - start, N, dtype),
            )

        in_ranges(part, size // N, size * _SECONDS_PER_ENTRY)
    return dx, None if ds is None else ds.to(wide)


def entmax_forward(a: Entmax) -> tuple[Tensor, Weights]:
    """What the op `rows.entmax` and its like run."""
    y = normalize(a.x, a.s, a.n_iter)
    return y, Weights(y)


def entmax_backward(
    a: Entmax, saved: Weights, dy: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    dx, ds = backward(dy, saved.out, a.s, "x" in needs, "alpha" in needs)
    found = {} if dx is None else {"x": dx}
    return found if ds is None else {**found, "alpha": a.d_alpha(ds)}
