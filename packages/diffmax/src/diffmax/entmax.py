"""The public names of the package entmax 1.3, with its signatures: a change of one import.

    from diffmax.entmax import entmax15, EntmaxBisectLoss     # was: from entmax import ...

Whatever is computed is that of `diffmax`: rows of only -inf give zeros, losses have `ignore_index`
as they say, soft targets and second derivatives. `k` and `n_iter` are taken and change nothing:
the solvers here are exact and need neither. `reduction` is "mean", also called "elementwise_mean".
alpha of entmax is in (1, 2]; larger ones are refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shared_kernels import checks, qexp

from . import losses, normalizers

__all__ = [
    "BudgetBisect",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxBisect",
    "EntmaxBisectLoss",
    "NormmaxBisect",
    "NormmaxBisectLoss",
    "Sparsemax",
    "SparsemaxBisect",
    "SparsemaxBisectLoss",
    "SparsemaxLoss",
    "budget_bisect",
    "entmax15",
    "entmax15_loss",
    "entmax_bisect",
    "entmax_bisect_loss",
    "normmax_bisect",
    "normmax_bisect_loss",
    "sparsemax",
    "sparsemax_bisect",
    "sparsemax_bisect_loss",
    "sparsemax_loss",
]


def sparsemax(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """The Euclidean projection on the simplex: [X - tau]_+."""
    return qexp.entmax(X, 2.0, dim)


def entmax15(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """[X / 2 - tau]_+ ** 2."""
    return qexp.entmax(X, 1.5, dim)


def entmax_bisect(
    X: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
) -> Tensor:
    """[(alpha - 1) X - tau]_+ ** (1 / (alpha - 1)), alpha in [1, 2], 1 being softmax."""
    return qexp.entmax(X, alpha, dim)


def sparsemax_bisect(
    X: Tensor, dim: int = -1, n_iter: int | None = 50, ensure_sum_one: bool = True
) -> Tensor:
    """`sparsemax`."""
    return qexp.entmax(X, 2.0, dim)


def normmax_bisect(
    X: Tensor, alpha: float | Tensor = 2.0, dim: int = -1, n_iter: int = 50
) -> Tensor:
    """`diffmax.normmax`."""
    return normalizers.normmax(X, alpha, dim)


def budget_bisect(
    X: Tensor, budget: float | Tensor = 2.0, dim: int = -1, n_iter: int = 50
) -> Tensor:
    """`diffmax.budget_sparsemax`."""
    return normalizers.budget_sparsemax(X, budget, dim)


def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """A loss for each row: `diffmax.entmax_loss` with alpha = 2."""
    return losses.entmax_loss(X, target, 2.0, reduction="none")


def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """A loss for each row: `diffmax.entmax_loss` with alpha = 1.5."""
    return losses.entmax_loss(X, target, 1.5, reduction="none")


def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int = 50) -> Tensor:
    """`sparsemax_loss`."""
    return losses.entmax_loss(X, target, 2.0, reduction="none")


def entmax_bisect_loss(X: Tensor, target: Tensor, alpha: float = 1.5, n_iter: int = 50) -> Tensor:
    """A loss for each row: `diffmax.entmax_loss`."""
    return losses.entmax_loss(X, target, alpha, reduction="none")


def normmax_bisect_loss(
    X: Tensor, target: Tensor, alpha: float | Tensor = 2.0, n_iter: int = 50
) -> Tensor:
    """A loss for each row: `diffmax.normmax_loss`."""
    return losses.normmax_loss(X, target, alpha, reduction="none")


class _Layer(nn.Module):
    """One of the functions above along a dimension."""

    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, X: Tensor) -> Tensor:
        weights: Tensor = self.function(X, **self.options)
        return weights

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Sparsemax(_Layer):
    """`sparsemax` as a layer."""

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__(sparsemax, dim=dim, k=k)


class Entmax15(_Layer):
    """`entmax15` as a layer."""

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__(entmax15, dim=dim, k=k)


class SparsemaxBisect(_Layer):
    """`sparsemax` as a layer."""

    def __init__(self, dim: int = -1, n_iter: int | None = None) -> None:
        super().__init__(sparsemax_bisect, dim=dim, n_iter=n_iter)


class EntmaxBisect(_Layer):
    """`entmax_bisect` as a layer."""

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__(entmax_bisect, alpha=alpha, dim=dim, n_iter=n_iter)


class NormmaxBisect(_Layer):
    """`normmax_bisect` as a layer."""

    def __init__(self, alpha: float | Tensor = 2.0, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__(normmax_bisect, alpha=alpha, dim=dim, n_iter=n_iter)


class BudgetBisect(_Layer):
    """`budget_bisect` as a layer."""

    def __init__(self, budget: float | Tensor = 2.0, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__(budget_bisect, budget=budget, dim=dim, n_iter=n_iter)


class _Loss(nn.Module):
    """One of the losses of `diffmax.losses` with classes along the last dimension."""

    def __init__(self, function: Any, ignore_index: int, reduction: str, **options: Any) -> None:
        super().__init__()
        checks.in_set("reduction", reduction, ("mean", "elementwise_mean", "sum", "none"))
        self.function, self.ignore_index, self.options = function, ignore_index, options
        self.reduction = "mean" if reduction == "elementwise_mean" else reduction

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        more = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        loss: Tensor = self.function(X, target, **self.options, **more)
        return loss


class SparsemaxLoss(_Loss):
    """`diffmax.entmax_loss` with alpha = 2."""

    def __init__(
        self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ) -> None:
        super().__init__(losses.entmax_loss, ignore_index, reduction, alpha=2.0)


class SparsemaxBisectLoss(_Loss):
    """`diffmax.entmax_loss` with alpha = 2."""

    def __init__(
        self, n_iter: int = 50, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ) -> None:
        super().__init__(losses.entmax_loss, ignore_index, reduction, alpha=2.0)


class Entmax15Loss(_Loss):
    """`diffmax.entmax_loss` with alpha = 1.5."""

    def __init__(
        self, k: int | None = 100, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ) -> None:
        super().__init__(losses.entmax_loss, ignore_index, reduction, alpha=1.5)


class EntmaxBisectLoss(_Loss):
    """`diffmax.entmax_loss`."""

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        n_iter: int = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(losses.entmax_loss, ignore_index, reduction, alpha=alpha)


class NormmaxBisectLoss(_Loss):
    """`diffmax.normmax_loss`."""

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        n_iter: int = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(losses.normmax_loss, ignore_index, reduction, alpha=alpha)
