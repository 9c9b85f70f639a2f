"""The specification: dense maths in the dtype of X, differentiable, and slow.

Y_i = exp_a(X_i - tau),  exp_a(u) = [1 + a u]_+ ** (1/a),  a = 1 - alpha,  sum_i Y_i = 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def exp_a(u: Tensor, a: Tensor) -> Tensor:
    """[1 + a u]_+ ** (1/a), as exp(log1p(a u) / a): exact down to a = 0, where it is exp(u)."""
    inside = a * u > -1
    return torch.where(inside, torch.exp(torch.log1p(torch.where(inside, a * u, 0)) / a), 0)


def bisect(
    X: Tensor, alpha: Tensor, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True
) -> Tensor:
    a = 1 - (alpha.to(X.device, X.dtype) if alpha.dim() else alpha)
    top = X.detach().amax(dim, keepdim=True) if X.numel() else X.sum(dim, keepdim=True)
    dead = top == -torch.inf
    z = torch.where(dead, 0, X) - torch.where(dead, 0, top)
    with torch.no_grad():  # sum Y >= 1 at tau = max X = 0, sum Y <= 1 at the tau where N exp_a = 1
        low = torch.zeros_like(top)
        high = -torch.expm1(-a * torch.log(torch.full_like(top, max(1, X.shape[dim])))) / a
        high = torch.maximum(high, low + 0 * a)
        for _ in range(max(n_iter, 100)):
            middle = (low + high) / 2
            above = exp_a(z - middle, a).sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    # At the root, one Newton step changes nothing but carries the derivatives of tau.
    Y = exp_a(z - low, a)
    slope = torch.where(Y > 0, Y.detach().clamp(min=1e-300) ** (1 - a), 0).sum(dim, keepdim=True)
    tau = low + (Y.sum(dim, keepdim=True) - 1) / slope.detach()
    Y = exp_a(z - tau, a)
    if ensure_sum_one:
        Y = Y / Y.sum(dim, keepdim=True).detach()
    return torch.where(dead, 0, Y)


def bisect_backward(
    G: Tensor, Y: Tensor, alpha: Tensor, dim: int = -1, alpha_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """dX = S (G - q), q = sum(S G) / sum(S), S = Y^alpha on the support; dalpha = sum H (G - q)."""
    exact = alpha.to(Y.device, Y.dtype)
    a = 1 - exact
    support = Y != 0
    L = torch.where(support, Y, 1).log()
    S = torch.where(support, torch.exp(exact * L), 0)
    mass = S.sum(dim, keepdim=True)
    q = (S * G).sum(dim, keepdim=True) / torch.where(mass == 0, 1, mass)
    H = torch.where(support, Y * L * L * phi(-a * L), 0)
    per_row = (H * (G - q)).sum(dim, keepdim=True)
    d_alpha = per_row.sum_to_size(alpha.shape) if alpha.dim() else per_row.sum()
    return S * (G - q), (d_alpha if alpha_grad else torch.zeros_like(d_alpha)).to(alpha)


def phi(u: Tensor) -> Tensor:
    """(e^u - 1 - u) / u^2 = sum_k u^k / (k + 2)!."""
    series, term = torch.zeros_like(u), torch.full_like(u, 0.5)
    for k in range(20):
        series = series + term
        term = term * torch.where(u.abs() < 1, u, 0) / (k + 3)
    return torch.where(u.abs() < 1, series, (torch.expm1(u) - u) / torch.where(u == 0, 1, u * u))
