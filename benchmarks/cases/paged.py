"""Decoding over a paged cache that reads what its bounds ask for, against reading everything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.signal import lfilter
from torch import Tensor
from torch.nn import functional as F

import adasplash

from ..registry import Row

H, D, PAGE = 8, 64, 64
# kind of keys -> how many times faster than each peer decoding has to be
BARS = {
    "AR(1) keys": {"SDPA": 20.0, "entmax_decode": 10.0},
    "keys in runs": {"SDPA": 20.0, "entmax_decode": 10.0},
    "independent keys": {"entmax_decode": round(1 / 1.2, 3)},
}


def keys(kind: str, N: int) -> Tensor:
    """(1, H, N, D) keys of unit variance.

    AR(1): each is 0.999 times the one before and noise. Runs: 128 in a row around a common centre,
    at a tenth of the distance that independent keys have.
    """
    generator = torch.Generator().manual_seed(N)
    noise = torch.randn(H, N, D, generator=generator)
    if kind == "independent keys":
        return noise[None]
    if kind == "keys in runs":
        centres = torch.randn(H, N // 128, D, generator=generator)
        return (centres.repeat_interleave(128, 1) + 0.1 * noise)[None]
    rho = 0.999
    noise[:, 1:] *= (1 - rho**2) ** 0.5
    return torch.from_numpy(lfilter([1.0], [1.0, -rho], noise.numpy(), axis=1)).float()[None]


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    N = 16384 if quick else 65536
    for kind, bars in BARS.items():
        k = keys(kind, N).to(device)
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(k.shape, generator=generator).to(device)
        near = torch.randn(1, H, 1, D, generator=generator).to(device)
        q, lengths = k[:, :, -1:] + 0.3 * near, torch.tensor([N], device=device)
        cache = adasplash.PagedCache(N // PAGE, H, D, page_size=PAGE, device=device)
        cache.add(k, v)
        stats = adasplash.decode_stats(q, cache)

        def everything(q=q, k=k, v=v, lengths=lengths):
            return adasplash.entmax_decode(q, k, v, lengths, backend="torch")

        def exact(q=q, k=k, v=v, lengths=lengths):
            wide = (x.double() for x in (q, k, v))
            return adasplash.entmax_decode(*wide, lengths, backend="reference")

        yield Row(
            "paged/decode",
            f"B1 H{H} D{D} n=1, {N} {kind}, pages of {PAGE}",
            ours=lambda q=q, cache=cache: adasplash.entmax_decode(q, cache),
            exact=exact,
            peers={
                "SDPA": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                "entmax_decode": everything,
            },
            density=int(stats.pages_read.sum()) / (int(stats.pages_held.sum()) * H),
            bars=bars if not quick else {},
        )
