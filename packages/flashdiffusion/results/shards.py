"""Memory of a fit whose points are split over processes, beside one process: shards.json.

python results/shards.py [N d processes]

Points lie along a curve in d dimensions, in a file that each process maps; float32, 8 components,
and a bandwidth at which most pairs of tiles are left out. The solve ends after `PASSES` product of
a block: later ones take as much, but for the columns of the basis that they fill, of which a
process has its rows in both kinds of fit.
"""

import json
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PASSES = 1


def written(path, N, d):
    """The points, a block of rows at a time."""
    rng = np.random.default_rng(0)
    waves = rng.integers(1, 4, d), rng.uniform(0.0, 2.0 * np.pi, d)
    X = np.lib.format.open_memmap(path, "w+", np.float32, (N, d))
    for start in range(0, N, 2**14):
        angle = rng.uniform(0.0, 2.0 * np.pi, (len(X[start : start + 2**14]), 1))
        noise = 0.02 * rng.standard_normal((len(angle), d))
        X[start : start + 2**14] = np.cos(waves[0] * angle + waves[1]) + noise
    X.flush()


def memory(name):
    """Bytes by a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def fitted(path, folder, rank, size):
    """The most memory of a fit, and what the process held before it."""
    import torch
    import torch.distributed as dist

    from flashdiffusion import DiffusionMap, _solve

    torch.set_num_threads(1)
    options = {}
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
        options = {"group": "world", "shard_points": True}
    _solve._MAX_PASSES = PASSES
    X = np.load(path, mmap_mode="r")
    width = -(-len(X) // size)
    X = X[rank * width : (rank + 1) * width]
    # a first small fit loads what loads at first use
    DiffusionMap(200.0, n_components=8, solver="krylov", **options).fit(np.array(X[:700]))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dm = DiffusionMap(200.0, n_components=8, **options).fit(X)
    found = {
        "before": before,
        "most": memory("VmHWM"),
        "passes": dm.n_passes_,
        "eigenvalues": dm.eigenvalues_.tolist(),
    }
    Path(folder, f"{size}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if size > 1:
        dist.destroy_process_group()


def measured(path, folder, size):
    # spawned: a forked process would begin with the memory of this one
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=fitted, args=(path, folder, rank, size)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [json.loads(Path(folder, f"{size}-{r}.json").read_text("utf-8")) for r in range(size)]


def main():
    N, d, size = (int(a) for a in sys.argv[1:4]) if len(sys.argv) > 1 else (400_000, 50, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/points.npy"
        written(path, N, d)
        (one,), ranks = measured(path, folder, 1), measured(path, folder, size)
    largest = max(ranks, key=lambda r: r["most"] - r["before"])
    found = {
        "N": N,
        "d": d,
        "processes": size,
        "products": PASSES + 3,
        "one process": one,
        "largest of the processes": largest,
        "fit, of one process's": (largest["most"] - largest["before"])
        / (one["most"] - one["before"]),
        "whole process, of one process's": largest["most"] / one["most"],
        "eigenvalues differ by": max(
            abs(a - b) for a, b in zip(one["eigenvalues"], largest["eigenvalues"], strict=True)
        ),
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    (HERE / "shards.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
