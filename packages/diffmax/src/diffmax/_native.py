"""The door to the native library: diffmax(alpha) is its rows at s = 1 - alpha."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.native import rows

from . import _torch_linear
from ._call import Bisect, LinearLoss, Support, Weights
from ._rows import from_last, to_last


def bisect(call: Bisect) -> tuple[Tensor, Weights]:
    X, s = to_last(call.X, call.dim), call.s(call.X.shape)
    Y = from_last(rows.normalize(X, s, call.n_iter, call.ensure_sum_one), call.dim)
    return Y, Weights(Y)


def bisect_backward(
    call: Bisect, saved: Weights, G: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    G, Y = to_last(G, call.dim), to_last(saved.out, call.dim)
    s = call.s(saved.out.shape)
    return call.gradients(*rows.backward(G, Y, s, "X" in needs, "alpha" in needs))


_ROUTINES = _torch_linear.Routines(_torch_linear.search, rows.normalize)


def linear_loss(call: LinearLoss) -> tuple[Tensor, Support]:
    return _torch_linear.linear_loss(call, _ROUTINES)


def linear_loss_backward(
    call: LinearLoss, saved: Support, g: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    return _torch_linear.linear_loss_backward(call, saved, g, needs, _ROUTINES)
