"""The dense CPU path for alpha = 1.5: whole tiles in few passes, no powers, nothing stored.

In units of scores, with c = tau / s and u = [x - c]_+, the weights are u^2 / sum(u^2). Newton's
method on the norm of u starts at the bound from group maxima and needs one or two evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

S = 0.5
# Below this |norm - 1| one more step, whose error is of second order, is exact to rounding.
_LAST_STEP = {torch.float32: 1e-3, torch.float64: 1e-7}


def solve(x: Tensor, bound: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """u^2 (R, N), its row sums (R, 1) and c (R, 1), from a lower bound of c.

    x are finite scores less the largest of their row: larger ones would leave no digits for c.
    """
    u = torch.empty_like(x)
    c, near = bound, _LAST_STEP[x.dtype]
    for _ in range(n_iter):
        torch.sub(x, c, out=u).clamp_(min=0)
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True).mul_(S)
        step = (norm.square() - norm).div_(u.sum(-1, keepdim=True).mul_(S * S))
        # A row that is near keeps its c, so that its bits do not depend on the other rows.
        is_near = (norm - 1).abs_() < near
        before, c = c, torch.where(is_near, c, c + step)
        if bool(is_near.all()):
            break
    squares = u.sub_(step).clamp_(min=0).square_()
    return squares, squares.sum(-1, keepdim=True), before + step


def backward(
    x: Tensor, theta: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g_k: Tensor, g_v: Tensor
) -> Tensor:
    """dq / scale of a tile of scores x less the largest of their row; x is overwritten.

    dk and dv are added to g_k and g_v.

    dS = u / |u| * (dP - mean): the norms go to the narrow factors of the products.
    """
    u = x.sub_(theta - 1 / S).clamp_(min=0)
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    inverse = norm.masked_fill_(norm == 0, 1.0).reciprocal_()
    total = u.sum(-1, keepdim=True)
    d_scores = torch.bmm(do, v.mT).mul_(u)
    mean = d_scores.sum(-1, keepdim=True).div_(total.masked_fill_(total == 0, 1.0))
    d_scores.addcmul_(u, mean, value=-1)
    g_v.baddbmm_(u.square_().mT, do * inverse.square())
    g_k.baddbmm_(d_scores.mT, q * inverse)
    return torch.bmm(d_scores, k).mul_(inverse)
