"""Two more sparse normalisers: of a norm, and of subsets of a given size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.rows import wide

from . import _checks
from ._rows import row_shape
from .api import diffmax_bisect


def normmax(X: Tensor, alpha: float | Tensor = 2.0, dim: int = -1) -> Tensor:
    """Weights with exact zeros whose alpha-norm is what is paid for.

        argmax_p <p, X> - ||p||_alpha,   p >= 0, sum p = 1

    It is one diffmax and a power: with w = diffmax_bisect(X alpha / (alpha - 1), 1 / alpha),
    p = w^(1 / alpha) / sum w^(1 / alpha). Differentiable in X and alpha, twice.

    Args:
        X: scores, any shape and floating dtype; -inf, NaN and rows of only -inf as in
            `diffmax_bisect`.
        alpha: above 1: a number, or a tensor that broadcasts against X with size 1 along `dim`.
            The larger, the more alike are the weights above zero.
        dim: the dimension that sums to 1.

    Returns:
        Weights of the shape and dtype of X.

    Raises:
        TypeError: X is not floating point, or alpha not a number or tensor.
        ValueError: alpha is not above 1, or does not broadcast.

    Example:
        >>> normmax(torch.tensor([2.0, 1.5, -1.0]), alpha=2.0)
        tensor([0.7743, 0.2257, 0.0000])

    Source: Blondel, Martins, Niculae, JMLR 21 (2020), for losses of norms.
    """
    dim = _checks.scores(X, dim)
    if not isinstance(alpha, Tensor):
        if not 1.0 < _checks.number("alpha", alpha) < float("inf"):
            checks.fail("alpha", "be above 1", alpha)
        power: float | Tensor = 1 / float(alpha)
    else:
        checks.floating("alpha", alpha)
        if checks.reads_values(alpha) and not bool((alpha > 1).all()):
            checks.fail("alpha", "be above 1", alpha.detach().min().item())
        power = 1 / alpha
    x = X.to(wide(X))
    if X.numel() and X.dim():  # a common shift changes nothing, and keeps what follows finite
        top = x.detach().amax(dim, keepdim=True)
        x = x - torch.where(top.isfinite(), top, 0.0)
    w = diffmax_bisect(x / (1 - power), power, dim)
    inside = w > 0
    p = torch.where(inside, torch.where(inside, w, 1.0) ** power, w)
    mass = p.sum(dim, keepdim=True)
    return (p / torch.where(mass == 0, 1.0, mass)).to(X.dtype)


def budget_sparsemax(X: Tensor, budget: float | Tensor = 2.0, dim: int = -1) -> Tensor:
    """Weights in [0, 1] with a given sum: which few of many, with exact zeros and ones.

        argmax_p <p, X> - |p|^2 / 2,   0 <= p <= 1, sum p = budget

    Its solution is p = clip(X - tau, 0, 1). Differentiable in X and in the budget; second
    derivatives are zero where they exist.

    Args:
        X: scores, any shape and floating dtype. -inf gets weight 0; a row with fewer finite
            scores than the budget gives each of them 1; NaN makes its own row NaN.
        budget: in (0, size of `dim`]: a number, or a tensor that broadcasts against X with size 1
            along `dim`.
        dim: the dimension that sums to the budget.

    Returns:
        Weights of the shape and dtype of X.

    Raises:
        TypeError: X is not floating point, or the budget not a number or tensor.
        ValueError: the budget is outside (0, size of `dim`], or does not broadcast.

    Example:
        >>> budget_sparsemax(torch.tensor([2.0, 0.4, 0.0, -1.0]), budget=2.0)
        tensor([1.0000, 0.7000, 0.3000, 0.0000])

    Source: Blondel, Martins, Niculae, JMLR 21 (2020), for the polytope of subsets.
    """
    dim = _checks.scores(X, dim)
    if X.dim() == 0:
        return budget_sparsemax(X.unsqueeze(0), budget, 0)[0]
    x = X.to(wide(X)).movedim(dim, -1)
    k = _budget(budget, X, dim).to(x)
    if X.shape[dim] == 0:
        return X * 1.0
    live = (x > -torch.inf) & (x < torch.inf)
    is_wrong = (x.isnan() | (x == torch.inf)).any(-1, keepdim=True)
    # As many entries as the budget says are above tau, and the last of them by 1 at most: beside it
    # tau keeps its digits, and what is further away than that has the weight 0 or 1.
    last = (k.ceil().long() - 1).expand(x[..., :1].shape)
    beside = x.detach().sort(-1, descending=True).values.gather(-1, last)
    x = (x - torch.where(beside.isfinite(), beside, 0.0)).clamp(-2, 2)
    with torch.no_grad():
        low, high = _segment(x, k)
    # between two neighbours of x and x - 1 the sum is linear in tau
    is_one = x - 1 >= high
    inside = (x >= high) & ~is_one
    size = inside.sum(-1, keepdim=True)
    total = torch.where(inside, x, 0.0).sum(-1, keepdim=True) + is_one.sum(-1, keepdim=True)
    tau = (total - k) / size.clamp(min=1)
    p = x - tau
    p = p + (p.clamp(0, 1) - p).detach()  # rounding is no reason for a gradient to end
    p = torch.where(inside, p, is_one.to(x.dtype))
    # where no more finite scores are there than the budget, each of them has the weight 1
    is_short = live.sum(-1, keepdim=True) <= k
    p = torch.where(is_short, live.to(p.dtype), p)
    return torch.where(is_wrong, torch.nan, p).movedim(-1, dim).to(X.dtype)


def _budget(budget: Any, X: Tensor, dim: int) -> Tensor:
    """The budget as a tensor () or, with `dim` at the end, (..., 1)."""
    if not isinstance(budget, Tensor):
        number = _checks.number("budget", budget)
        budget = torch.full((), number, dtype=torch.float64, device=X.device)
    shape = row_shape(tuple(X.shape), dim)
    try:
        fits = torch.broadcast_shapes(budget.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        must = f"broadcast to {shape}, size 1 along dim={dim}"
        checks.fail("budget", must, f"shape {tuple(budget.shape)}")
    N = X.shape[dim]
    if N and checks.reads_values(budget):
        outside = ~((budget > 0) & (budget <= N))
        if bool(outside.any()):
            checks.fail("budget", f"be in (0, {N}]", budget.detach()[outside][0].item())
    each: Tensor = budget if budget.dim() == 0 else budget.expand(shape).movedim(dim, -1)
    return each


def _segment(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours (..., 1) among all x and x - 1 between which tau lies.

    The sum of clip(x - tau, 0, 1) falls as tau rises: a search by halves over the sorted values.
    """
    x = torch.where(x.isfinite(), x, torch.finfo(x.dtype).min / 4)
    places = torch.cat((x, x - 1), -1).sort(-1).values
    first = torch.zeros_like(places[..., :1], dtype=torch.int64)
    last = torch.full_like(first, places.shape[-1] - 1)
    for _ in range(places.shape[-1].bit_length()):
        middle = (first + last) // 2
        at = places.gather(-1, middle)
        is_below = (x - at).clamp_(0, 1).sum(-1, keepdim=True) >= k
        first = torch.where(is_below, middle, first)
        last = torch.where(is_below, last, middle)
        last = torch.maximum(last, first + 1).clamp(max=places.shape[-1] - 1)
    return places.gather(-1, first), places.gather(-1, last)
