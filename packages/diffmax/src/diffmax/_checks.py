"""Is the input legal? Shapes and dtypes always; values of alpha only where reading them is free."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

from ._rows import row_shape

Alpha = float | Tensor | Callable[[], "float | Tensor"]
_ENDS = "alpha=1 is torch.softmax and alpha=0 is sparsemax"


def scores(X: Any, dim: Any, name: str = "X") -> int:
    """dim as an int, of scores that have it."""
    checks.floating(name, X)
    axis = dimension(dim)
    last = max(X.dim(), 1)
    if not -last <= axis < last:
        checks.fail("dim", f"be in [{-last}, {last - 1}]", axis, error=IndexError)
    return axis


def dimension(dim: Any) -> int:
    # int first: it is all that torch.compile follows
    if isinstance(dim, bool) or not (isinstance(dim, int) or isinstance(dim, numbers.Integral)):
        checks.fail("dim", "be an int", type(dim).__name__, error=TypeError)
    return int(dim)


def target(target: Any, X: Tensor, dim: int, ignore_index: int) -> None:
    """Class indices of the shape of X without dim, or weights of the shape of X."""
    if not isinstance(target, Tensor):
        checks.fail("target", "be a torch.Tensor", type(target).__name__, error=TypeError)
    if target.is_floating_point():
        if target.shape != X.shape:
            checks.fail("target", f"have the shape of `X`, {tuple(X.shape)}", tuple(target.shape))
        return
    checks.integer("target", target)
    rows = tuple(n for i, n in enumerate(X.shape) if i != dim % max(X.dim(), 1))
    if tuple(target.shape) != rows:
        checks.fail("target", f"have the shape of `X` without dim={dim}, {rows}", target.shape)
    classes(target, ignore_index, X.shape[dim] if X.dim() else 1)


def classes(target: Tensor, ignore_index: int, n: int) -> None:
    """Class indices in [0, n), where reading them costs nothing."""
    if checks.reads_values(target):
        outside = (target != ignore_index) & ((target < 0) | (target >= n))
        if bool(outside.any()):
            place = tuple(outside.nonzero()[0].tolist())
            got = f"{target[place].item()} at position {place}"
            checks.fail("target", f"be in [0, {n - 1}]", got, hint=f"or {ignore_index}, ignored")


def number(name: str, value: Any) -> float:
    """A real number, which a bool is not, as a float."""
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        checks.fail(name, "be a number", type(value).__name__, error=TypeError)
    return float(value)


def alpha_number(alpha: Any, before_dim: bool = False) -> float:
    """A float in (0, 1); `before_dim`: where torch.softmax has its dim, so that it may be meant."""
    if not 0.0 < number("alpha", alpha) < 1.0:
        is_int = before_dim and isinstance(alpha, numbers.Integral)
        hint = f"{_ENDS}; did you mean dim={alpha}?" if is_int else _ENDS
        checks.fail("alpha", "be in (0, 1)", alpha, hint=hint)
    return float(alpha)


def cast(X: Tensor, dtype: Any) -> Tensor:
    """X in the dtype asked for, as torch.softmax casts; X itself without one."""
    if dtype is None:
        return X
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        checks.fail("dtype", "be a floating-point torch.dtype or None", dtype, error=TypeError)
    if not isinstance(X, Tensor):
        checks.fail("X", "be a torch.Tensor", type(X).__name__, error=TypeError)
    return X.to(dtype)


def alpha_tensor(alpha: Any, X: Tensor, dim: int) -> Tensor:
    """alpha in any of its forms as a tensor; a number becomes a 0-d fp64 tensor on the CPU."""
    if callable(alpha) and not isinstance(alpha, Tensor):
        alpha = alpha()
    if not isinstance(alpha, Tensor):
        return torch.full((), alpha_number(alpha, True), dtype=torch.float64, device="cpu")
    checks.floating("alpha", alpha)
    rows = row_shape(tuple(X.shape), dim) if X.dim() else ()
    last = rows[max(len(rows) - alpha.dim(), 0) :]
    if alpha.dim() > len(rows) or [
        n for n, m in zip(alpha.shape, last, strict=True) if n != 1 and n != m
    ]:
        checks.fail(
            "alpha", f"broadcast to {rows}, size 1 along dim={dim}", f"shape {tuple(alpha.shape)}"
        )
    if alpha.dim() and alpha.device != X.device:
        checks.fail("alpha", f"be on the device of `X` ({X.device})", alpha.device)
    if checks.reads_values(alpha) and not bool(((alpha > 0) & (alpha < 1)).all()):
        inside = (alpha > 0) & (alpha < 1)
        checks.fail("alpha", "be in (0, 1)", alpha.detach()[~inside][0].item(), hint=_ENDS)
    return alpha
