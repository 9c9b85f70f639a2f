"""One process against two, and the plan against what was measured: one thread per process.

    python packages/flashdiffusion/results/scaling.py --out packages/flashdiffusion/results

Runs of one and of two processes take turns; the ratios are those of the medians. Wall time asks
for two idle cores; where other work shares them, CPU seconds tell how the work divides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flashdiffusion import DiffusionMap, __version__, plan


def roll(N: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(N))
    X = np.stack((t * np.cos(t), 21 * rng.random(N), t * np.sin(t)), 1)
    return ((X - X.mean(0)) / X.std()).astype(np.float32)


def gauss(N: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, 50)).astype(np.float32)


# name -> (points, beta)
SETS = {"swiss roll, beta 1": (roll, 1.0), "swiss roll, beta 20": (roll, 20.0),
        "50-D normal": (gauss, 0.01)}  # fmt: skip


def fitted(name: str, N: int, group: str | None = None) -> dict:
    make, beta = SETS[name]
    X = make(N)
    if group is not None:
        dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    dm = DiffusionMap(beta, n_components=8, group=group).fit(X)
    return {
        "seconds": time.perf_counter() - start,
        "cpu seconds": time.process_time() - cpu,
        "passes": dm.n_passes_,
        "eigenvalues": dm.eigenvalues_.tolist(),
    }


def process(rank: int, size: int, store: str, name: str, N: int, runs: int, out: str) -> None:
    torch.set_num_threads(1)
    group = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        group = "world"
    found = [fitted(name, N, group) for _ in range(runs)]
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def job(size: int, name: str, N: int, runs: int = 1) -> list[dict]:
    """`runs` fits in `size` fresh processes, as rank 0 saw them."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, f"{folder}/store", name, N, runs, f"{folder}/out")
        workers = [context.Process(target=process, args=(r, *arguments)) for r in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return json.loads(Path(folder, "out").read_text())


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=("scaling", "plan"), default="scaling")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of scaling.json or plan.json"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    N = given.points
    result: dict = {"points": N, "components": 8, "threads per process": 1}
    if given.part == "scaling":
        name = "swiss roll, beta 1"
        times: dict[int, list[float]] = {1: [], 2: []}
        cpu: dict[int, list[float]] = {1: [], 2: []}
        values = {}
        for _ in range(given.repeats):
            for size in times:
                (found,) = job(size, name, N)
                times[size].append(found["seconds"])
                cpu[size].append(found["cpu seconds"])
                values[size] = found["eigenvalues"]
        medians = {size: statistics.median(t) for size, t in times.items()}
        work = {size: statistics.median(t) for size, t in cpu.items()}
        result |= {
            "set": name, "passes": found["passes"], "seconds": times, "medians": medians,
            "speedup of two processes": medians[1] / medians[2],
            "cpu seconds of rank 0": cpu,
            "cpu seconds of one over those of rank 0": work[1] / work[2],
            "load": os.getloadavg()[0],
            "largest difference of eigenvalues": float(
                np.abs(np.subtract(values[1], values[2])).max()
            ),
        }  # fmt: skip
    else:
        result["sets"] = {}
        for name, (make, beta) in SETS.items():
            X = make(N)
            blind = plan(N, X.shape[1])
            counted = plan(N, X.shape[1], points=X, beta=beta)
            found = fitted(name, N)
            result["sets"][name] = {
                "seconds": found["seconds"], "passes": found["passes"],
                "predicted, 14 sweeps": blind.seconds, "predicted": counted.seconds,
                "sweeps counted on a sample": counted.sweeps,
                "ratio": found["seconds"] / counted.seconds,
                "entries per second": counted.entries_per_second,
            }  # fmt: skip
    result |= {
        "date": str(datetime.date.today()), "machine": platform.machine(),
        "versions": {"flashdiffusion": __version__, "torch": torch.__version__},
    }  # fmt: skip
    if given.out is not None:
        (given.out / f"{given.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(), indent=1) + "\n")
