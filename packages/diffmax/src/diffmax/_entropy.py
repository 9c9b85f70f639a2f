"""The Tsallis entropy H(p) = sum p (1 - p^a) / (a (1 + a)), a = 1 - alpha, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels.qpower import phi
from shared_kernels.rows import wide


def largest(X: Tensor, dim: int) -> Tensor:
    """The largest score of each row, 0 where it is not finite: a loss is computed beside it."""
    if not X.dim():
        return torch.where(X.isfinite(), X, 0.0).detach()
    if not X.shape[dim]:
        return X.sum(dim, keepdim=True).detach()
    top = X.detach().amax(dim, keepdim=True)
    return torch.where(top.isfinite(), top, 0.0)


def missing(y: Tensor, dim: int) -> Tensor:
    """What target weights lack of a sum of 1, 0 within their rounding: (..., 1)."""
    rest = 1 - y.sum(dim, keepdim=True, dtype=wide(y))
    is_rounding = rest.abs() <= 4 * torch.finfo(y.dtype).eps
    # rounding is no reason for a gradient to end
    return (rest - torch.where(is_rounding, rest, 0.0).detach()).to(y.dtype)


def exponent(alpha: Tensor, p: Tensor) -> Tensor:
    return 1 - alpha.to(p.device, wide(p))


def entropy(p: Tensor, alpha: Tensor) -> Tensor:
    """Each entry's share: -p (p^a - 1) / (a (1 + a))."""
    a = exponent(alpha, p)
    log_p = torch.where(p > 0, p, 1.0).log()
    return -p * torch.expm1(a * log_p) / (a * (1 + a))


def entropy_slope(p: Tensor, alpha: Tensor) -> Tensor:
    """dH/dalpha of each entry, p L^2 chi(a L) / (1 + a) - p (e^(aL) - 1) / (a (1 + a)^2).

    chi(u) = (u e^u - e^u + 1) / u^2 = e^u phi(-u), which the series of phi keeps exact at u = 0.
    """
    a = exponent(alpha, p)
    y = torch.where(p > 0, p, 1.0)
    L = y.log()
    u = a * L
    chi = u.exp() * phi(-u)
    share = L * L * chi / (1 + a) - torch.expm1(u) / (a * (1 + a) ** 2)
    return torch.where(p > 0, p * share, 0.0)
