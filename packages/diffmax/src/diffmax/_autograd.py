"""Second derivatives of the op, and the loss.

With S = Y^alpha and L = log Y on the support, a = 1 - alpha, q(v) = sum(S v) / sum(S):

    dX     = S (G - q(G))
    dalpha = sum H (G - q(G)),   H = Y L^2 phi(-a L),   phi(u) = (e^u - 1 - u) / u^2

The second derivatives are `shared_kernels.rows.second_derivative` at s = a.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels import rows

from ._call import Bisect
from ._entropy import entropy, entropy_slope, exponent, largest, missing
from ._rows import collect, spread


def second(
    call: Bisect, Y: Tensor, G: Tensor, to: dict[str, Tensor | None], backend: str
) -> dict[str, Tensor]:
    """Derivatives of <v, dX> + <w, dalpha> in G, Y and alpha; v, w: what comes from above."""
    dim, dtype = call.dim, rows.wide(Y)
    v, w = to["X"], to["alpha"]
    v = torch.zeros_like(Y) if v is None else v
    v, G_, y = (t.movedim(dim, -1).to(dtype) for t in (v, G, Y))
    s = 1 - spread(call.alpha, Y.shape, dim).to(Y.device, dtype)
    d_s = None if w is None else -spread(w, Y.shape, dim).to(Y.device, dtype)
    d_G, d_Y, back_s = rows.second_derivative(v, d_s, G_, y, s)
    return {
        "d_out": d_G.movedim(-1, dim).to(G.dtype),
        "out": d_Y.movedim(-1, dim).to(Y.dtype),
        "alpha": collect(-back_s, call.alpha, dim),
    }


class FenchelYoung(torch.autograd.Function):
    """<p - y, X> + H(p) - H(y) along `dim`, from the weights p of X.

    The optimum p is stationary: the first derivatives are those at a fixed p. They are written in
    p, which has a graph of its own, so the second ones are those of the weights.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, y: Tensor, alpha: Tensor, p: Tensor, dim: int) -> Tensor:
        gap = p - y
        top = largest(X, dim)
        loss = torch.where(gap == 0, 0.0, gap * torch.where(gap == 0, 0.0, X - top))
        loss = (loss + entropy(p, alpha) - entropy(y, alpha)).sum(dim)
        return loss + (top * missing(y, dim)).squeeze(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.dim = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        X, y, alpha, p = ctx.saved_tensors
        g = g.unsqueeze(ctx.dim)
        d_X = (g * (p - y)).to(X.dtype)
        d_y = d_alpha = None
        if ctx.needs_input_grad[1]:
            a = exponent(alpha, y)
            power = torch.where(y > 0, torch.where(y > 0, y, 1.0) ** a, 0.0)
            d_y = (g * (-X - (power - 1 / (1 + a)) / -a)).to(y.dtype)
        if ctx.needs_input_grad[2]:
            d_rows = (g * (entropy_slope(p, alpha) - entropy_slope(y, alpha))).sum(
                ctx.dim, keepdim=True
            )
            d_alpha = collect(d_rows.movedim(ctx.dim, -1), alpha, ctx.dim)
        return d_X, d_y, d_alpha, None, None
