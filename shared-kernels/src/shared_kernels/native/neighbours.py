"""Nearest rows by the native library: what `pairwise.knn` proposes and checks, in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import empty, run

__all__ = ["search"]

_SECONDS_PER_PRODUCT = 2e-11

_POINTERS = ("x", "y", "y_sq", "exact_x", "exact_y", "scores", "index", "worst")


class _NeighboursCall(ctypes.Structure):
    """`NeighboursCall` of neighbours.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("m", "D", "k", "keep")),
        ("self", ctypes.c_int),
    )


def search(
    x: Tensor,
    y: Tensor,
    y_sq: Tensor | None,
    exact: tuple[Tensor, Tensor],
    k: int,
    n_keep: int,
    exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest scores of each row among the n_keep that products propose.

    Args:
        x, y: (n, D) and (m, D), fp32; n_keep rows of y at least are there to choose from.
        y_sq: (m,), |y|^2, and a score is |x - y|^2; None: a score is -x.y.
        exact: x and y in fp64, which the scores of the n_keep are taken from.
        exclude_self: whether row i of y is left out for row i of x.

    Returns:
        scores (n, k) fp64, ascending, equal ones by index; indices (n, k) int64; and (n,) fp32, the
        largest |y|^2 - 2 x.y (or -x.y) among the n_keep.
    """
    (n, D), m = x.shape, len(y)
    scores = empty((n, k), torch.float64)
    index = empty((n, k), torch.int64)
    worst = empty((n,))
    c = _NeighboursCall()
    held = [None if t is None else t.contiguous() for t in (x, y, y_sq, *exact)]
    for name, t in zip(_POINTERS, (*held, scores, index, worst), strict=True):
        setattr(c, name, None if t is None else t.data_ptr())
    c.m, c.D, c.k, c.keep, c.self = m, D, k, n_keep, exclude_self
    if n:
        run("neighbours_search", c, n, n * m * (D + 4) * _SECONDS_PER_PRODUCT)
    return scores, index, worst
