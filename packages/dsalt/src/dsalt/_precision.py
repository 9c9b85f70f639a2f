"""In which precision sums are taken."""

from __future__ import annotations

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """x for a sum over a whole sequence or run: float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()
