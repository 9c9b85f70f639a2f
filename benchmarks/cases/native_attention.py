"""Entmax attention of the native library against SDPA, for inputs of different structure.

noise: independent normal queries and keys. clustered: runs of 128 keys around a centre, queries
that look for a centre of the past. local: ALiBi slopes. flat: noise times 0.1, nearly all weights
above zero. A row names the instruction set that ran; ``SHARED_KERNELS_INSTRUCTIONS=avx2`` with
``MKL_ENABLE_INSTRUCTIONS=AVX2`` asks both sides for a narrower one. glibc returns freed outputs of
a few MB to the system, and the page faults are then timed: set ``MALLOC_MMAP_THRESHOLD_``,
``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_`` to a GB for every contender.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adasplash import adasplash
from shared_kernels import native

from ..registry import Row

DEVICES = ("cpu",)
QUICK = False
H, D = 4, 64
# kind -> at most this many times SDPA's time: forward, forward and backward
GOALS = {"noise": (0.35, 0.2), "clustered": (0.25, 0.2), "local": (0.3, 0.2), "flat": (0.6, 0.6)}
# where both sides are held to AVX2
GOALS_AVX2 = {
    "noise": (0.6, 0.25),
    "clustered": (0.35, 0.25),
    "local": (0.4, 0.25),
    "flat": (1.0, 0.9),
}


def inputs(kind: str, N: int, backward: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k and v, (1, H, N, D), and the options of the call."""
    generator = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(1, H, N, D, generator=generator) for _ in range(3))
    options: dict[str, Any] = {"is_causal": True}
    if kind == "flat":
        q = q * 0.1
    elif kind == "clustered":
        centres = 1.5 * torch.randn(H, N // 128, D, generator=generator)
        k = centres.repeat_interleave(128, 1) + 0.3 * k
        past = torch.arange(N // 32) // 4 + 1  # runs of 32 queries share a centre
        picked = (torch.rand(N // 32, generator=generator) * past).long()
        q = centres[:, picked.repeat_interleave(32)] + 0.3 * q
    elif kind == "local":
        options["alibi_slopes"] = 2.0 ** (-8 * torch.arange(1, H + 1) / H)
    return [x.requires_grad_(backward) for x in (q, k, v)], options


def _run(attend: Callable[..., Tensor], qkv: list[Tensor], backward: bool) -> Any:
    out = attend(*qkv)
    return torch.autograd.grad(out.sum(), qkv) if backward else out


def _exact(kind: str, qkv: list[Tensor], options: dict[str, Any], backward: bool) -> Any:
    wide = [x.detach().double().requires_grad_(backward) for x in qkv]
    options = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items()}
    return _run(functools.partial(adasplash, **options, backend="reference"), wide, backward)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    if native.why_not() is not None:
        return
    for kind, goals in GOALS.items():
        for backward, goal in zip((False, True), goals, strict=True):
            for N in (1024,) if quick else (1024, 2048, 4096):
                qkv, options = inputs(kind, N, backward)
                small, few = inputs(kind, 512, backward)
                attend = functools.partial(adasplash, **options, backend="native")
                sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
                yield Row(
                    f"adasplash/native attention {'forward+backward' if backward else 'forward'}",
                    f"B1 H{H} D{D} N={N}, {kind}, causal, {native.instruction_set()}",
                    ours=functools.partial(_run, attend, qkv, backward),
                    exact=functools.partial(_exact, kind, small, few, backward),
                    checked=functools.partial(
                        _run, functools.partial(adasplash, **few, backend="native"), small, backward
                    ),
                    peers={"SDPA": functools.partial(_run, sdpa, qkv, backward)},
                    bars={"SDPA": round(1 / goal, 3)},
                )
