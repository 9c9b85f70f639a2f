"""Derivatives of the ops, registered in _ops.py.

With S = Y^alpha and L = log Y on the support, a = 1 - alpha, q(v) = sum(S v) / sum(S):

    dX     = S (G - q(G))
    dalpha = sum H (G - q(G)),   H = Y L^2 phi(-a L),   phi(u) = (e^u - 1 - u) / u^2

The second derivatives follow from dS/dY = alpha S / Y, dS/dalpha = S L,
dH/dY = alpha L^2 phi + L and dH/dalpha = Y L^3 phi'(-a L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._rows import collect, spread


def bisect_context(ctx, inputs, output) -> None:
    _, alpha, dim, _, _, backend = inputs
    ctx.save_for_backward(output, alpha)
    ctx.dim, ctx.backend = dim, backend


def bisect_grad(ctx, G: Tensor):
    Y, alpha = ctx.saved_tensors
    wants_alpha = ctx.needs_input_grad[1]
    dX, d_alpha = torch.ops.diffmax.bisect_backward(G, Y, alpha, ctx.dim, wants_alpha, ctx.backend)
    return dX, d_alpha if wants_alpha else None, None, None, None, None


def escort_context(ctx, inputs, output) -> None:
    _, alpha, ctx.dim, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.save_for_backward(output[0], alpha, *output[1:])


def escort_grad(ctx, G: Tensor, *_):
    if ctx.needs_input_grad[1]:
        grads = torch.ops.diffmax.bisect_backward(
            G, *ctx.saved_tensors[:2], ctx.dim, True, ctx.backend
        )
    else:
        dX = torch.ops.diffmax.escort_backward(G, *ctx.saved_tensors, ctx.dim, ctx.backend)
        grads = dX, None
    return *grads, None, None, None, None


def backward_context(ctx, inputs, output) -> None:
    G, Y, alpha, dim, alpha_grad, _ = inputs
    ctx.save_for_backward(G, Y, alpha)
    ctx.dim, ctx.alpha_grad = dim, alpha_grad


def backward_grad(ctx, v: Tensor, w: Tensor):
    return *_second(ctx, v, w if ctx.alpha_grad else None), None, None, None


def escort_backward_context(ctx, inputs, output) -> None:
    G, Y, alpha, _, _, ctx.dim, _ = inputs
    ctx.save_for_backward(G, Y, alpha)


def escort_backward_grad(ctx, v: Tensor):
    """dX as a function of G, Y and alpha: what was kept is one of Y."""
    return *_second(ctx, v, None), None, None, None, None


def _second(ctx, v: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of <v, dX> + <w, dalpha> in G, Y and alpha; v, w: what comes from above."""
    G, Y, alpha = (t.detach() for t in ctx.saved_tensors)
    dim, dtype = ctx.dim, torch.float64 if Y.dtype == torch.float64 else torch.float32
    g, y, v = (t.movedim(dim, -1).to(dtype) for t in (G, Y, v))
    power = spread(alpha, Y.shape, dim).to(y.device, dtype)
    w = torch.zeros_like(power) if w is None else spread(w, Y.shape, dim).to(y.device, dtype)

    support = y != 0
    y = torch.where(support, y, 1.0)
    L = y.log()
    S = torch.where(support, (power * L).exp(), 0.0)
    mass = S.sum(-1, keepdim=True)
    mass = torch.where(mass == 0, 1.0, mass)
    phi, slope = _phi((power - 1) * L)
    H = torch.where(support, y * L * L * phi, 0.0)
    g = g - (S * g).sum(-1, keepdim=True) / mass
    v = v - (S * v).sum(-1, keepdim=True) / mass
    w_mean = w * H.sum(-1, keepdim=True) / mass

    d_G = S * (v - w_mean) + w * H
    d_S = g * (v - w_mean)
    d_H = w * g
    d_Y = torch.where(support, d_S * power * S / y + d_H * (power * L * L * phi + L), 0.0)
    d_alpha = (d_S * S * L + torch.where(support, d_H * y * L**3 * slope, 0.0)).sum(
        -1, keepdim=True
    )
    back_G, back_Y = (d.movedim(-1, dim).to(Y.dtype) for d in (d_G, d_Y))
    return back_G, back_Y, collect(d_alpha, alpha, dim)


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
