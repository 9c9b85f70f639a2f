"""CPU time of the diffusion modes, relative to a plain Hopfield layer of the same size."""

from __future__ import annotations

import statistics
import time

import torch

from ..diffused_attention import DiffusedHopfield
from ..hopfield import Hopfield
from .report import Result, command, spread

MODES = ("factored", "simple", "iterative", "ppr", "heat", "spectral")
ROUNDS = 7


def _ratios(B: int, N: int, seed: int) -> list[float]:
    """Median time of each layer over that of Hopfield, layers interleaved."""
    x = torch.randn(B, N, 128, generator=torch.Generator().manual_seed(seed))
    layers: list[Hopfield] = [Hopfield(128, num_heads=4)]
    layers += [DiffusedHopfield(128, num_heads=4, diffusion_mode=mode) for mode in MODES]
    layers.append(DiffusedHopfield(128, num_heads=4, cache_graph=False))
    times: list[list[float]] = [[] for _ in layers]
    with torch.no_grad():
        for layer in layers:
            layer(x)
        for _ in range(ROUNDS):
            for layer, spent in zip(layers, times, strict=True):
                start = time.process_time()
                layer(x)
                spent.append(time.process_time() - start)
    plain, *others = (statistics.median(t) for t in times)
    return [seconds / plain for seconds in others]


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    sizes = ((2, 128),) if quick else ((8, 128), (2, 512), (2, 1024))
    torch.set_num_threads(1)
    rows = [[name] for name in (*MODES, "factored, graph built each time")]
    for B, N in sizes:
        measured = [_ratios(B, N, seed) for seed in seeds]
        for row, ratios in zip(rows, zip(*measured, strict=True), strict=True):
            row.append(spread(ratios))
    return [
        Result(
            f"CPU time relative to Hopfield, {data}",
            ["mode", *(f"B={B} N={N}" for B, N in sizes)],
            rows,
            f"One thread, CPU time, medians of {ROUNDS} interleaved rounds, {len(seeds)} seeds; "
            "size 128, 4 heads, 3 diffusion steps; the graph is cached except in the last row.",
            levels=False,
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("benchmark", run, argv, data=("random patterns",))


if __name__ == "__main__":
    raise SystemExit(main())
