"""Losses whose gradient is as sparse as the weights: formula, checks, op."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from shared_kernels import checks, ops, qexp
from shared_kernels.calls import replaced
from shared_kernels.ops import autocast_on
from shared_kernels.rows import wide

from . import _checks, _ops, _sharded, _torch_linear
from ._call import LinearLoss
from ._checks import Alpha
from ._entropy import largest, missing
from .api import fenchel_young, one_hot, reduced
from .normalizers import budget_sparsemax, normmax

# Whether many rows have a long support is judged by this many of them.
_SAMPLED_ROWS = 64


def diffmax_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: Alpha = 0.5,
    bias: Tensor | None = None,
    *,
    target_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """`diffmax_loss` of the logits of a linear layer, which are never stored.

        L = <p - y, X> + H(p) - H(y),   X = hidden weight^T + bias,   p = diffmax_bisect(X, alpha)

    with H(p) = sum p (1 - p^a) / (a (1 + a)) and a = 1 - alpha. Its gradient p - y has as many
    entries as the support of p: backward is two sparse products. Memory beyond the gradients is a
    tile of logits and, per row, at most vocabulary / 80 columns and weights. Exactly
    differentiable, once, in hidden, weight, bias and alpha; a second derivative is refused.

    Args:
        hidden: (..., d), floating. fp16 and bf16 are multiplied in their dtype, summed in fp32.
        weight: (V, d), the dtype of hidden.
        target: class indices (...), or, with `target_weights`, (..., K) of them.
        alpha: one number in (0, 1): as a number, tensor, parameter, or a function that returns it.
        bias: (V,), or None. -inf forbids a class.
        target_weights: (..., K) weights of the classes in `target`, e.g. a teacher's; a class that
            stands twice has the sum of its weights. Their gradient is refused.
        ignore_index: rows whose classes are all this one are left out, and out of the mean.
        label_smoothing: in [0, 1): y becomes (1 - e) y + e / V, which makes the gradient dense; it
            costs little, as its dense part has rank one (with `softcap` it has not: logits are then
            made twice).
        softcap: X becomes softcap tanh(X / softcap); positive, or None.
        reduction: "mean" over the rows that count, "sum", or "none" (one loss per row).
        group: a process group over whose ranks `weight` and `bias` are sharded by rows, in the
            order of the ranks; `target` counts through all shards. Every rank passes the same
            hidden and gets the same loss and the whole gradient of hidden, and that of its shard.
            DTensors say so by themselves: `weight` and `bias` with Shard(0) and `hidden` with
            Replicate() on a mesh of one dimension give a replicated loss; no other placement.
        backend: "auto", "triton", "native", "torch" (also called "cpu") or "reference". The first
            three differ in who solves the rows; the products are PyTorch's in all.

    Returns:
        A scalar, or (...), in the dtype of hidden (fp32 under autocast). A row of logits of only
        -inf counts as 0 and has no gradient; a target whose logit is -inf costs +inf; NaN logits
        make their own row NaN. An empty batch gives 0 as "sum" and NaN as "mean", as
        `F.cross_entropy` does.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes that do not fit, a target outside the vocabulary, an option out of range.
        NotImplementedError: the backend asked for cannot run here.

    Example:
        >>> hidden, weight = torch.eye(3) * 2, torch.eye(3)
        >>> diffmax_linear_loss(hidden, weight, torch.tensor([0, 1, 0]), alpha=0.5)
        tensor(0.6667)

    Source: Blondel, Martins, Niculae, JMLR 21 (2020), for the loss.
    """
    checks.in_set("reduction", reduction, ("mean", "sum", "none"))
    if _sharded.is_distributed(hidden, weight, bias, target):
        local = _sharded.local(hidden, weight, bias, target, group)
        whole = diffmax_linear_loss(
            local.hidden,
            local.weight,
            local.target,
            alpha,
            local.bias,
            target_weights=target_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            reduction=reduction,
            group=local.mesh.get_group(),
            backend=backend,
        )
        return _sharded.replicated(whole, local.mesh)
    call = _call(hidden, weight, target, alpha, bias, target_weights, ignore_index)
    call = replaced(
        call,
        label_smoothing=_number("label_smoothing", label_smoothing, 0.0, 1.0),
        softcap=None if softcap is None else _positive("softcap", softcap),
        reduction=reduction,
        group="" if group is None else group.group_name,
    )
    if group is None:
        _checks.classes(target, ignore_index, weight.shape[0])
    call = replaced(call, at_once=_many_rows_are_long(call, backend))
    loss: Tensor = _ops.linear_loss(call, backend)
    loss = loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss
    return loss if autocast_on(hidden.device.type) else loss.to(hidden.dtype)


def entmax_loss(
    X: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`diffmax_loss` by the parameter of entmax, up to sparsemax: diffmax_loss(X, y, 2 - alpha).

        L = <p - y, X> + H(p) - H(y),   p = entmax_alpha(X),   H(p) = (1 - sum p^e) / (e (e - 1))

    with e = alpha. Differentiable in X and soft targets, twice.

    Args:
        X: scores (..., C, ...), classes along `dim`.
        target: class indices (X's shape without `dim`), or weights of the shape of X.
        alpha: in (1, 2], 2 being sparsemax: a number, or a tensor that broadcasts against X with
            size 1 along `dim`, which then has its gradient.
        dim, ignore_index, reduction: as in `diffmax_loss`.

    Returns:
        A scalar, or the shape of X without `dim`.

    Raises:
        TypeError, ValueError: as `diffmax_loss`; alpha outside (1, 2].

    Example:
        >>> entmax_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]), alpha=2.0)
        tensor(0.0625)

    Source: Blondel, Martins, Niculae, JMLR 21 (2020).
    """
    checks.in_set("reduction", reduction, ("mean", "sum", "none"))
    dim = _checks.scores(X, dim)
    if not isinstance(alpha, Tensor):
        number = _number("alpha", alpha, 0.0, float("inf"))
        alpha = torch.full((), number, dtype=torch.float64, device="cpu")
    if checks.reads_values(alpha) and not bool(((alpha > 1) & (alpha <= 2)).all()):
        wrong = alpha.detach()[~((alpha > 1) & (alpha <= 2))][0].item()
        checks.fail("alpha", "be in (1, 2]", wrong, hint="alpha=1 is F.cross_entropy")
    _checks.target(target, X, dim, ignore_index)
    p = qexp.entmax(X, alpha, dim)
    return fenchel_young(X, target, 2 - alpha, p, dim, ignore_index, reduction)


def normmax_loss(
    X: Tensor,
    target: Tensor,
    alpha: float | Tensor = 2.0,
    dim: int = -1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The Fenchel-Young loss of `normmax`.

        L = <p - y, X> - ||p||_alpha + ||y||_alpha,   p = normmax(X, alpha)

    L >= 0, dL/dX = p - y. Differentiable in X and alpha.

    Args:
        X: scores (..., C, ...), classes along `dim`.
        target: class indices (X's shape without `dim`), or weights of the shape of X.
        alpha: above 1, as in `normmax`.
        dim, ignore_index, reduction: as in `diffmax_loss`.

    Returns:
        A scalar, or the shape of X without `dim`.

    Raises:
        TypeError, ValueError: as `diffmax_loss` and `normmax`.

    Example:
        >>> normmax_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.)

    Source: Blondel, Martins, Niculae, JMLR 21 (2020).
    """
    checks.in_set("reduction", reduction, ("mean", "sum", "none"))
    dim = _checks.scores(X, dim)
    _checks.target(target, X, dim, ignore_index)
    y, counts = one_hot(target, X, dim, ignore_index)
    p = normmax(X, alpha, dim)

    def norm(p: Tensor) -> Tensor:
        inside = p > 0
        mass = torch.where(inside, torch.where(inside, p, 1.0) ** alpha, 0.0).sum(dim, keepdim=True)
        return (torch.where(mass > 0, mass, 1.0) ** (1 / alpha)).squeeze(dim)

    top = largest(X, dim)
    loss = _inner(p - y, X - top, dim) + (top * missing(y, dim)).squeeze(dim)
    return reduced(loss - norm(p) + norm(y), _live(X, dim), counts, reduction)


def budget_loss(X: Tensor, target: Tensor, dim: int = -1, *, reduction: str = "mean") -> Tensor:
    """The Fenchel-Young loss of `budget_sparsemax`, for several labels at once.

        L = <p - y, X> - |p|^2 / 2 + |y|^2 / 2,   p = budget_sparsemax(X, sum y)

    L >= 0, and L = 0 once every label of y leads the others by 1; dL/dX = p - y.

    Args:
        X: scores (..., C, ...), classes along `dim`.
        target: the shape of X, floating or bool, in [0, 1]: 1 for each label of the row. Its sum
            is the row's budget; a row without any label counts as 0. It has no gradient.
        dim: the dimension of the classes.
        reduction: "mean" over the rows, "sum", or "none".

    Returns:
        A scalar, or the shape of X without `dim`.

    Raises:
        TypeError: X is not floating point, target not a tensor.
        ValueError: shapes that differ, target outside [0, 1], unknown reduction.

    Example:
        >>> X, y = torch.tensor([[3.0, 2.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> budget_loss(X, y)
        tensor(0.)

    Source: Blondel, Martins, Niculae, JMLR 21 (2020), for the polytope of subsets.
    """
    checks.in_set("reduction", reduction, ("mean", "sum", "none"))
    dim = _checks.scores(X, dim)
    checks.tensor("target", target)
    if target.shape != X.shape:
        checks.fail("target", f"have the shape of `X`, {tuple(X.shape)}", tuple(target.shape))
    y = target.detach().to(X.dtype)
    if checks.reads_values(y) and not bool(((y >= 0) & (y <= 1)).all()):
        outside = y[~((y >= 0) & (y <= 1))]
        checks.fail("target", "be in [0, 1]", outside[0].item())
    k = y.sum(dim, keepdim=True)
    has_label = k > 0
    p = budget_sparsemax(X, torch.where(has_label, k, 1.0), dim)
    loss = _inner(p - y, X - largest(X, dim), dim) + (y.square() - p.square()).sum(dim) / 2
    return reduced(loss, _live(X, dim) & has_label.squeeze(dim), None, reduction)


def _inner(gap: Tensor, X: Tensor, dim: int) -> Tensor:
    """<gap, X>, where a gap of 0 makes 0 of an infinite score."""
    is_dead = ~_live(X, dim).unsqueeze(dim)
    nothing = (gap == 0) | is_dead
    gap = torch.where(X == -torch.inf, gap.detach(), gap)  # no weight there, and no gradient of it
    return torch.where(nothing, 0.0, gap * torch.where(nothing, 0.0, X)).sum(dim)


def _live(X: Tensor, dim: int) -> Tensor:
    return ~(X == -torch.inf).all(dim)


def _call(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: Alpha,
    bias: Tensor | None,
    target_weights: Tensor | None,
    ignore_index: int,
) -> LinearLoss:
    """The call of tensors that fit, with rows in one dimension and classes that differ."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        checks.floating(name, x)
    checks.integer("target", target)
    if hidden.dim() < 1:
        checks.fail("hidden", "have shape (..., d)", tuple(hidden.shape))
    d = hidden.shape[-1]
    checks.shape("weight", weight, (None, d), lambda: f"(V, d={d}) with the d of hidden")
    V = weight.shape[0]
    if V == 0:
        checks.fail("weight", "have at least one class (V, d)", tuple(weight.shape))
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, (V,), lambda: f"(V={V},)")
    checks.same_device(hidden=hidden, weight=weight, bias=bias, target=target)
    tensors = ops.autocast_lower(hidden, weight, bias)
    hidden, weight, bias = cast("tuple[Tensor, Tensor, Tensor | None]", tensors)
    checks.same_dtype(hidden=hidden, weight=weight)
    if bias is not None:
        checks.same_dtype(weight=weight, bias=bias)
    rows = hidden.shape[:-1]
    dtype = wide(hidden)
    flat = hidden.reshape(-1, d)
    if target_weights is None:
        checks.shape("target", target, tuple(rows), lambda: f"{tuple(rows)}, one class a row")
        kept = target.reshape(-1, 1) != ignore_index
        columns = torch.where(kept, target.reshape(-1, 1), -1).long()
        y = kept.to(dtype)
    else:
        columns, y = _soft(target, target_weights, rows, ignore_index, dtype)
    alpha_ = _checks.alpha_tensor(alpha, hidden.new_empty(1), -1)  # one number
    with_alpha = ops.wants_gradient(alpha_)
    save = ops.wants_gradient(hidden, weight, bias, alpha_)
    return LinearLoss(
        flat, weight, bias, columns, y, alpha_, 0.0, None, "mean", "", with_alpha, False, save
    )


def _soft(
    target: Tensor, weights: Tensor, rows: torch.Size, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Classes (N, K) that differ within a row, -1 where there is none, and their weights."""
    checks.floating("target_weights", weights)
    if weights.requires_grad and torch.is_grad_enabled():
        hint = "detach it; `diffmax_loss` has the gradient of dense target weights"
        checks.fail("target_weights", "not require a gradient", "one that does", hint=hint)
    for name, x in (("target", target), ("target_weights", weights)):
        if x.dim() != len(rows) + 1 or x.shape[:-1] != rows:
            checks.fail(name, f"have shape {(*rows, 'K')} with target_weights", tuple(x.shape))
    if target.shape != weights.shape:
        checks.fail(
            "target_weights", f"have the shape of `target`, {tuple(target.shape)}", weights.shape
        )
    K = target.shape[-1]
    target, order = target.reshape(-1, K).long().sort(-1)
    y = weights.reshape(-1, K).to(dtype).gather(1, order)
    # classes that are equal stand side by side now: the first one takes the sum of their weights
    is_first = torch.ones_like(target, dtype=torch.bool)
    is_first[:, 1:] = target[:, 1:] != target[:, :-1]
    place = is_first.cumsum(-1) - 1
    y = torch.zeros_like(y).scatter_add_(1, place, y)
    merged = torch.full_like(target, ignore_index).scatter_(1, place, target)
    kept = merged != ignore_index
    return torch.where(kept, merged, -1), torch.where(kept, y, 0.0)


def _number(name: str, value: Any, least: float, below: float) -> float:
    number = _checks.number(name, value)
    if not least <= number < below:
        checks.fail(name, f"be in [{least:g}, {below:g})", value)
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value, 0.0, float("inf"))
    if number == 0.0:
        checks.fail(name, "be above 0", value, hint="None is no cap")
    return number


def _many_rows_are_long(call: LinearLoss, backend: str) -> bool:
    """Whether more than one row in ten has a longer support than lists keep, by a sample of them.

    The logits of such a row are made twice, which costs more than its gradient made with the loss.
    """
    x = call.hidden
    if not call.save or call.reduction == "none" or call.group or backend == "reference":
        return False
    if not checks.reads_values(x, call.weight, call.alpha) or len(x) == 0:
        return False
    some = slice(None, None, -(-len(x) // _SAMPLED_ROWS))
    with torch.no_grad():
        is_long = _torch_linear.looks_long(call, x[some], call.target[some])
    return bool(is_long.double().mean() > 0.1)
