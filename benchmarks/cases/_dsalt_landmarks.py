"""dsalt: scoring and choosing landmarks, as a share of the attention that uses them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsalt import _reference
from dsalt.kernels import HybridEnergyScorer, dsalt_attention

from ..registry import Row

H, D, W, K, C = 8, 64, 256, 64, 32


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Forward of both, without gradients: the choice has none."""
    for N in (4096,) if quick else (4096, 16384):
        x = torch.nn.functional.rms_norm(torch.randn(1, N, H * D, device=device), (H * D,))
        q, k, v = (torch.randn(1, H, N, D, device=device) for _ in range(3))
        windows = torch.full((1, H, N), float(W), device=device)
        scorer = HybridEnergyScorer(H, K, landmark_block=C).to(device)

        @torch.no_grad()
        def landmarks(scorer=scorer, x=x, v=v) -> tuple[Tensor, Tensor]:
            return tuple(scorer(x, v)[:2])

        found = landmarks()

        @torch.no_grad()
        def attention(marks=found, q=q, k=k, v=v, windows=windows) -> Tensor:
            idx, bias = marks
            return dsalt_attention(q, k, v, windows, idx, landmark_bias=bias, landmark_block=C)

        @torch.no_grad()
        def scores(scorer=scorer, x=x[:, :512], v=v[:, :, :512]) -> Tensor:
            return scorer(x, v).scores

        @torch.no_grad()
        def exact(scorer=scorer, x=x[:, :512], v=v[:, :, :512]) -> Tensor:
            norms = v.double().norm(dim=-1), x.double().norm(dim=-1)
            return _reference.energy(*norms, scorer.alpha.double(), causal=True)

        yield Row(
            "dsalt/landmarks forward",
            f"B1 H8 D64 N={N} w=256 K=64",
            ours=landmarks,
            exact=exact,
            checked=scores,
            peers={"attention": attention},
            bars={"attention": 10.0},
        )
