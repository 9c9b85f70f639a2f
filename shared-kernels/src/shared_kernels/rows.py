"""alpha-entmax along rows as an op: one definition for everybody who has an implementation of it.

With s = alpha - 1, p the weights, L = log p, g = p^(1-s) on the support, and an overlined value the
mean under g of its row, the derivatives are

    dx = g (dp - mean(dp)),    ds = -sum h (dp - mean(dp)),    h = p L^2 phi(-s L)

with phi(u) = (e^u - 1 - u) / u^2. `second_derivative` is theirs, from dg/dp = (1-s) g / p,
dg/ds = -g L, dh/dp = (1-s) L^2 phi + L and dh/ds = -p L^3 phi'(-s L). It is made of plain operators
and keeps its graph: derivatives of any order follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .ops import register_op
from .qpower import least

__all__ = ["define_entmax", "entmax", "in_operators", "second_derivative"]

# Newton's steps of a program that cannot ask whether it has converged; long flat rows take 14.
_STEPS = 24


def second_derivative(
    v: Tensor, w: Tensor | None, dp: Tensor, p: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <v, dx> + <w, ds> in dp, p and s; rows along the last dimension.

    Args:
        v, dp, p: (..., N), fp32 or fp64. Rows of zeros give zeros.
        w: (..., 1), or None where ds was not asked for.
        s: () or (..., 1).

    Returns:
        (..., N), (..., N) and, one number per row, (..., 1).
    """
    support = p != 0
    y = torch.where(support, p, 1.0).clamp(min=least(p.dtype))
    L = y.log()
    ratio = (s * -L).exp()  # g / p
    g = torch.where(support, ratio * y, 0.0)
    mass = g.sum(-1, keepdim=True)
    mass = torch.where(mass == 0, 1.0, mass)
    dp = dp - (g * dp).sum(-1, keepdim=True) / mass
    v = v - (g * v).sum(-1, keepdim=True) / mass
    d_g, d_dp = dp * v, g * v
    d_p = d_s = torch.zeros((), dtype=p.dtype, device=p.device)
    if w is not None:
        value, slope = phi(-s * L)
        h = torch.where(support, y * L * L * value, 0.0)
        w_mean = w * h.sum(-1, keepdim=True) / mass
        d_g, d_dp = d_g + dp * w_mean, d_dp + g * w_mean - w * h
        d_p = w * dp * ((1 - s) * L * L * value + L)
        d_s = torch.where(support, w * dp * y * L**3 * slope, 0.0)
    d_p = torch.where(support, d_g * (1 - s) * ratio - d_p, 0.0)
    return d_dp, d_p, (d_s - d_g * g * L).sum(-1, keepdim=True)


def phi(u: Tensor) -> tuple[Tensor, Tensor]:
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


def in_operators(x: Tensor, s: Tensor, divide: bool = True) -> Tensor:
    """Weights of rows (..., N) as one fixed list of PyTorch's operators: for exported programs.

        w = [1 + s (x - max x - t)]_+ ** (1/s),   t <- t + (F - F^(1-s)) / (s G),   t = 0 at first,

    F the sum of w and G that of w^(1-s): Newton's method of `qexp`, from its safest start.

    Args:
        s: () or (..., 1), in [0, 1].
        divide: whether the weights are divided by their sum at the end.

    Returns:
        (..., N), contiguous, in the dtype of x.
    """
    if isinstance(x.shape[-1], int) and x.shape[-1] == 0:
        return x.contiguous()
    z = x.to(wide(x))
    top = z.amax(-1, keepdim=True)
    z = z - torch.where(top == -torch.inf, 0.0, top)
    # at s = 0 the power is an exponential, and so it is to rounding this near to 0
    s = s.to(x.device, z.dtype).clamp(min=0.5 * torch.finfo(z.dtype).eps)

    def powers(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = s * (z - t)
        inside = u > -1
        L = torch.log1p(torch.where(inside, u, 0.0)) / s
        w = torch.where(inside, L.exp(), 0.0)
        return inside, L, w

    t = torch.zeros_like(top)
    for _ in range(_STEPS):
        inside, L, w = powers(t)
        # G >= F >= 1, but for rounding and rows of -inf, which make no step
        F = w.sum(-1, keepdim=True).clamp(min=1.0)
        G = torch.where(inside, ((1 - s) * L).exp(), 0.0).sum(-1, keepdim=True).clamp(min=1.0)
        t = t - F * torch.expm1(-s * F.log()) / (s * G)
    w = powers(t)[2]
    if divide:
        F = w.sum(-1, keepdim=True)
        w = w / torch.where(F == 0, 1.0, F)
    return torch.where(top < torch.inf, w, torch.nan).to(x.dtype).contiguous()


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, alpha, _, ctx.fast_math, ctx.backend = inputs
    ctx.save_for_backward(output, alpha)


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, y, alpha, ctx.need_alpha, _, _ = inputs
    ctx.save_for_backward(dy, y, alpha)


def _backward_grad(ctx: Any, v: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
    dy, y, alpha = ctx.saved_tensors
    dtype = wide(y)
    found = second_derivative(
        v.to(dtype),
        w if ctx.need_alpha else None,
        dy.to(dtype),
        y.to(dtype),
        (alpha - 1).to(y.device, dtype),
    )
    d_alpha = found[2].sum_to_size(alpha.shape).to(alpha.device, alpha.dtype)
    return found[0].to(dy.dtype), found[1].to(y.dtype), d_alpha, None, None, None


def _front(x: Tensor, at: int | None, rank: int) -> Tensor:
    """A vmap's batch in front of `rank` dimensions; without one, broadcasting does the rest."""
    if at is None:
        return x
    x = x.movedim(at, 0)
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])


def define_entmax(
    namespace: str, forward: Mapping[str, str], backward: Mapping[str, str]
) -> tuple[Any, Any]:
    """Register ``namespace::entmax`` and ``namespace::entmax_backward``, twice differentiable.

    The ops take x (..., N), and alpha as a tensor: () or one value per row, (..., 1). A number is a
    0-d tensor on the CPU, so that a number that changes is no reason to compile again.

    Args:
        forward: backend -> "module:function" of (x, alpha, n_iter, fast_math), which gives y.
        backward: backend -> "module:function" of (dy, y, alpha, need_alpha, fast_math), which gives
            dx, and ds per row (..., 1) in fp32 (fp64 for fp64), or (0,) where it is not needed.
    """

    def fake(x, alpha, n_iter, fast_math, backend="auto"):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def fake_backward(dy, y, alpha, need_alpha, fast_math, backend="auto"):
        rows = (*y.shape[:-1], 1) if need_alpha else (0,)
        dx = torch.empty_like(y, memory_format=torch.contiguous_format)
        return dx, y.new_empty(rows, dtype=wide(y))

    def vmap(info, dims, x, alpha, *rest):
        rank = x.dim() - (dims[0] is not None)
        x = _front(x, dims[0], rank)
        x = x if dims[0] is not None else x.expand(info.batch_size, *x.shape)
        return op(x, _front(alpha, dims[1], rank), *rest), 0

    def backward_vmap(info, dims, dy, y, alpha, need_alpha, *rest):
        rank = y.dim() - (dims[1] is not None)
        dy, y = (
            _front(x, at, rank).expand(info.batch_size, *(-1,) * rank)
            for x, at in ((dy, dims[0]), (y, dims[1]))
        )
        found = op_backward(dy, y, _front(alpha, dims[2], rank), need_alpha, *rest)
        return found, (0, 0 if need_alpha else None)

    def gradient(ctx, dy):
        y, alpha = ctx.saved_tensors
        need_alpha = ctx.needs_input_grad[1]
        dx, rows = op_backward(dy, y, alpha, need_alpha, ctx.fast_math, ctx.backend)
        d_alpha = None
        if need_alpha:
            d_alpha = rows.sum_to_size(alpha.shape).to(alpha.device, alpha.dtype)
        return dx, d_alpha, None, None, None

    op_backward = register_op(
        f"{namespace}::entmax_backward",
        "(Tensor dy, Tensor y, Tensor alpha, bool need_alpha, bool fast_math, "
        "str backend='auto') -> (Tensor, Tensor)",
        implementations=backward,
        fake=fake_backward,
        setup_context=_backward_context,
        backward=_backward_grad,
        vmap=backward_vmap,
    )

    def decomposition(x, alpha, n_iter, fast_math, backend="auto"):
        return in_operators(x, alpha - 1)

    op = register_op(
        f"{namespace}::entmax",
        "(Tensor x, Tensor alpha, int n_iter, bool fast_math, str backend='auto') -> Tensor",
        implementations=forward,
        fake=fake,
        setup_context=_context,
        backward=gradient,
        autocast=torch.float32,
        vmap=vmap,
        decomposition=decomposition,
    )
    return op, op_backward


entmax, _ = define_entmax(
    "shared_kernels",
    {"cpu": "shared_kernels.qexp:entmax_forward"},
    {"cpu": "shared_kernels.qexp:entmax_backward"},
)
