"""adasplash: rows against entmax, attention against SDPA and materialised entmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import adasplash

from ..registry import Row, peer


def _rows_cases(device: torch.device, quick: bool) -> Iterator[Row]:
    for shape, step in (((4096, 512), 16), ((32, 32768), 4)):  # every step-th row is checked
        for alpha in (1.5, 2.0) if quick else (1.25, 1.5, 1.75, 2.0):
            x = torch.randn(shape, device=device)
            named = {1.5: "entmax15", 2.0: "sparsemax"}.get(alpha)
            peers = {
                "entmax_bisect": peer(
                    "entmax", lambda m, x=x, a=alpha: lambda: m.entmax_bisect(x, a)
                )
            }
            bars = {"entmax_bisect": 18.0}
            if named:
                peers[named] = peer("entmax", lambda m, x=x, n=named: lambda: getattr(m, n)(x))
                bars[named] = {"entmax15": 7.0, "sparsemax": 5.0}[named]
            yield Row(
                "adasplash/triton_entmax",
                f"[{shape[0]}, {shape[1]}] α={alpha}",
                ours=lambda x=x, a=alpha: adasplash.triton_entmax(x, a),
                checked=lambda x=x, a=alpha, n=step: adasplash.triton_entmax(x, a)[::n],
                exact=lambda x=x, a=alpha, n=step: adasplash.triton_entmax(
                    x[::n].double(), a, backend="reference"
                ),
                peers=peers,
                floor=lambda x=x: torch.softmax(x, -1),
                density=(adasplash.triton_entmax(x, alpha) > 0).float().mean().item(),
                bars=bars,
            )


def _qkv(N: int, device: torch.device, scale: float, grad: bool) -> list[Tensor]:
    q, k, v = (torch.randn(1, 4, N, 64, device=device) for _ in range(3))
    return [x.requires_grad_(grad) for x in (q * scale, k, v)]


def _attention_cases(device: torch.device, quick: bool) -> Iterator[Row]:
    bars = {  # support, backward, N -> how many times SDPA's time is allowed
        ("sparse", False, 1024): 3.0,
        ("sparse", False, 4096): 2.5,
        ("sparse", True, 1024): 2.0,
        ("sparse", True, 4096): 1.3,
        ("dense", False, 1024): 3.6,
        ("dense", False, 4096): 3.6,
        ("dense", True, 1024): 2.7,
        ("dense", True, 4096): 2.7,
    }
    for (support, backward, N), allowed in bars.items():
        if quick and N > 1024:
            continue
        q, k, v = _qkv(N, device, 1.0 if support == "sparse" else 0.1, backward)

        def ours(q=q, k=k, v=v, backward=backward):
            out = adasplash.adasplash(q, k, v, 1.5, is_causal=True)
            return torch.autograd.grad(out.sum(), (q, k, v)) if backward else out

        def sdpa(q=q, k=k, v=v, backward=backward):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(out.sum(), (q, k, v)) if backward else out

        small = [x[:, :2, :512].detach().requires_grad_(backward) for x in (q, k, v)]

        def checked(small=small, backward=backward):
            out = adasplash.adasplash(*small, 1.5, is_causal=True)
            return torch.autograd.grad(out.sum(), small) if backward else out

        def exact(small=small, backward=backward):
            wide = [x.detach().double().requires_grad_(backward) for x in small]
            out = adasplash.adasplash(*wide, 1.5, True, backend="reference")
            return torch.autograd.grad(out.sum(), wide) if backward else out

        peers = {"SDPA": sdpa}
        if not backward and N == 1024:
            mask = torch.full((N, N), -torch.inf, device=device).triu(1)
            peers["entmax15(QKᵀ)V"] = peer(
                "entmax",
                lambda m, q=q, k=k, v=v, mask=mask: lambda: m.entmax15(q @ k.mT / 8 + mask, -1) @ v,
            )
        yield Row(
            f"adasplash/attention {'forward+backward' if backward else 'forward'}",
            f"B1 H4 D64 N={N}, {support} support, causal",
            ours=ours,
            exact=exact,
            checked=checked,
            peers=peers,
            bars={"SDPA": round(1 / allowed, 3), "entmax15(QKᵀ)V": 7.0},
        )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from _rows_cases(device, quick)
    yield from _attention_cases(device, quick)
