"""phi(u) of the derivatives in s, in plain PyTorch, exact to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["least", "phi", "phi_slope"]


def least(dtype: torch.dtype) -> float:
    """Where logarithms start: that of a denormal number takes ten times as long."""
    return 1e-37 if dtype == torch.float32 else 1e-300


def phi(u: Tensor) -> Tensor:
    """phi(u) = (e^u - 1 - u) / u^2 for u >= 0, 1/2 at u = 0; differentiable."""
    near, v = _series(u, [1 / math.factorial(k + 2) for k in range(18)]), u.clamp(min=1.0)
    return torch.where(u < 1, near, (v.expm1() / v - 1) / v)


def phi_slope(u: Tensor) -> Tensor:
    """The derivative of phi: (u e^u - 2 e^u + u + 2) / u^3, 1/6 at u = 0; differentiable."""
    near = _series(u, [(k + 1) / math.factorial(k + 3) for k in range(20)])
    v = u.clamp(min=1.0)
    return torch.where(u < 1, near, ((v - 2) * v.exp() + v + 2) / v**3)


def _series(u: Tensor, coefficients: list[float]) -> Tensor:
    """sum_k coefficients[k] min(u, 1)^k."""
    small, total = u.clamp(max=1.0), torch.zeros_like(u)
    for coefficient in reversed(coefficients):
        total = torch.addcmul(total.new_full((), coefficient), total, small)
    return total
