"""A Schroedinger bridge of N = M = 20 000 points: memory, time, marginals.

    python packages/flashdiffusion/results/bridge.py --out packages/flashdiffusion/results

Memory is counted by the allocator, the most held at once beyond the two point sets.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flashdiffusion import __version__, schroedinger_bridge
from shared_kernels.testing import measure_memory


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20000)
    parser.add_argument("--epsilon", type=float, default=0.3, help="of the median cost")
    parser.add_argument("--out", type=Path, default=None, help="folder of bridge.json")
    given = parser.parse_args(argv)
    N = given.points
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, 3)).astype(np.float32)
    Y = (rng.random((N, 3)) * 2.0).astype(np.float32)
    median = float(np.median(((X[:2000, None] - Y[None, :2000]) ** 2).sum(-1)))
    found = []
    started = time.perf_counter()
    memory = measure_memory(
        lambda: found.append(schroedinger_bridge(X, Y, beta=1.0 / (given.epsilon * median)))
    )
    (bridge,) = found
    seconds = time.perf_counter() - started
    rows = bridge.apply(np.ones(N, dtype=np.float32))
    columns = bridge.apply_transpose(np.ones(N, dtype=np.float32))
    result = {
        "points": [N, N],
        "epsilon of the median cost": given.epsilon,
        "iterations": bridge.n_iter,
        "marginal error": bridge.marginal_error,
        "marginal error of the applied plan": [
            float(np.abs(rows.astype(float) - 1 / N).sum()),
            float(np.abs(columns.astype(float) - 1 / N).sum()),
        ],
        "memory, MB": memory.peak / 1e6,
        "largest buffer, MB": memory.largest / 1e6,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "date": str(datetime.date.today()),
        "versions": {"flashdiffusion": __version__, "torch": torch.__version__},
    }
    if given.out is not None:
        (given.out / "bridge.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(), indent=1) + "\n")
