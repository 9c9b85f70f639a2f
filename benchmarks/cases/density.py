"""Time against the share of non-zero weights: the same weights in one piece and scattered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adasplash import adasplash, triton_entmax
from diffmax import diffmax_bisect

from .. import structured
from ..registry import Row, peer


def _density(q: Tensor, k: Tensor) -> float:
    """Measured, over 64 queries of each head."""
    some = q[:, :, :: max(1, q.shape[2] // 64)]
    weights = triton_entmax(some @ k.mT / math.sqrt(q.shape[-1]), 1.5)
    return (weights > 0).float().mean().item()


def _flex(module: Any, q: Tensor, k: Tensor, v: Tensor, density: float) -> Callable[[], Tensor]:
    """Softmax in a band that was told beforehand: what a mask known in advance would cost."""
    N, half = q.shape[2], torch.tensor(density * q.shape[2] / 2, device=q.device)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        away = (i - j).abs()
        return torch.minimum(away, N - away) <= half

    mask = module.create_block_mask(near, None, None, N, N, device=str(q.device))
    compiled = torch.compile(module.flex_attention, fullgraph=True)
    return lambda: compiled(q, k, v, block_mask=mask)


def _attention(
    N: int, density: float, scattered: bool, backward: bool, device: torch.device, quick: bool
) -> Row:
    def inputs(length: int) -> list[Tensor]:
        qkv = structured.attention(length, density, scattered)
        return [x.to(device).requires_grad_(backward) for x in qkv]

    def run(attend: Callable[..., Tensor], qkv: list[Tensor]) -> Any:
        out = attend(*qkv)
        return torch.autograd.grad(out.sum(), qkv) if backward else out

    def exact() -> Any:
        wide = [x.detach().double().requires_grad_(backward) for x in small]
        scale = 1 / math.sqrt(wide[0].shape[-1])
        return run(lambda q, k, v: structured.entmax15(scale * q @ k.mT) @ v, wide)

    qkv, small = inputs(N), inputs(min(N, 1024))
    peers: dict[str, Any] = {"SDPA": lambda: run(F.scaled_dot_product_attention, qkv)}
    if not (scattered or backward or quick) and density < 1:  # compiling is not quick
        peers["FlexAttention, compiled, band given"] = peer(
            "torch.nn.attention.flex_attention", lambda m: _flex(m, *qkv, density)
        )
    return Row(
        f"density/attention {'forward+backward' if backward else 'forward'}",
        f"B1 H4 D64 N={N}, share {density}, {'scattered' if scattered else 'in one piece'}",
        ours=lambda: run(lambda q, k, v: adasplash(q, k, v, 1.5), qkv),
        checked=lambda: run(lambda q, k, v: adasplash(q, k, v, 1.5), small),
        exact=exact,
        peers=peers,
        density=_density(*(x.detach() for x in qkv[:2])),
        N=N,
    )


def _rows(n: int, N: int, density: float, scattered: bool, device: torch.device) -> Row:
    X = structured.rows(n, N, density, scattered).to(device)
    return Row(
        "density/diffmax",
        f"[{n}, {N}] alpha=0.5, share {density}, {'scattered' if scattered else 'in one piece'}",
        ours=lambda: diffmax_bisect(X, 0.5),
        exact=lambda: diffmax_bisect(X.double(), 0.5, backend="reference"),
        peers={
            "softmax": lambda: torch.softmax(X, -1),
            "entmax15": peer("entmax", lambda m: lambda: m.entmax15(X, -1)),
            "entmax_bisect": peer("entmax", lambda m: lambda: m.entmax_bisect(X, 1.5)),
        },
        floor=lambda: torch.exp(X),
        density=(diffmax_bisect(X, 0.5) > 0).float().mean().item(),
        N=N,
    )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    densities = (1.0, 0.1) if quick else structured.DENSITIES
    N = 512 if quick else 2048
    for backward in (False, True):
        for density in densities:
            for scattered in (False, True):
                yield _attention(N, density, scattered, backward, device, quick)
    for density in densities:
        for scattered in (False, True):
            yield _rows(128, 4096, density, scattered, device)
