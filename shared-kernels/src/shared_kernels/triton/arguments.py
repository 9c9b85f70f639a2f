"""Tensors as kernels take them: with their strides, in one argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
