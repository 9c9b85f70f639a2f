"""Rotary positions: pairs of coordinates turn by an angle that grows with the position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared_kernels.rows import wide


def rates(half: int, base: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The angle per position of each of ``half`` pairs, base^(-d / half)."""
    return base ** (-torch.arange(half, device=device, dtype=dtype) / max(1, half))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) with its pairs (d, d + D // 2) turned; cos and sin are (..., D // 2)."""
    half = x.shape[-1] // 2
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rotate(
    x: Tensor, positions: Tensor, base: float, factor: float = 1.0, length: int | None = None
) -> Tensor:
    """Rotary positions on x (B, H, N, D); ``positions`` are (N,) or (B, N).

    With a factor the positions are those of YaRN: pairs that turn less than once in ``length``
    tokens turn ``factor`` times slower, pairs that turn more than 32 times turn as before, and
    those between are a mix of both; x grows by 0.1 ln(factor) + 1.

    Source: Peng et al. 2023, "YaRN", eqs. 17, 18 and 22.
    """
    rate = rates(x.shape[-1] // 2, base, wide(x), x.device)
    size = 1.0
    if factor > 1.0 and length is not None:
        turns = length * rate / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        rate = rate * (kept + (1 - kept) / factor)
        size = 0.1 * math.log(factor) + 1.0
    angle = positions.to(rate.dtype)[..., None] * rate  # [N, half] or [B, N, half]
    angle = angle[:, None] if angle.dim() == 3 else angle
    return turn(x, angle.cos() * size, angle.sin() * size)
