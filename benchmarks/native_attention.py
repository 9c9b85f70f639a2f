"""Native entmax attention beside SDPA and products: python -m benchmarks.native_attention.

It writes `results/native_attention.jsonl`: CPU time of one thread, medians, both calls of a size
interleaved in one process, one process for each instruction set, to which both sides are held, and
one in which torch's matrix library alone is held to AVX2 (`native_rows.collect`). Freed memory is
kept for both. The inputs are those of cases/native_attention.py, whose gate compares with float64.

A row says what share of the rate of a square product (`gflops`, of `torch.mm`) SDPA reaches, and
`floor`: the ratio to SDPA that a method would have which computes all visible scores at that rate
and nothing else (of dense support: all its products). Where the floor lies above a goal, the goal
cannot be reached on this processor but by leaving scores out. The rate is the matrix library's.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from adasplash import adasplash
from shared_kernels import native
from shared_kernels.native import library

from .cases.native_attention import GOALS, GOALS_AVX2, D, H, _run, inputs
from .native_rows import HERE, collect, is_repeated

TO = HERE / "results" / "native_attention.jsonl"
SIZES = (1024, 2048, 4096)
# products of N x N x D that dense attention is made of: forward, forward and backward
PRODUCTS = (2, 7)


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def product_rate(n: int = 1024) -> float:
    """Operations per second of the matrix library, the best of twenty."""
    a, b = torch.randn(2, n, n)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(20))


def work(row: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Seconds, operations and bytes of a row's pass, for `roofline`.

    Operations are those of dense attention over the visible pairs: two products forward, five more
    backward. Bytes: q, k, v and o; backward reads them and the gradient of o, and writes three.
    """
    if is_repeated(row):
        return {}
    backward, N = row["pass"] != "forward", row["N"]
    operations = PRODUCTS[backward] * D * H * N * (N + 1)
    size = (12 if backward else 4) * 4 * H * N * D
    return {row["pass"]: (row["seconds"][0], operations, size)}


def measure(rounds: int) -> None:
    """The rows of this process's instruction set, as lines of JSON."""
    torch.set_num_threads(1)
    rate = product_rate()
    for kind, goals in (GOALS_AVX2 if native.instruction_set() == "avx2" else GOALS).items():
        for backward in (False, True):
            for N in SIZES:
                qkv, options = inputs(kind, N, backward)
                attend = functools.partial(adasplash, **options, backend="native")
                sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
                calls = [functools.partial(_run, f, qkv, backward) for f in (attend, sdpa)]
                seen: list[list[float]] = [[], []]
                for _ in range(rounds + 1):
                    for times, call in zip(seen, calls, strict=True):
                        times.append(seconds(call))
                ours, theirs = (statistics.median(times[1:]) for times in seen)
                product = H * N * (N + 1) * D / rate  # of all visible pairs, in seconds
                needed = PRODUCTS[backward] if kind == "flat" else 1
                row = {
                    "set": native.instruction_set(),
                    "multiplies_bytes": library.multiplies_bytes(),
                    "kind": kind,
                    "pass": "forward+backward" if backward else "forward",
                    "N": N,
                    "seconds": [round(ours, 6), round(theirs, 6)],
                    "ratio": round(ours / theirs, 3),
                    "goal": goals[backward],
                    "floor": round(needed * product / theirs, 3),
                    "gflops": round(rate / 1e9, 1),
                    "sdpa_share": round(PRODUCTS[backward] * product / theirs, 3),
                }
                print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> int:
    if "--child" in arguments:
        measure(int(arguments[-1]))
        return 0
    collect("benchmarks.native_attention", TO, arguments, rounds=5, also_beside_avx2=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
