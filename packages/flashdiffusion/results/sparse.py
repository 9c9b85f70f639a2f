"""Sparse kernels beside scipy's eigsh as scanpy calls it: one JSON line.

python sparse.py WHAT N [ROUNDS]

WHAT is one of

- roll, tree: the same graph (15 neighbours, self-tuning) to both, alpha = 1, 15 pairs beside the
  trivial one, interleaved in one process, CPU seconds of one thread. roll is a swiss roll (a k-d
  tree searches), tree eight branches in 50 dimensions with noise (the exact tiled search).
- large: the roll with N points, ours alone: seconds of search and solve, peak memory. A new process
  for each row.

eigsh gets what sc.tl.diffmap of scanpy 1.11.5 gives it: the float64 matrix, which="LM", tol = 0
(machine precision), a random start.
"""

import importlib.metadata
import json
import platform
import resource
import sys
import time

import numpy as np
from scipy.sparse.linalg import eigsh

NEIGHBOURS, PAIRS, TOL = 15, 15, 1e-6


def points(what, N):
    rng = np.random.default_rng(0)
    if what == "tree":
        ends = rng.standard_normal((8, 50)) * np.linspace(3.0, 0.3, 50)
        along = rng.random(N)[:, None] * ends[rng.integers(8, size=N)]
        return along + rng.standard_normal((N, 50)) * np.linspace(0.5, 0.05, 50)
    t = 1.5 * np.pi * (1.0 + 2.0 * rng.random(N))
    return np.stack((t * np.cos(t), 21.0 * rng.random(N), t * np.sin(t)), 1)


def fit_graph(what, N):
    from flashdiffusion import DiffusionMap

    search = "exact" if what == "tree" else "tree"
    dm = DiffusionMap(
        beta="self-tuning", neighbors=NEIGHBOURS, search=search, n_components=PAIRS, alpha=1.0
    )
    start = time.process_time()
    dm.fit(points(what, N))
    return dm, time.process_time() - start


def versions():
    names = ("torch", "numpy", "scipy", "scikit-learn")
    found = {name: importlib.metadata.version(name) for name in names}
    return {**found, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def beside(what, N, rounds=2):
    from flashdiffusion import DiffusionMap
    from flashdiffusion._filter import symmetric_form

    dm, both = fit_graph(what, N)
    graph = dm.affinity_
    M = symmetric_form(graph, np.sqrt(dm.weights_ / dm.row_sums_)).astype(np.float64)
    ours, theirs = [], []
    for seed in range(rounds):
        start = time.process_time()
        ours_dm = DiffusionMap(
            affinity="precomputed", alpha=1.0, n_components=PAIRS, random_state=seed
        ).fit(graph)
        ours.append(time.process_time() - start)
        v0 = np.random.RandomState(seed).standard_normal(N)
        start = time.process_time()
        values, vectors = eigsh(M, k=PAIRS + 1, which="LM", ncv=None, v0=v0)
        theirs.append(time.process_time() - start)
    values = values[::-1][1:]
    return {
        "what": what,
        "N": N,
        "nnz": int(graph.nnz),
        "pairs": PAIRS,
        "ours_cpu_seconds": ours,
        "eigsh_cpu_seconds": theirs,
        "ratio": float(np.median(np.array(theirs) / np.array(ours))),
        "residual": float(ours_dm.residuals_.max()),
        "converged": bool(ours_dm.converged_),
        "largest_difference_of_eigenvalues": float(np.abs(values - ours_dm.eigenvalues_).max()),
        "products": ours_dm.n_passes_,
        "fit_with_search_cpu_seconds": both,
        **versions(),
    }


def large(N):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    dm, seconds = fit_graph("roll", N)
    return {
        "what": "large",
        "N": N,
        "nnz": int(dm.affinity_.nnz),
        "pairs": PAIRS,
        "cpu_seconds": seconds,
        "wall_seconds": time.perf_counter() - start,
        "peak_mb_above_start": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
        "residual": float(dm.residuals_.max()),
        "converged": bool(dm.converged_),
        "products": dm.n_passes_,
        "first": float(dm.eigenvalues_[0]),
        **versions(),
    }


if __name__ == "__main__":
    what, N = sys.argv[1], int(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    sys.stdout.write(json.dumps(large(N) if what == "large" else beside(what, N, rounds)) + "\n")
