"""Tensors as kernels take them, with their strides in one argument; the units of their products."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

# Below it what is added to products, or hides them, may be no number in their units.
LEAST_UNIT = 2.0**-64


def units(scale: float) -> tuple[float, float]:
    """scale as a factor of products of queries and keys, and how much score a unit of them then is.

    The factor is 1 or -1: products keep the sizes that they have until the largest one of a row has
    been subtracted. The difference of two has no rounding error, whatever a compiler makes of it.
    """
    if not abs(scale) >= LEAST_UNIT:
        return scale, 1.0
    return math.copysign(1.0, scale), abs(scale)


class Rows(NamedTuple):
    """A (B, H, N, D) tensor whose rows are contiguous."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_n: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """x itself where its rows are contiguous, else a copy; the other strides stay."""
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        return cls(x, x.stride(0), x.stride(1), x.stride(2))
