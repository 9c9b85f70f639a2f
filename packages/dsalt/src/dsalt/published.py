"""Names of the published packages 0.1.10 and 1.0.0 whose meaning this package has under another.

`Differences from the published package` in the README lists every name: here, elsewhere, or absent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _rotary
from .kernels import compute_hybrid_energy_scores
from .modules import SwiGLU

__all__ = [
    "RMSENorm",
    "RMSNorm",
    "SwiGLUFFN",
    "apply_rotary_emb",
    "build_rope_cache",
    "compute_landmark_idx",
    "get_cosine_schedule_with_warmup",
]

compute_landmark_idx = compute_hybrid_energy_scores


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of size d_model.

    Example:
        >>> RMSNorm(4)(torch.ones(1, 4))[0, 0].item()
        0.999999...
    """

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__(d_model, eps=eps)


RMSENorm = RMSNorm


class SwiGLUFFN(SwiGLU):
    """:class:`SwiGLU` with the published order of arguments: (d_model, d_ff).

    Its ``w1``, ``w2``, ``w3`` are here ``up``, ``gate``, ``down``.

    Example:
        >>> SwiGLUFFN(8, 16)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, d_model: int, d_ff: int | None = None) -> None:
        super().__init__(d_model, d_ff=d_ff)


def get_cosine_schedule_with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    r"""Learning rate that rises linearly to lr, then falls along a cosine to min_lr_ratio lr.

    .. math:: r(t) = t / w \;(t < w), \quad
              r(t) = m + \tfrac{1 - m}{2} (1 + \cos(\pi \min(1, (t - w) / (T - w))))

    Args:
        optimizer: its learning rates are multiplied by r(t).
        warmup_steps, total_steps: w and T.
        min_lr_ratio: m.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> get_cosine_schedule_with_warmup(optimizer, 2, 10).get_last_lr()
        [0.0]
    """

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, ratio)


def build_rope_cache(
    seq_len: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: float = 10000.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """cos and sin (seq_len, head_dim) of position / scale * base^(-2d / head_dim), both halves.

    Example:
        >>> build_rope_cache(5, 4)[0].shape
        torch.Size([5, 4])
    """
    if head_dim % 2:
        checks.fail("head_dim", "be even", head_dim, "pairs of coordinates turn")
    rate = _rotary.rates(head_dim // 2, base, dtype, device)
    angle = torch.arange(seq_len, device=device, dtype=dtype)[:, None] / scale * rate
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def apply_rotary_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with pairs (d, d + D // 2) turned by the angles of :func:`build_rope_cache`.

    Example:
        >>> q, k = apply_rotary_emb(*torch.ones(2, 1, 5, 4), *build_rope_cache(5, 4))
        >>> bool((q[:, 0] == 1).all())
        True
    """

    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return _rotary.turn(q, cos, sin), _rotary.turn(k, cos, sin)
