"""In which precision sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of short sums over x: float32, or x's own where it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def double(x: Tensor) -> Tensor:
    """x for a sum over a whole sequence or run: float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()
