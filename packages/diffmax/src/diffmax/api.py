"""The public functions: formula, checks, op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks, ops
from shared_kernels.calls import replaced
from shared_kernels.rows import wide

from . import _autograd, _checks, _ops
from ._call import Bisect
from ._checks import Alpha


def diffmax_bisect(
    X: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Probability weights along `dim` with exact zeros: a softmax whose tails are cut off.

        Y_i = [1 + a (X_i - tau)]_+ ** (1/a),   a = 1 - alpha,   tau such that sum_i Y_i = 1

    alpha -> 1 is softmax, alpha -> 0 is sparsemax; the lower, the sparser. It equals entmax with
    parameter 2 - alpha. Exactly differentiable in X and alpha, twice.

    Args:
        X: scores, any shape, strides and floating dtype; computed in fp32 (fp64 for fp64). -inf
            gets weight 0; a row of only -inf gives zeros; NaN or +inf makes its own row NaN.
        alpha: in (0, 1): a number, a tensor that broadcasts against X with size 1 along `dim` (its
            gradient has its shape and dtype), or a function of no arguments that returns either.
            Tensors are checked on the CPU only, because reading a GPU's value would wait for it.
            The default is the published package's; scores of ordinary spread get no zeros from it,
            and 0.5 is the value to begin with.
        dim: the dimension that sums to 1.
        n_iter: cap on the solver's steps, at least 1. Newton needs 3 to 14, fp64 included.
        ensure_sum_one: divide by the sum at the end. Without it the sum is 1 within 1e-5 (fp32).
        dtype: what X is cast to first, as in torch.softmax; X may then have any dtype.
        backend: "auto", or "triton", "native", "torch" (also called "cpu") or "reference", which
            then runs or says why it cannot.

    Returns:
        Weights of the shape and dtype of X (or of `dtype`); fp32 under autocast, as torch.softmax
        on a GPU. They are all that is kept for the backward pass.

    Raises:
        TypeError: X or `dtype` is not floating point, or alpha is not a number, tensor or function.
        ValueError: alpha outside (0, 1) or not broadcastable, n_iter < 1, unknown backend.
        IndexError: dim out of range.
        NotImplementedError: the backend asked for cannot run here.

    Example:
        >>> diffmax_bisect(torch.tensor([2.0, 1.0, -1.0]), alpha=0.5)
        tensor([0.8307, 0.1693, 0.0000])

    Source: Tsallis, J. Stat. Phys. 52 (1988), the q-exponential with q = alpha; Peters, Niculae,
    Martins, ACL 2019, for the equivalent entmax.
    """
    X = _checks.cast(X, dtype)
    # `check` makes a tensor of any alpha
    call = Bisect(X, alpha, dim, n_iter, ensure_sum_one).check()  # type: ignore[arg-type]
    if X.dim() == 0:
        call = replaced(call, X=X.unsqueeze(0), dim=0)
    Y: Tensor = _ops.bisect(call, backend)
    return Y[0] if X.dim() == 0 else Y


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend would run the ops of a call of any function or module here, and why.

    Example:
        >>> print(explain(diffmax_bisect, torch.randn(3, 5), 0.5))  # doctest: +ELLIPSIS
        diffmax::bisect:
          native: ...
          reference: can run
          triton: cannot run: ...
    """
    return ops.explain_call("diffmax", function, *args, **kwargs)


def diffmax_loss(
    X: Tensor,
    target: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The Fenchel-Young loss of `diffmax_bisect`, as cross entropy is that of softmax.

        L = <p - y, X> + H(p) - H(y),   p = diffmax_bisect(X),   H(p) = (1 - sum p^e) / (e (e - 1))

    with e = 2 - alpha. L >= 0, and L = 0 exactly when p = y, which scores with a finite margin
    reach; dL/dX = p - y. Exactly differentiable in X, alpha and y, twice.

    Args:
        X: scores (..., C, ...), classes along `dim`.
        target: class indices (X's shape without `dim`), or weights of the shape of X.
        alpha, dim: as in `diffmax_bisect`.
        ignore_index: rows with this class index count as zero and not in the mean.
        reduction: "mean" over the rows, "sum", or "none" (one loss per row).

    Returns:
        A scalar, or the shape of X without `dim`. A row of only -inf counts as 0 and has no
        gradient; a target whose score is -inf costs +inf; NaN makes its own row NaN.

    Example:
        >>> diffmax_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), alpha=0.5)
        tensor(0.)

    Source: Blondel, Martins, Niculae, JMLR 21 (2020).
    """
    checks.in_set("reduction", reduction, ("mean", "sum", "none"))
    dim = _checks.scores(X, dim)
    alpha = _checks.alpha_tensor(alpha, X, dim)
    _checks.target(target, X, dim, ignore_index)
    return fenchel_young(
        X, target, alpha, diffmax_bisect(X, alpha, dim), dim, ignore_index, reduction
    )


def fenchel_young(
    X: Tensor,
    target: Tensor,
    alpha: Tensor,
    p: Tensor,
    dim: int,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss of scores X with the weights p: class indices or weights, rows that count, mean."""
    y, counts = one_hot(target, X, dim, ignore_index)
    is_dead = (X == -torch.inf).all(dim, keepdim=True)
    loss = _autograd.FenchelYoung.apply(torch.where(is_dead, 0.0, X), y, alpha, p, dim)
    return reduced(loss, ~is_dead.squeeze(dim), counts, reduction)


def one_hot(target: Tensor, X: Tensor, dim: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Target weights of the shape of X and, where the target was indices, which rows count."""
    if target.is_floating_point():
        return target, None
    counts = target != ignore_index
    classes = torch.where(counts, target, 0).long().unsqueeze(dim)
    return torch.zeros_like(X).scatter_(dim, classes, 1.0), counts


def reduced(loss: Tensor, is_live: Tensor, counts: Tensor | None, reduction: str) -> Tensor:
    """Losses of rows as one number: dead and ignored rows are 0, the mean is over those counted."""
    loss = torch.where(is_live if counts is None else is_live & counts, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / counts.sum() if counts is not None else loss.mean()


def sparsity_stats(Y: Tensor, dim: int = -1) -> dict[str, float]:
    """How sparse some weights are, as plain numbers. Rows of zeros or with NaN are left out.

    Args:
        Y: weights, any shape.
        dim: the dimension that sums to 1.

    Returns:
        sparsity (share of exact zeros), support_mean and support_min (nonzero entries per row),
        entropy (nats, mean), max_prob (mean of the largest weight), sum_error (largest |sum - 1|).

    Example:
        >>> sparsity_stats(torch.tensor([[0.75, 0.25, 0.0, 0.0]]))["sparsity"]
        0.5
    """
    dim = _checks.scores(Y, dim, "Y")
    rows = Y.detach().reshape(1) if Y.dim() == 0 else Y.detach().movedim(dim, -1)
    names = ("sparsity", "support_mean", "support_min", "entropy", "max_prob", "sum_error")
    if rows.numel() == 0:
        return dict.fromkeys(names, 0.0)
    return dict(zip(names, _row_stats(rows).tolist(), strict=True))


def _row_stats(rows: Tensor) -> Tensor:
    """The numbers of `sparsity_stats` in one tensor, so that they cost one wait for the device."""
    rows = rows.reshape(-1, rows.shape[-1])
    rows = rows.to(wide(rows))
    total = rows.sum(-1)
    live = total.isfinite() & (rows != 0).any(-1)
    rows = torch.where(live.unsqueeze(-1), rows, 0.0)
    size = (rows != 0).sum(-1).to(rows.dtype)
    n_live = live.sum().clamp(min=1)
    support = size.sum() / n_live
    stats = [
        1 - support / rows.shape[-1],
        support,
        torch.where(live, size, math.inf).amin(),
        -torch.special.xlogy(rows, rows).sum() / n_live,
        rows.amax(-1).sum() / n_live,
        torch.where(live, (total - 1).abs(), 0.0).amax(),
    ]
    return torch.where(live.any(), torch.stack(stats), 0.0)
