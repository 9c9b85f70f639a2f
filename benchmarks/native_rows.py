"""diffmax on the native library beside torch.softmax: python -m benchmarks.native_rows [--quick].

It writes `results/native_rows.jsonl`: nanoseconds of CPU time a score, forward and backward, one
thread, medians, every call of a size interleaved in one process, one process for each instruction
set. Both sides are held to that set (`SHARED_KERNELS_INSTRUCTIONS`, `ATEN_CPU_CAPABILITY`). glibc
returns outputs of a few MB to the system at each free, and the page faults of the next call would
be timed: MALLOC_TOP_PAD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ keep them, for both
sides. A call of an op costs about 30 microseconds whatever its size; these half million scores take
softmax about half a millisecond. The path without the library takes longer than all others together
and empties their caches: it is timed apart. "share of memory floor" is the time of a copy of the
scores, divided by that of the forward pass.

The last row of a set has two threads beside one, in wall time, the best of many: a copy of the
scores, which is as much as the memory gives, rows, and products with a kernel matrix
(`shared_kernels.native.pairs`).
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffmax import diffmax_bisect
from shared_kernels import dispatch, native
from shared_kernels.native.pairs import Pairs

from . import clock, runner

HERE = Path(__file__).resolve().parent
TO = HERE / "results" / "native_rows.jsonl"
SHAPES = ((8192, 64), (1024, 512), (128, 4096), (8, 65536))
ALPHAS = (0.05, 0.3, 0.5, 0.85)


def gradient(weights: torch.Tensor, x: torch.Tensor, G: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(weights, x, G, retain_graph=True)


def calls(X: torch.Tensor, G: torch.Tensor, alpha: float) -> dict[str, Callable[[], Any]]:
    """What is timed; diffmax only after its weights were right."""
    x = X.clone().requires_grad_()
    copy = torch.empty_like(X)
    found = {
        "copy": lambda: copy.copy_(X),
        "softmax": lambda: torch.softmax(X, -1),
        "softmax backward": gradient(torch.softmax(x, -1), x, G),
    }
    exact = diffmax_bisect(X.double(), alpha, backend="reference")
    for backend in ("native", "torch"):
        y = diffmax_bisect(x, alpha, backend=backend)
        error = (y.detach() - exact).abs().max().item()
        if error > 3e-6 or dispatch.last("diffmax::bisect") != backend:
            raise SystemExit(f"{backend} at alpha={alpha} errs by {error}: it is not timed")
        found[backend] = lambda b=backend: diffmax_bisect(X, alpha, backend=b)
        found[f"{backend} backward"] = gradient(y, x, G)
    return found


def measure(rounds: int) -> None:
    """The rows of this process's instruction set, as lines of JSON."""
    torch.set_num_threads(1)
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(shape[1])
        X, G = (torch.randn(*shape, generator=generator) for _ in range(2))
        for alpha in ALPHAS:
            timed = calls(X, G, alpha)
            slow = {name: timed.pop(name) for name in ("torch", "torch backward")}
            seconds = {**medians(timed, rounds), **medians(slow, 3)}
            ns = {name: round(t * 1e9 / X.numel(), 3) for name, t in seconds.items()}
            row = {
                "set": native.instruction_set(),
                "torch_set": torch.backends.cpu.get_cpu_capability(),
                "shape": shape,
                "alpha": alpha,
                "ns": ns,
                "forward": round(ns["native"] / ns["softmax"], 2),
                "backward": round(ns["native backward"] / ns["softmax backward"], 2),
                "before": round(ns["torch"] / ns["softmax"], 2),
                "share of memory floor": round(ns["copy"] / ns["native"], 2),
            }
            print(json.dumps(row), flush=True)
    print(json.dumps({"set": native.instruction_set(), "two threads": two_threads(rounds)}))


def work(row: dict[str, Any]) -> dict[str, tuple[float, int, int]]:
    """Seconds, operations and bytes of each pass of a row, for `roofline`.

    Of every score, forward: its maximum, one multiply-add, the power 2 of alpha = 0.5 as a product,
    its sum and the division; other powers are not counted, as few scores have one. Backward: the
    escort, two sums of a product and a product with a difference. Bytes: scores in and weights out;
    weights and their gradients in, gradients out.
    """
    if "shape" not in row:
        return {}
    n = math.prod(row["shape"])
    forward, backward = (row["ns"][name] * n * 1e-9 for name in ("native", "native backward"))
    return {"forward": (forward, 6 * n, 8 * n), "backward": (backward, 7 * n, 12 * n)}


def medians(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of each call, all of them interleaved."""
    seen: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            call()  # nobody pays for the cache that the one before left behind
            start = time.process_time()
            call()
            seen[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in seen.items()}


def two_threads(rounds: int) -> dict[str, float]:
    """How many times faster than one thread, of each kind of work."""
    X, points, V = torch.randn(4096, 2048), torch.randn(8192, 3), torch.randn(8192, 8)
    matrix = Pairs(points, rate=-1.0)
    copy = torch.empty_like(X)
    work = {
        "copy": lambda: copy.copy_(X),
        "rows, alpha=0.5": lambda: diffmax_bisect(X, 0.5, backend="native"),
        "rows, alpha=0.85": lambda: diffmax_bisect(X, 0.85, backend="native"),
        "pairs": lambda: matrix.times(V),
    }
    best: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for name, call in work.items():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                start = time.perf_counter()
                call()
                taken = time.perf_counter() - start
                best[name, threads] = min(taken, best.get((name, threads), taken))
    torch.set_num_threads(1)
    return {name: round(best[name, 1] / best[name, 2], 2) for name in work}


def is_repeated(row: dict[str, Any]) -> bool:
    """Whether the row times again, beside products in AVX2, what another row of its set has."""
    return row["matrix_set"].lower() != row["set"]


def collect(
    module: str, to: Path, arguments: list[str], rounds: int = 21, also_beside_avx2: bool = False
) -> list[str]:
    """Lines of JSON of `module --child ROUNDS` in each instruction set; written unless --quick.

    torch's matrix library takes its AVX2 path on AMD's processors, whatever they have. With
    `also_beside_avx2`, one process more holds that library alone to AVX2 (`matrix_set` of a row):
    its ratios are those of a processor of that kind.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    origin = {
        "command": f"python -m {module}",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": f"{runner.processor()}, one thread",
        "commit": commit.stdout.strip() or "unknown",
    }
    lines, times = [], "3" if "--quick" in arguments else str(rounds)
    names = [s for s in reversed(native.instruction_sets()) if s != "base"]
    pairs = [(name, name.upper()) for name in names]
    if also_beside_avx2 and "avx512" in names:
        pairs.append(("avx512", "AVX2"))
    for name, matrix_set in pairs:
        sets = {"SHARED_KERNELS_INSTRUCTIONS": name, "ATEN_CPU_CAPABILITY": name}
        sets["MKL_ENABLE_INSTRUCTIONS"] = origin["matrix_set"] = matrix_set
        if name == "avx2":
            sets["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        done = subprocess.run(
            [sys.executable, "-m", module, "--child", times],
            env={**os.environ, **clock.MALLOC, **sets, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines += [json.dumps({**json.loads(x), **origin}) for x in done.stdout.splitlines()]
    if "--quick" not in arguments:
        to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def main(arguments: list[str]) -> int:
    if "--child" in arguments:
        measure(int(arguments[-1]))
        return 0
    for line in collect("benchmarks.native_rows", TO, arguments):
        row = json.loads(line)
        keys = ("set", "shape", "alpha", "forward", "backward", "two threads")
        print(*(row[key] for key in keys if key in row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
