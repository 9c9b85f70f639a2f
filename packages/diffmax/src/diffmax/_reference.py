"""The specification: dense maths in the dtype of X, differentiable, and slow.

Y_i = exp_a(X_i - tau),  exp_a(u) = [1 + a u]_+ ** (1/a),  a = 1 - alpha,  sum_i Y_i = 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import Bisect, LinearLoss


def exp_a(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """[1 + a u]_+ ** (1/a) and its derivative in u, by log1p: exact down to a = 0, exp(u)."""
    inside = a * u > -1
    L = torch.log1p(torch.where(inside, a * u, 0)) / a
    return torch.where(inside, torch.exp(L), 0), torch.where(inside, torch.exp((1 - a) * L), 0)


def bisect(call: Bisect) -> Tensor:
    X, alpha, dim = call.X, call.alpha, call.dim
    a = 1 - (alpha.to(X.device, X.dtype) if alpha.dim() else alpha)
    top = X.detach().amax(dim, keepdim=True) if X.numel() else X.sum(dim, keepdim=True)
    dead = top == -torch.inf
    z = torch.where(dead, 0, X) - torch.where(dead, 0, top)
    with torch.no_grad():  # sum Y >= 1 at tau = max X = 0, sum Y <= 1 at the tau where N exp_a = 1
        low = torch.zeros_like(top)
        high = -torch.expm1(-a * torch.log(torch.full_like(top, max(1, X.shape[dim])))) / a
        high = torch.maximum(high, low + 0 * a)
        for _ in range(60):  # what is left of log N is less than a float64 tells beside 1
            middle = (low + high) / 2
            log = torch.log1p((a * (z - middle)).clamp(min=-1)) / a
            above = log.exp().sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    # At the root Newton's steps change nothing, but carry the derivatives of tau: one step carries
    # the first, two the first three, three the first seven.
    tau = low
    for _ in range(3):
        Y, slope = exp_a(z - tau, a)
        slope = slope.sum(dim, keepdim=True)
        tau = tau + (Y.sum(dim, keepdim=True) - 1) / torch.where(slope > 0, slope, 1)
    Y, _ = exp_a(z - tau, a)
    if call.ensure_sum_one:
        Y = Y / Y.sum(dim, keepdim=True).detach()
    return torch.where(dead, 0, Y)


def linear_loss(call: LinearLoss) -> Tensor:
    """<p - y, X> + H(p) - H(y),  X = hidden @ weight.T + bias,  H(p) = sum p (1 - p^a) / a(1+a)."""
    dtype, V = torch.promote_types(call.hidden.dtype, torch.float32), call.weight.shape[0]
    hidden, weight = call.hidden.to(dtype), call.weight.to(dtype)
    X = hidden @ weight.T
    X = X if call.bias is None else X + call.bias.to(dtype)
    X = X if call.softcap is None else call.softcap * torch.tanh(X / call.softcap)
    kept = call.target >= 0
    given = torch.where(kept, call.target_weights, 0).to(dtype)
    y = torch.zeros_like(X).scatter_add(1, call.target.clamp(min=0), given)
    y = (1 - call.label_smoothing) * y + call.label_smoothing / V
    # the derivative in alpha of a weight that is 0 is 0, but 0 * inf to PyTorch
    far = torch.where(X == -torch.inf, torch.finfo(dtype).min / 8, X)
    p = bisect(Bisect(far, call.alpha))
    p = torch.where((X > -torch.inf).any(-1, keepdim=True) | X.isnan(), p, 0)
    # Beside the largest score, what the loss is made of keeps its digits.
    top = X.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    gap = p - y
    gap_X = torch.where(gap == 0, 0, gap * torch.where(gap == 0, 0, X - top))
    lacking = (1 - call.label_smoothing) * (1 - given.sum(-1))
    is_rounding = lacking.abs() <= 4 * torch.finfo(call.target_weights.dtype).eps
    lacking = torch.where(is_rounding, 0, lacking) * top.squeeze(-1)
    a = 1 - (call.alpha.to(X.device, dtype) if call.alpha.dim() else call.alpha)

    def entropy(p: Tensor) -> Tensor:
        return -p * torch.expm1(a * torch.where(p > 0, p, 1).log()) / (a * (1 + a))

    losses = (gap_X + entropy(p) - entropy(y)).sum(-1) + lacking
    counted = kept.any(-1)
    losses = torch.where(counted & (X > -torch.inf).any(-1), losses, 0)
    if call.reduction == "none":
        return losses
    return losses.sum() / (counted.sum() if call.reduction == "mean" else 1)
