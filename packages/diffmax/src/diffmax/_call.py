"""The call of the op, its checks, and what each backend keeps of it for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.rows import Weights, wide

from . import _checks
from ._rows import collect, from_last, spread

__all__ = ["Bisect", "LinearLoss", "Support", "Weights"]


class Bisect(NamedTuple):
    """Y = [1 + a (X - tau)]_+ ** (1/a) along dim, a = 1 - alpha, summing to 1.

    ``alpha`` is () or broadcasts against X with size 1 along dim.
    """

    X: Tensor
    alpha: Tensor
    dim: int = -1
    n_iter: int = 50
    ensure_sum_one: bool = True

    def check(self) -> Bisect:
        """The call itself, if it is legal, with alpha as a tensor and plain Python numbers."""
        dim = _checks.scores(self.X, self.dim)
        checks.positive_int("n_iter", self.n_iter)
        divide = checks.flag("ensure_sum_one", self.ensure_sum_one)
        alpha = _checks.alpha_tensor(self.alpha, self.X, dim)
        return Bisect(self.X, alpha, dim, int(self.n_iter), divide)

    def fake(self) -> Tensor:
        return _like(self.X, self.dim)

    def fake_gradients(self, saved: Any, needs: frozenset[str]) -> dict[str, Tensor]:
        """X is not kept: its gradient has the shape of the weights."""
        of = {"X": lambda: _like(saved.out, self.dim), "alpha": lambda: _empty(self.alpha)}
        return {field: of[field]() for field in needs}

    def s(self, shape: torch.Size) -> float | Tensor:
        """1 - alpha: a number where rows of `shape` share one that costs nothing to read."""
        if self.alpha.numel() == 1 and self.alpha.is_cpu:
            return 1.0 - self.alpha.item()
        return 1 - spread(self.alpha, shape, self.dim).double()

    def gradients(self, dX: Tensor | None, ds: Tensor | None) -> dict[str, Tensor]:
        """Gradients in rows, and in s per row (..., 1), as those of the fields."""
        found = {} if dX is None else {"X": from_last(dX, self.dim)}
        return found if ds is None else {**found, "alpha": collect(-ds, self.alpha, self.dim)}


class LinearLoss(NamedTuple):
    """The Fenchel-Young loss of logits hidden @ weight.T + bias, which are never stored."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N, K) int64, different columns in a row; -1 where there is none
    target_weights: Tensor  # (N, K), 0 where there is none
    alpha: Tensor  # one number
    label_smoothing: float
    softcap: float | None
    reduction: str
    group: str  # name of the process group over which the vocabulary is spread, or ""
    with_alpha: bool  # whether alpha wants a gradient
    at_once: bool  # whether the gradient of rows with a long support is made with the loss
    save: bool

    def fake(self) -> Tensor:
        shape = self.hidden.shape[:1] if self.reduction == "none" else ()
        return self.hidden.new_empty(shape, dtype=wide(self.hidden))

    @property
    def s(self) -> float | Tensor:
        """1 - alpha: a number where that costs nothing to read."""
        if self.alpha.device.type == "cpu":
            return 1.0 - self.alpha.item()
        return (1 - self.alpha.double()).reshape(())

    @property
    def capacity(self) -> int:
        """How many weights above zero are kept of a row, at most: 1/80 of the vocabulary."""
        V = self.weight.shape[0]
        return min(V, max(32, V // 80))


class Support(NamedTuple):
    """The support of each row; of rows that are too long, with ``at_once``, the gradients."""

    keys: Tensor  # (room,) int32, columns with a weight above zero, row after row
    weights: Tensor  # (room,) those weights
    sizes: Tensor  # (N,) int64, how many there are; -1 for a row that has too many
    slope: Tensor  # (N, K) the part of the target in the gradient
    d_alpha: Tensor  # (N,) fp64
    d_hidden: Tensor  # (N, d) for a loss of 1 in each row
    d_weight: Tensor  # (V, d), of all rows that are too long
    d_bias: Tensor  # (V,)

    @classmethod
    def empty(cls, call: LinearLoss) -> Support:
        """Zeros, to be written."""
        x, dtype = call.hidden, wide(call.hidden)
        (N, d), V, K = x.shape, call.weight.shape[0], call.target.shape[1]
        N = N if call.save else 0
        room = N * call.capacity
        dense = N > 0 and call.at_once
        return cls(
            x.new_zeros(room, dtype=torch.int32),
            x.new_zeros(room, dtype=dtype),
            x.new_zeros(N, dtype=torch.int64),
            x.new_zeros(N, K, dtype=dtype),
            x.new_zeros(N, dtype=torch.float64),
            x.new_zeros((N, d) if dense else 0, dtype=dtype),
            x.new_zeros((V, d) if dense else 0, dtype=dtype),
            x.new_zeros(V if dense else 0, dtype=dtype),
        )

    @classmethod
    def fake(cls, call: LinearLoss) -> Support:
        return cls.empty(call)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like(X: Tensor, dim: int) -> Tensor:
    """Shape and strides of results: contiguous with `dim` moved to the end."""
    return X.new_empty(X.movedim(dim, -1).shape).movedim(-1, dim)
