"""Inputs whose weights have a known share of non-zeros, in one piece or scattered.

Tokens lie on a circle and score by the cosine of their angle, so that the weights of a query are
an arc of neighbours. In order, the arc is one run of keys and whole tiles are empty; with the keys
shuffled the very same weights are everywhere and no tile is empty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)


def sharpness(N: int, density: float) -> float:
    """The score at angle 0 that gives 3/2-entmax (diffmax at 1/2) a support of density * N keys.

    Weights [S cos(t) / 2 - tau]_+^2 with the support |t| <= w = pi * density sum to one when
    (S / 2)^2 N / (2 pi) * integral of (cos t - cos w)^2 over the support is 1.
    """
    w = math.pi * density
    integral = 2 * w + w * math.cos(2 * w) - 1.5 * math.sin(2 * w)
    return 2 * math.sqrt(2 * math.pi / (N * integral))


def _angles(N: int, order: Tensor | None) -> Tensor:
    angles = 2 * math.pi * (torch.arange(N, dtype=torch.float64) + 0.5) / N
    return angles if order is None else angles[order]


def shuffle(N: int) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(N))


def attention(
    N: int, density: float, scattered: bool, H: int = 4, D: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, H, N, D) for attention with scale 1 / sqrt(D); every head its own plane."""
    generator = torch.Generator().manual_seed(N)
    planes = torch.linalg.qr(torch.randn(H, D, 2, generator=generator, dtype=torch.float64))[0]
    v = torch.randn(1, H, N, D, generator=generator)

    def on_circle(order: Tensor | None) -> Tensor:
        angles = _angles(N, order)
        return torch.stack((angles.cos(), angles.sin()), -1) @ planes.mT

    order = shuffle(N) if scattered else None
    q = (sharpness(N, density) * math.sqrt(D) * on_circle(None))[None].float()
    k = on_circle(order)[None].float()
    return q, k, v if order is None else v[:, :, order]


def entmax15(scores: Tensor) -> Tensor:
    """3/2-entmax by sorting, for float64: the gate's answer. Source: Peters et al. 2019, Alg. 2."""
    x = (scores - scores.amax(-1, keepdim=True)) / 2
    top = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = top.cumsum(-1) / k
    spread = top.square().cumsum(-1) - k * mean.square()
    tau = mean - ((1 - spread) / k).clamp(min=1e-30).sqrt()
    size = (tau <= top).sum(-1, keepdim=True)
    return (x - tau.gather(-1, size - 1)).clamp(min=0).square()


def rows(n: int, N: int, density: float, scattered: bool) -> Tensor:
    """(n, N) scores: the cosine around n places of the circle."""
    places = _angles(n, None)[:, None]
    angles = _angles(N, shuffle(N) if scattered else None)
    return (sharpness(N, density) * torch.cos(places - angles)).float()
