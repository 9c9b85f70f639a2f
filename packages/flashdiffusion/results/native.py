"""Products and a fit by the native library and by tiled torch: CPU seconds of one thread.

    python packages/flashdiffusion/results/native.py > packages/flashdiffusion/results/native.json

Both run in turn in one process. `SHARED_KERNELS_INSTRUCTIONS=avx2` asks for the narrower vectors.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

from flashdiffusion import DiffusionMap, FlashDiffusion
from flashdiffusion._operator import Kernel
from flashdiffusion._problem import Problem
from shared_kernels import native


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median CPU seconds of each call, all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: median(times) for name, times in found.items()}


def row(name: str, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    found = seconds(calls, repeats)
    return {
        "row": name,
        "milliseconds": {key: round(1e3 * value, 2) for key, value in found.items()},
        "torch_over_native": round(found["torch"] / found["native"], 2),
    }


def swiss_roll(N: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(N))
    X = np.stack((t * np.cos(t), 21 * rng.random(N), t * np.sin(t)), 1)
    return ((X - X.mean(0)) / X.std()).astype(np.float32)


def fit(X: np.ndarray, backend: str) -> DiffusionMap:
    def switched_off() -> str:
        return "this measurement is of the torch backend"

    chosen = switched_off if backend == "torch" else native.why_not
    with mock.patch.object(native, "why_not", chosen):
        return DiffusionMap(beta=20.0, n_components=8).fit(X)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    rows = []
    for N, d, score in ((8192, 3, "sqeuclidean"), (8192, 16, "sqeuclidean"), (8192, 3, "l1")):
        X = torch.randn(N, d)
        kernels = {
            name: Kernel(Problem(X, None, 1.0 / d, score), backend=name)
            for name in ("torch", "native")
        }
        for r in (1, 8):
            V = torch.randn(N, r)
            calls = {name: lambda k=k, V=V: k.matvec(V) for name, k in kernels.items()}
            rows.append(row(f"product alone, {score}, N={N} d={d} r={r}", calls, 21))
    X = torch.randn(8192, 3)
    for r in (1, 8):
        V = torch.randn(8192, r)
        calls = {
            name: lambda V=V, name=name: FlashDiffusion(X, X, V, normalize="none", backend=name)
            for name in ("torch", "native")
        }
        rows.append(row(f"FlashDiffusion, N=8192 d=3 r={r}", calls, 21))
    for N, repeats in ((6000, 7), (20000, 5)):
        points = swiss_roll(N)
        fits = {name: lambda p=points, name=name: fit(p, name) for name in ("torch", "native")}
        rows.append(row(f"DiffusionMap.fit, swiss roll N={N}", fits, repeats))
    written = {
        "processor": processor(),
        "instructions": native.instruction_set(),
        "torch": torch.__version__,
        "threads": 1,
        "rows": rows,
    }
    json.dump(written, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
