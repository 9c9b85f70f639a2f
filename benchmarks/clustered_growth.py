"""How the time of exact attention grows with N where keys are clustered.

`python -m benchmarks.clustered_growth` renews the results.

Native attention, causal, of the inputs "clustered" of cases/native_attention.py; one thread, CPU
time, the median of three. The exponent is the slope of log time against log N.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from adasplash import adasplash
from shared_kernels import native

from .cases.native_attention import inputs
from .report import exponent

SIZES = [4096, 16384, 65536]
RESULTS = Path(__file__).parent / "results" / "clustered_growth.jsonl"


def seconds(N: int, backward: bool) -> float:
    qkv, options = inputs("clustered", N, backward)

    def once() -> float:
        start = time.process_time()
        out = adasplash(*qkv, **options, backend="native")
        if backward:
            torch.autograd.grad(out.sum(), qkv)
        return time.process_time() - start

    return statistics.median(once() for _ in range(3))


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for backward in (False, True):
        times = [seconds(N, backward) for N in SIZES]
        rows.append(
            {
                "pass": "forward+backward" if backward else "forward",
                "instructions": native.instruction_set(),
                "N": SIZES,
                "seconds": times,
                "exponent": exponent(SIZES, times),
            }
        )
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(RESULTS.read_text("utf-8"))


if __name__ == "__main__":
    main()
