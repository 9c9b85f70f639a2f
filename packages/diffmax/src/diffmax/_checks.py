"""Is the input legal? Shapes and dtypes always; values of alpha only where reading them is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

from ._rows import row_shape

Alpha = float | Tensor | Callable[[], "float | Tensor"]
_ENDS = "alpha=1 is torch.softmax and alpha=0 is sparsemax"


def scores(X: Any, dim: Any) -> None:
    checks.floating("X", X)
    if isinstance(dim, bool) or not isinstance(dim, int):
        checks.fail("dim", "be an int", type(dim).__name__, error=TypeError)
    last = max(X.dim(), 1)
    if not -last <= dim < last:
        checks.fail("dim", f"be in [{-last}, {last - 1}]", dim, error=IndexError)


def alpha_number(alpha: Any) -> float:
    """A float in (0, 1), for constructors and for the functional alpha."""
    if isinstance(alpha, bool) or not isinstance(alpha, (float, int)):
        checks.fail("alpha", "be a number", type(alpha).__name__, error=TypeError)
    if not 0.0 < alpha < 1.0:
        checks.fail("alpha", "be in (0, 1)", alpha, hint=_ENDS)
    return float(alpha)


def alpha_tensor(alpha: Any, X: Tensor, dim: int) -> Tensor:
    """alpha in any of its forms as a tensor; a number becomes a 0-d fp64 tensor on the CPU."""
    if callable(alpha) and not isinstance(alpha, Tensor):
        alpha = alpha()
    if not isinstance(alpha, Tensor):
        return torch.full((), alpha_number(alpha), dtype=torch.float64)
    checks.floating("alpha", alpha)
    rows = row_shape(tuple(X.shape), dim) if X.dim() else ()
    if alpha.dim() > len(rows) or any(
        n != 1 and n != m for n, m in zip(reversed(alpha.shape), reversed(rows), strict=False)
    ):
        checks.fail(
            "alpha", f"broadcast to {rows}, size 1 along dim={dim}", f"shape {tuple(alpha.shape)}"
        )
    if alpha.dim() and alpha.device != X.device:
        checks.fail("alpha", f"be on the device of `X` ({X.device})", alpha.device)
    if checks.reads_values(alpha) and not bool(((alpha > 0) & (alpha < 1)).all()):
        inside = (alpha > 0) & (alpha < 1)
        checks.fail("alpha", "be in (0, 1)", alpha.detach()[~inside][0].item(), hint=_ENDS)
    return alpha
