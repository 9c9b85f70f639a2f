"""Derivatives of the ops, registered in _ops.py.

With S = Y^alpha and L = log Y on the support, a = 1 - alpha, q(v) = sum(S v) / sum(S):

    dX     = S (G - q(G))
    dalpha = sum H (G - q(G)),   H = Y L^2 phi(-a L),   phi(u) = (e^u - 1 - u) / u^2

The second derivatives are `shared_kernels.rows.second_derivative` with s = a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import rows

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
    G, Y, alpha = ctx.saved_tensors
    dim, dtype = ctx.dim, rows.wide(Y)
    v, G, y = (t.movedim(dim, -1).to(dtype) for t in (v, G, Y))
    s = 1 - spread(alpha, Y.shape, dim).to(Y.device, dtype)
    d_s = None if w is None else -spread(w, Y.shape, dim).to(Y.device, dtype)
    d_G, d_Y, back_s = rows.second_derivative(v, d_s, G, y, s)
    back_G, back_Y = (d.movedim(-1, dim).to(Y.dtype) for d in (d_G, d_Y))
    return back_G, back_Y, collect(-back_s, alpha, dim)


class FenchelYoung(torch.autograd.Function):
    """<p - y, X> + H(p) - H(y) along `dim`, from the weights p of X.

    The optimum p is stationary: the first derivatives are those at a fixed p. They are written in
    p, which has a graph of its own, so the second ones are those of the weights.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, y: Tensor, alpha: Tensor, p: Tensor, dim: int) -> Tensor:
        gap = p - y
        loss = torch.where(gap == 0, 0.0, gap * torch.where(gap == 0, 0.0, X))
        return (loss + _entropy(p, alpha) - _entropy(y, alpha)).sum(dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.dim = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, g: Tensor):
        X, y, alpha, p = ctx.saved_tensors
        g = g.unsqueeze(ctx.dim)
        d_X = (g * (p - y)).to(X.dtype)
        d_y = d_alpha = None
        if ctx.needs_input_grad[1]:
            a = _a(alpha, y)
            power = torch.where(y > 0, torch.where(y > 0, y, 1.0) ** a, 0.0)
            d_y = (g * (-X - (power - 1 / (1 + a)) / -a)).to(y.dtype)
        if ctx.needs_input_grad[2]:
            d_rows = (g * (_entropy_slope(p, alpha) - _entropy_slope(y, alpha))).sum(
                ctx.dim, keepdim=True
            )
            d_alpha = collect(d_rows.movedim(ctx.dim, -1), alpha, ctx.dim)
        return d_X, d_y, d_alpha, None, None


def _a(alpha: Tensor, p: Tensor) -> Tensor:
    return 1 - alpha.to(p.device, torch.promote_types(p.dtype, torch.float32))


def _entropy(p: Tensor, alpha: Tensor) -> Tensor:
    """Each entry's share of the Tsallis entropy (1 - sum p^e) / (e (e - 1)), e = 2 - alpha."""
    a = _a(alpha, p)
    log_p = torch.where(p > 0, p, 1.0).log()
    return -p * torch.expm1(a * log_p) / (a * (1 + a))


def _entropy_slope(p: Tensor, alpha: Tensor) -> Tensor:
    """dH/dalpha of each entry, p L^2 chi(a L) / (1 + a) - p (e^(aL) - 1) / (a (1 + a)^2).

    chi(u) = (u e^u - e^u + 1) / u^2 = e^u phi(-u), which the series of phi keeps exact at u = 0.
    """
    a = _a(alpha, p)
    y = torch.where(p > 0, p, 1.0)
    L = y.log()
    u = a * L
    chi = u.exp() * rows.phi(-u)[0]
    share = L * L * chi / (1 + a) - torch.expm1(u) / (a * (1 + a) ** 2)
    return torch.where(p > 0, p * share, 0.0)
