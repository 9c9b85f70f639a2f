"""dsalt: window + landmark attention against causal SDPA, a language model against a dense one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dsalt.kernels import dsalt_attention

from ..registry import Row
from . import _dsalt_landmarks, _dsalt_model

H, D, W, K = 8, 64, 256, 64


def _inputs(N: int, device: torch.device, ragged: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    qkv = [torch.randn(1, H, N, D, device=device).requires_grad_() for _ in range(3)]
    if ragged:
        windows = torch.randint(32, W + 1, (1, H, N), device=device, dtype=torch.int32)
    else:
        windows = torch.full((1, H, N), W, device=device, dtype=torch.int32)
    landmarks = torch.rand(1, H, N, device=device).topk(K, -1).indices.sort(-1).values
    return qkv, windows, landmarks.to(torch.int32)


def _both(qkv: list[Tensor], windows: Tensor, landmarks: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(dsalt_attention(*qkv, windows, landmarks).sum(), qkv)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    allowed = {2048: 0.72, 4096: 0.40, 8192: 0.24, 16384: 0.14}
    for N, share in allowed.items():
        if quick and N > 4096:
            continue
        for ragged in (False, True):
            qkv, windows, landmarks = _inputs(N, device, ragged)
            small = _inputs(512, device, ragged)

            def sdpa(qkv=qkv):
                out = F.scaled_dot_product_attention(*qkv, is_causal=True)
                return torch.autograd.grad(out.sum(), qkv)

            def exact(small=small):
                wide = [x.detach().double().requires_grad_() for x in small[0]]
                out = dsalt_attention(*wide, *small[1:], backend="reference")
                return torch.autograd.grad(out.sum(), wide)

            yield Row(
                "dsalt/attention forward+backward",
                f"B1 H8 D64 N={N} w={'32..256' if ragged else 256} K=64",
                ours=lambda q=qkv, w=windows, l=landmarks: _both(q, w, l),
                exact=exact,
                checked=lambda small=small: _both(*small),
                peers={"SDPA": sdpa},
                bars={"SDPA": round(1 / (share * (1.4 if ragged else 1.0)), 2)},
            )
    yield from _dsalt_landmarks.rows(device, quick)
    yield from _dsalt_model.rows(device, quick)
