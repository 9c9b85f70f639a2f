"""Hopfield layers with updates on the native library: python -m benchmarks.native_association.

Four associations of a layer (`update_steps_max=3`) beside LayerNorm, projections and one call of
PyTorch's attention, and beside the same layer without the library. It writes
`results/native_association.jsonl`: milliseconds of CPU time without gradient,
and of forward and backward pass together, one thread, medians, all calls of a size interleaved in
one process, one process for each instruction set and one more (`native_rows.collect`); how memory
is kept is said in `native_rows`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from difflayers import Hopfield
from shared_kernels import native
from shared_kernels.testing import assert_close

from .cases.difflayers import SIZES, _by_hand, _dense
from .clock import without_library
from .native_rows import HERE, collect, is_repeated

TO = HERE / "results" / "native_association.jsonl"
UPDATES = 3


def calls(B: int, L: int, S: int, d: int, H: int) -> dict[str, Callable[[], Any]]:
    """What is timed; the layer only after its result was right."""
    torch.manual_seed(0)
    layer = Hopfield(d, num_heads=H, update_steps_max=UPDATES).eval()
    triple = tuple(torch.randn(B, n, d) for n in (S, L, S))
    once = _by_hand(layer, F.scaled_dot_product_attention, lambda x: x)
    with torch.no_grad():
        exact = _by_hand(layer, _dense(UPDATES), lambda x: x)(*(x.double() for x in triple))
        assert_close(layer(triple), exact)

    def training(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(
            call().sum(), list(layer.parameters()), allow_unused=True
        )

    def quiet(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    made = {"once": lambda: once(*triple), "native": lambda: layer(triple)}
    made["before"] = without_library(made["native"])
    both = {f"{name}, both ways": training(call) for name, call in made.items()}
    both["before, both ways"] = without_library(training(made["native"]))
    return {**{name: quiet(call) for name, call in made.items()}, **both}


def work(row: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Seconds, operations and bytes of each pass of a row, for `roofline`.

    Operations: two products of each association, five more backward; four projections, whose
    backward pass is twice the forward one. Bytes: three inputs, the output and the weights of the
    projections; backward the same again, and the gradients of the weights.
    """
    if is_repeated(row):
        return {}
    B, L, S, d, _ = row["size"].values()
    products = (
        (row["update_steps_max"] + 1) * 2 * B * L * S * d
    )  # operations of one product of each
    projections = 2 * B * (2 * L + 2 * S) * d * d
    patterns, weights = 4 * B * (2 * L + 2 * S) * d, 4 * 4 * d * d
    ms = row["ms"]
    forward = (ms["native"] / 1e3, 2 * products + projections, patterns + weights)
    both = 7 * products + 3 * projections
    return {
        "forward": forward,
        "forward+backward": (ms["native, both ways"] / 1e3, both, 2 * patterns + 3 * weights),
    }


def measure(rounds: int) -> None:
    """The rows of this process's instruction set, as lines of JSON."""
    torch.set_num_threads(1)
    for size in SIZES:
        seen: dict[str, list[float]] = {}
        timed = calls(*size)
        for _ in range(rounds):
            for name, call in timed.items():
                call()  # nobody pays for the cache that the one before left behind
                start = time.process_time()
                call()
                seen.setdefault(name, []).append(time.process_time() - start)
        ms = {name: round(statistics.median(t) * 1e3, 3) for name, t in seen.items()}
        row = {
            "set": native.instruction_set(),
            "torch_set": torch.backends.cpu.get_cpu_capability(),
            "size": dict(zip(("B", "L", "S", "d", "H"), size, strict=True)),
            "update_steps_max": UPDATES,
            "ms": ms,
            "forward": round(ms["native"] / ms["once"], 2),
            "forward before": round(ms["before"] / ms["once"], 2),
            "both ways": round(ms["native, both ways"] / ms["once, both ways"], 2),
            "both ways before": round(ms["before, both ways"] / ms["once, both ways"], 2),
        }
        print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> int:
    if "--child" in arguments:
        measure(int(arguments[-1]))
        return 0
    for line in collect("benchmarks.native_association", TO, arguments, also_beside_avx2=True):
        row = json.loads(line)
        print(*(row[key] for key in ("set", "size", "forward", "both ways")), row["ms"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
