"""CPU time of the diffusion modes, relative to a plain Hopfield layer of the same size."""

from __future__ import annotations

import statistics
import time

import torch

from ..diffused_attention import DiffusedHopfield
from ..hopfield import Hopfield
from .report import Result, command

MODES = ("factored", "simple", "iterative", "ppr", "heat", "spectral")


def run(seeds: list[int], quick: bool) -> Result:
    sizes = ((2, 128),) if quick else ((8, 128), (2, 512), (2, 1024))
    torch.set_num_threads(1)
    names = [*MODES, "factored, graph built each time"]
    rows = [[name] for name in names]
    for B, N in sizes:
        x = torch.randn(B, N, 128)
        layers: list[Hopfield] = [Hopfield(128, num_heads=4)]
        layers += [DiffusedHopfield(128, num_heads=4, diffusion_mode=mode) for mode in MODES]
        layers.append(DiffusedHopfield(128, num_heads=4, cache_graph=False))
        times: list[list[float]] = [[] for _ in layers]
        with torch.no_grad():
            for layer in layers:
                layer(x)
            for _ in range(max(5, 3 * len(seeds))):
                for layer, spent in zip(layers, times, strict=True):
                    start = time.process_time()
                    layer(x)
                    spent.append(time.process_time() - start)
        plain, *others = (statistics.median(t) for t in times)
        for row, seconds in zip(rows, others, strict=True):
            row.append(f"{seconds / plain:.2f}")
    return Result(
        "CPU time relative to Hopfield",
        ["mode", *(f"B={B} N={N}" for B, N in sizes)],
        rows,
        "One thread, CPU time, medians, layers interleaved; size 128, 4 heads, 3 diffusion steps; "
        "the graph is cached except in the last row.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("benchmark", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
