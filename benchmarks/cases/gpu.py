"""Sizes that fill a GPU, in bf16, against what is fastest there; elsewhere a toy form of each row.

First in a sweep with a budget come the rows that matter most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash import adasplash
from diffmax import diffmax_bisect
from dsalt.kernels import dsalt_attention
from flashdiffusion import FlashDiffusion
from shared_kernels import pairwise

from .. import published, structured
from ..registry import Row, peer

DEVICES = ("cuda",)
SDPA = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _run(attend: Attend, qkv: list[Tensor], backward: bool) -> Any:
    out = attend(*qkv)
    return torch.autograd.grad(out.sum(), qkv) if backward else out


def _sdpa(backend: SDPBackend, is_causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return attend


def _flex(module: Any, N: int, window: int, device: torch.device) -> Attend:
    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    mask = module.create_block_mask(near, None, None, N, N, device=str(device))
    compiled = torch.compile(module.flex_attention, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _peers(qkv: list[Tensor], backward: bool, is_causal: bool, window: int | None) -> dict:
    q = qkv[0]
    attends: dict[str, Any] = {n: _sdpa(b, is_causal) for n, b in SDPA.items()}
    if window is not None:
        attends["FlexAttention, compiled, same window"] = peer(
            "torch.nn.attention.flex_attention",
            lambda m: _flex(m, q.shape[2], window, q.device),
        )
    return {
        name: attend if isinstance(attend, str) else lambda a=attend: _run(a, qkv, backward)
        for name, attend in attends.items()
    }


def _qkv(shape: tuple[int, ...], device: torch.device, backward: bool) -> list[Tensor]:
    made = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_(backward) for x in made]


def _wide(qkv: list[Tensor], backward: bool) -> list[Tensor]:
    return [x.detach().double().requires_grad_(backward) for x in qkv]


def _entmax(N: int, density: float, backward: bool, device: torch.device, heads: int) -> Row:
    def inputs(length: int) -> list[Tensor]:
        qkv = structured.attention(length, density, False, heads)
        return [x.to(device, torch.bfloat16).requires_grad_(backward) for x in qkv]

    qkv, small = inputs(N), inputs(256)
    peers = _peers(qkv, backward, False, None)
    peers["adasplash 0.2.2"] = published.peer(
        "adasplash", lambda m: lambda: _run(lambda *x: m.adasplash(*x, alpha=1.5), qkv, backward)
    )
    return Row(
        f"gpu/adasplash {'forward+backward' if backward else 'forward'}",
        f"bf16 B1 H{heads} D64 N={N}, share {density}",
        ours=lambda: _run(lambda q, k, v: adasplash(q, k, v, 1.5), qkv, backward),
        checked=lambda: _run(lambda q, k, v: adasplash(q, k, v, 1.5), small, backward),
        exact=lambda: _run(
            lambda q, k, v: adasplash(q, k, v, 1.5, backend="reference"),
            _wide(small, backward),
            backward,
        ),
        peers=peers,
        density=density,
        N=N,
    )


def _window(N: int, backward: bool, device: torch.device, heads: int) -> Row:
    window, marks = 256, 64

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        B, H, n, _ = q.shape
        windows = torch.full((B, H, n), window, device=device, dtype=torch.int32)
        landmarks = torch.arange(marks, device=device, dtype=torch.int32) * (n // marks)
        return dsalt_attention(q, k, v, windows, landmarks.expand(B, H, -1), **options)

    qkv = _qkv((1, heads, N, 64), device, backward)
    small = _qkv((1, 2, 300, 64), device, backward)
    return Row(
        f"gpu/dsalt {'forward+backward' if backward else 'forward'}",
        f"bf16 B1 H{heads} D64 N={N} w=256 K=64",
        ours=lambda: _run(attend, qkv, backward),
        checked=lambda: _run(attend, small, backward),
        exact=lambda: _run(
            lambda q, k, v: attend(q, k, v, backend="reference"), _wide(small, backward), backward
        ),
        peers=_peers(qkv, backward, True, window if device.type == "cuda" else None),
        N=N,
    )


def _diffmax(n: int, N: int, alpha: float, device: torch.device) -> Row:
    X = torch.randn(n, N, device=device, dtype=torch.bfloat16)
    return Row(
        "gpu/diffmax",
        f"bf16 [{n}, {N}] alpha={alpha}",
        ours=lambda: diffmax_bisect(X, alpha),
        checked=lambda: diffmax_bisect(X[:64], alpha),
        exact=lambda: diffmax_bisect(X[:64].double(), alpha, backend="reference"),
        peers={
            "softmax": lambda: torch.softmax(X, -1),
            "entmax_bisect": peer("entmax", lambda m: lambda: m.entmax_bisect(X, 2 - alpha)),
        },
        floor=lambda: X.clone(),
        N=N,
    )


def _product(N: int, d: int, r: int, device: torch.device) -> Row:
    X, V = torch.randn(N, d, device=device), torch.randn(N, r, device=device)
    x, v, beta = X[:512], V[:512], 1 / (2 * d)

    def keops(module: Any) -> Callable[[], Tensor]:
        a, b = module.LazyTensor(X[:, None, :]), module.LazyTensor(X[None, :, :])
        kernel = (-beta * ((a - b) ** 2).sum(-1)).exp()
        return lambda: kernel @ V

    return Row(
        "gpu/FlashDiffusion",
        f"N={N} d={d} r={r}",
        ours=lambda: FlashDiffusion(X, X, V, beta=beta, normalize="none"),
        checked=lambda: FlashDiffusion(x, x, v, beta=beta, normalize="none"),
        exact=lambda: torch.exp(-beta * torch.cdist(x.double(), x.double()).square()) @ v.double(),
        peers={"pykeops": peer("pykeops.torch", keops)},
        N=N,
    )


def _neighbours(N: int, device: torch.device) -> Row:
    X = torch.randn(N, 64, device=device)

    def whole() -> Tensor:
        return torch.cdist(X, X).topk(10, largest=False).values

    return Row(
        "gpu/nearest neighbours",
        f"N={N} d=64 k=10",
        ours=lambda: pairwise.knn(X, 10),
        checked=lambda: pairwise.knn(X[:512], 10)[0],
        exact=lambda: torch.stack(
            [
                (p - X[:512].double()).square().sum(-1).topk(10, largest=False).values
                for p in X[:512].double()
            ]
        ),
        peers={"cdist and topk": whole},
        N=N,
    )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    toy = device.type != "cuda"
    heads = 2 if toy else 16
    lengths = (256,) if toy else (8192,) if quick else (8192, 2048, 32768)
    densities = (0.1,) if toy else (1.0, 0.1) if quick else structured.DENSITIES
    for N in lengths:
        for backward in (False, True):
            yield _window(N, backward, device, heads)
            for density in densities if N == 8192 or toy else (1.0, 0.1):
                yield _entmax(N, density, backward, device, heads)
    for n, N in ((16, 512),) if toy else ((65536, 1024), (16384, 4096), (2048, 32768)):
        for alpha in (0.5, 0.85):
            yield _diffmax(n, N, alpha, device)
    for N in (512,) if toy else (100_000,) if quick else (100_000, 500_000):
        for d, r in ((3, 1), (50, 8)):
            yield _product(N, d, r, device)
    yield _neighbours(1000 if toy else 30_000, device)
