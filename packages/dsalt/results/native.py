"""Attention over window and landmarks by the native library and by torch: CPU time of one thread.

    python packages/dsalt/results/native.py > packages/dsalt/results/native.json

All of a row run in turn in one process. `SHARED_KERNELS_INSTRUCTIONS=avx2` asks for
narrower vectors.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from dsalt.kernels import dsalt_attention, select_landmarks
from shared_kernels import native

H, D = 4, 64


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def row(name: str, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """The median CPU milliseconds of each call, and how often native's go into them."""
    found: dict[str, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for key, call in calls.items():
            start = time.process_time()
            call()
            found[key].append(1e3 * (time.process_time() - start))
    medians = {key: median(times) for key, times in found.items()}
    return {
        "row": name,
        "milliseconds": {key: round(value, 2) for key, value in medians.items()},
        "native_over": {key: round(medians["native"] / value, 3) for key, value in medians.items()},
    }


def attention_rows(N: int, soft: bool, repeats: int) -> list[dict[str, Any]]:
    """Windows of 128 tokens on average (soft) or 256 (hard), 64 landmarks."""
    q, k, v = (torch.randn(1, H, N, D, requires_grad=True) for _ in range(3))
    d_out = torch.randn(1, H, N, D)
    leaves = [q, k, v]
    if soft:
        windows = (256 * torch.rand(1, H, N)).requires_grad_()
        landmarks = select_landmarks(torch.randn(1, H, N), 64, landmark_block=128)
        bias = torch.zeros(landmarks.shape, requires_grad=True)
        options: dict[str, Any] = {"landmark_bias": bias, "landmark_block": 128}
        leaves += [windows, bias]
    else:
        windows = torch.full((1, H, N), 256)
        landmarks, options = torch.arange(64).expand(1, H, 64), {}

    def forward(backend: str) -> torch.Tensor:
        return dsalt_attention(q, k, v, windows, landmarks, backend=backend, **options)

    def both(backend: str) -> Any:
        return torch.autograd.grad(forward(backend), leaves, d_out)

    def quiet(backend: str) -> torch.Tensor:
        with torch.no_grad():
            return forward(backend)

    kind = "soft windows, a list of landmarks per 128" if soft else "hard windows, one list"
    rows = []
    for what, run in (("forward", quiet), ("forward and backward", both)):
        calls = {name: lambda run=run, name=name: run(name) for name in ("native", "torch")}
        rows.append(row(f"{what}, N={N}, {kind}", calls, repeats))
    return rows


def band_row(N: int, density: float) -> dict[str, Any]:
    """A band alone, against compiled FlexAttention that is told the band, and dense attention."""
    w = round(N * density)
    q, k, v = (torch.randn(1, H, N, D) for _ in range(3))
    windows, none = torch.full((1, H, N), w), torch.full((1, H, 1), -1)
    inside = create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j <= w), None, None, N, N, device="cpu"
    )
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        ours = dsalt_attention(q, k, v, windows, none, backend="native")
        torch.testing.assert_close(ours, compiled(q, k, v, block_mask=inside))
        return row(
            f"forward, N={N}, a band of density {density}",
            {
                "native": lambda: dsalt_attention(q, k, v, windows, none, backend="native"),
                "torch": lambda: dsalt_attention(q, k, v, windows, none, backend="torch"),
                "FlexAttention": lambda: compiled(q, k, v, block_mask=inside),
                "dense SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            },
            21,
        )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [band_row(2048, 0.05)]
    for N, repeats in ((4096, 11), (16384, 5)):
        for soft in (True, False):
            rows += attention_rows(N, soft, repeats)
    written = {
        "processor": processor(),
        "instructions": native.instruction_set(),
        "torch": torch.__version__,
        "threads": 1,
        "shape": {"B": 1, "H": H, "D": D},
        "rows": rows,
    }
    json.dump(written, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
