"""The second derivative of the rows, in closed form.

With g = p^(1-s) and L = log p on the support, and mean(v) = sum(g v) / sum(g), the first one is

    dx = g (dp - mean(dp)),    ds = -sum h (dp - mean(dp)),    h = p L^2 phi(-s L),

phi(u) = (e^u - 1 - u) / u^2. What follows needs dg/dp = (1-s) g / p, dg/ds = -L g,
dh/dp = (1-s) L^2 phi + L and dh/ds = -p L^3 phi'(-s L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows(
    v: Tensor, w: Tensor, dp: Tensor, p: Tensor, s: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of <v, dx> + <w, ds> in dp (..., N), p (..., N) and s (..., 1)."""
    support = p != 0
    p = torch.where(support, p, 1.0)
    L = p.log()
    g = torch.where(support, ((1 - s) * L).exp(), 0.0)
    mass = g.sum(-1, keepdim=True)
    mass = torch.where(mass == 0, 1.0, mass)
    phi, slope = _phi(-s * L)
    h = torch.where(support, p * L * L * phi, 0.0)
    dp = dp - (g * dp).sum(-1, keepdim=True) / mass
    v = v - (g * v).sum(-1, keepdim=True) / mass + w * h.sum(-1, keepdim=True) / mass
    d_dp = g * v - w * h
    d_g, d_h = dp * v, -w * dp
    d_p = d_g * (1 - s) * g / p + d_h * ((1 - s) * L * L * phi + L)
    d_s = -(d_g * g * L + torch.where(support, d_h * p * L**3 * slope, 0.0)).sum(-1, keepdim=True)
    return d_dp, torch.where(support, d_p, 0.0), d_s


def _phi(u: Tensor) -> tuple[Tensor, Tensor]:
    """phi(u) = sum_k u^k / (k+2)! and its derivative sum_k (k+1) u^k / (k+3)!, for u >= 0."""
    small = u.clamp(max=1.0)
    value, slope = torch.zeros_like(u), torch.zeros_like(u)
    for k in range(19, -1, -1):
        value = value * small + 1 / math.factorial(k + 2)
        slope = slope * small + (k + 1) / math.factorial(k + 3)
    big = u.clamp(min=1.0)
    e = big.exp()
    return (
        torch.where(u < 1, value, (e - 1 - big) / big**2),
        torch.where(u < 1, slope, (big * e - 2 * e + big + 2) / big**3),
    )
