"""dsalt's attention on the native library beside PyTorch's path: python -m benchmarks.native_band.

Forward and backward pass together, and forward alone, at 4096 and 16 384 tokens. It writes
`results/native_band.jsonl`: milliseconds of CPU time, one thread, medians, both calls of a size
interleaved in one process, one process for each instruction set, to which both sides are held; how
memory is kept is said in `native_rows`. The goal for both passes is half of PyTorch's path.
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

from dsalt.kernels import dsalt_attention
from shared_kernels import dispatch, native
from shared_kernels.testing import assert_close

from .cases.dsalt import D, H, K, W, _inputs
from .native_rows import HERE, collect

TO = HERE / "results" / "native_band.jsonl"
SIZES = (4096, 16384)
GOAL = 0.5
# products of a query with a key that a pair takes: scores and values, and five more backward
PRODUCTS = {"forward": 2, "forward+backward": 7}


def _run(backend: str, backward: bool, qkv: list[torch.Tensor], *rest: torch.Tensor) -> Any:
    with torch.set_grad_enabled(backward):
        out = dsalt_attention(*qkv, *rest, backend=backend)
        found = torch.autograd.grad(out.sum(), qkv) if backward else out
    if dispatch.last("dsalt::attention") != backend:
        raise SystemExit(f"{backend} did not run: it is not timed")
    return found


def work(row: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Seconds, operations and bytes of a row's pass, for `roofline`.

    Operations: products of each query with the keys of its window (all but the first queries have
    a whole one) and with its landmarks. Bytes: q, k, v and o; backward reads them and the gradient
    of o, and writes three.
    """
    N, part = row["N"], row["pass"]
    pairs = N * W - W * (W - 1) // 2 + N * K
    size = 4 * H * N * D * (12 if part == "forward+backward" else 4)
    return {part: (row["ms"]["native"] / 1e3, PRODUCTS[part] * 2 * D * H * pairs, size)}


def measure(rounds: int) -> None:
    """The rows of this process's instruction set, as lines of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = _inputs(512, torch.device("cpu"), False)
    wide = [x.detach().double().requires_grad_() for x in small[0]]
    exact = _run("reference", True, wide, *small[1:])
    for found, right in zip(_run("native", True, small[0], *small[1:]), exact, strict=True):
        assert_close(found, right, "gradient")
    for N in SIZES:
        inputs = _inputs(N, torch.device("cpu"), False)
        for part in PRODUCTS:
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(_run, name, part != "forward", inputs[0], *inputs[1:])
                for name in ("native", "torch")
            }
            seen: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(min(rounds, 7) + 1):
                for name, call in calls.items():
                    start = time.process_time()
                    call()
                    seen[name].append(time.process_time() - start)
            ms = {name: round(statistics.median(t[1:]) * 1e3, 2) for name, t in seen.items()}
            row = {
                "set": native.instruction_set(),
                "torch_set": torch.backends.cpu.get_cpu_capability(),
                "size": f"B1 H{H} D{D} w={W} K={K}",
                "N": N,
                "pass": part,
                "ms": ms,
                "ratio": round(ms["native"] / ms["torch"], 3),
            }
            print(json.dumps(row | ({"goal": GOAL} if part != "forward" else {})), flush=True)


def main(arguments: list[str]) -> int:
    if "--child" in arguments:
        measure(int(arguments[-1]))
        return 0
    for line in collect("benchmarks.native_band", TO, arguments):
        row = json.loads(line)
        print(*(row[key] for key in ("set", "N", "pass", "ratio")), row["ms"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
