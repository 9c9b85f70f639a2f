"""diffmax on rows of normal scores, against torch.softmax and the entmax package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from benchmarks.registry import Row, peer
from torch import Tensor

from diffmax import diffmax_bisect

SHAPES = ((8192, 64), (1024, 512), (128, 4096), (8, 65536))
ALPHAS = (0.05, 0.3, 0.5, 0.85)

# Least speed relative to a peer, by row length: times faster than entmax (alpha <= 0.5, above)
# and, below 1, the share of softmax's speed.
ENTMAX_BARS = {64: (13, 20), 512: (25, 17), 4096: (45, 20), 65536: (70, 20)}
SOFTMAX_BARS = {
    64: (None, 1 / 12),
    512: (1 / 10, 1 / 14),
    4096: (1 / 7, 1 / 12),
    65536: (1 / 4.5, 1 / 12),
}
BACKWARD_BARS = {"softmax": 1 / 3.8, "entmax": 3.0}


def gradient(y: Tensor, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Forward, backward in X, and both in one, over all shapes."""
    for n, N in SHAPES[1:3] if quick else SHAPES:
        generator = torch.Generator().manual_seed(N)
        X, G = (torch.randn(n, N, generator=generator).to(device) for _ in range(2))
        for alpha in (0.3, 0.85) if quick else ALPHAS:
            yield forward(X, alpha)
        for alpha in (0.3, 0.85) if quick else ALPHAS:
            yield backward(X, G, alpha)
        for alpha in (0.5, 0.85):
            yield both(X, G, alpha)
    for N in (256,) if quick else (256, 1024):
        yield attention(N, 0.5, device)


def forward(X: Tensor, alpha: float) -> Row:
    n, N = X.shape
    which = int(alpha > 0.5)
    bars = {"entmax": ENTMAX_BARS[N][which], "softmax": SOFTMAX_BARS[N][which]}
    return Row(
        case="diffmax/forward",
        size=f"[{n}, {N}] alpha={alpha}",
        ours=lambda: diffmax_bisect(X, alpha),
        exact=lambda: diffmax_bisect(X.double(), alpha, backend="reference"),
        peers={
            "softmax": lambda: torch.softmax(X, -1),
            "entmax": peer("entmax", lambda m: lambda: m.entmax_bisect(X, 2 - alpha)),
        },
        floor=lambda: torch.exp(X),
        density=(diffmax_bisect(X, alpha) > 0).float().mean().item(),
        bars={name: bar for name, bar in bars.items() if bar is not None},
    )


def backward(X: Tensor, G: Tensor, alpha: float) -> Row:
    n, N = X.shape
    x = X.clone().requires_grad_()

    def exact() -> Any:
        wide = X.double().requires_grad_()
        y = diffmax_bisect(wide, alpha, backend="reference")
        return torch.autograd.grad(y, wide, G.double())

    return Row(
        case="diffmax/backward",
        size=f"[{n}, {N}] alpha={alpha}",
        ours=gradient(diffmax_bisect(x, alpha), x, G),
        exact=exact,
        peers={
            "softmax": gradient(torch.softmax(x, -1), x, G),
            "entmax": peer("entmax", lambda m: gradient(m.entmax_bisect(x, 2 - alpha), x, G)),
        },
        floor=lambda: torch.mul(X, G),
        bars=dict(BACKWARD_BARS),
    )


def both(X: Tensor, G: Tensor, alpha: float) -> Row:
    """A step of training: what the backward pass saves must not be paid for in the forward pass."""
    n, N = X.shape
    x, wide = X.clone().requires_grad_(), X.double().requires_grad_()

    def run(normalize: Callable[[Tensor], Tensor], x: Tensor = x, G: Tensor = G) -> Any:
        return torch.autograd.grad(normalize(x), x, G)

    return Row(
        case="diffmax/both",
        size=f"[{n}, {N}] alpha={alpha}",
        ours=lambda: run(lambda x: diffmax_bisect(x, alpha)),
        exact=lambda: run(
            lambda x: diffmax_bisect(x, alpha, backend="reference"), wide, G.double()
        ),
        peers={
            "softmax": lambda: run(lambda x: x.softmax(-1)),
            "entmax": peer(
                "entmax", lambda m: lambda: run(lambda x: m.entmax_bisect(x, 2 - alpha))
            ),
        },
    )


def attention(N: int, alpha: float, device: torch.device) -> Row:
    """Causal attention written out around a normaliser, forward and backward."""
    generator = torch.Generator().manual_seed(N)
    q, k, v = (
        torch.randn(1, 4, N, 64, generator=generator).to(device).requires_grad_() for _ in range(3)
    )

    small = [x[:, :, :512].detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in small]

    def run(normalize: Callable[[Tensor], Tensor], qkv: Sequence[Tensor] = (q, k, v)) -> Any:
        n = qkv[0].shape[2]
        hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        scores = (qkv[0] @ qkv[1].mT / 8).masked_fill(hidden, -torch.inf)
        return torch.autograd.grad((normalize(scores) @ qkv[2]).sum(), qkv)

    return Row(
        case="diffmax/attention",
        size=f"B1 H4 D64 N={N} alpha={alpha}, causal",
        ours=lambda: run(lambda x: diffmax_bisect(x, alpha)),
        checked=lambda: run(lambda x: diffmax_bisect(x, alpha), small),
        exact=lambda: run(lambda x: diffmax_bisect(x, alpha, backend="reference"), wide),
        peers={
            "softmax": lambda: run(lambda x: x.softmax(-1)),
            "entmax": peer(
                "entmax", lambda m: lambda: run(lambda x: m.entmax_bisect(x, 2 - alpha))
            ),
        },
    )
