"""500 000 frames on the Mueller-Brown surface: slow coordinate, timescale and committor, measured.

    python packages/flashdiffusion/results/muller_brown.py --out packages/flashdiffusion/results

Overdamped Langevin motion, one frame in `STRIDE` steps. What is right comes from elsewhere: the
generator of the same motion on a grid (finite volumes), its slowest eigenfunction and committor.
The map is fitted on landmarks chosen at random from all frames and extended to every frame.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse.linalg import eigsh, spsolve
from scipy.stats import spearmanr

from flashdiffusion import FlashDiffusion, __version__, committor, slow_manifold

KT, STEP, STRIDE = 20.0, 5e-5, 20
A, B, RADIUS = (-0.558, 1.442), (0.623, 0.028), 0.15
TERMS = (
    (-200.0, -1.0, 0.0, -10.0, 1.0, 0.0),
    (-100.0, -1.0, 0.0, -10.0, 0.0, 0.5),
    (-170.0, -6.5, 11.0, -6.5, -0.5, 1.5),
    (15.0, 0.7, 0.6, 0.7, -1.0, 1.0),
)


def potential(x, y):
    return sum(
        h * np.exp(a * (x - u) ** 2 + b * (x - u) * (y - v) + c * (y - v) ** 2)
        for h, a, b, c, u, v in TERMS
    )


def simulate(n_frames: int, seed: int = 0) -> np.ndarray:
    """(n_frames, 1, 3) positions; the third coordinate is 0."""
    normal, exp = random.Random(seed).gauss, math.exp
    x, y = A
    kick = math.sqrt(2.0 * KT * STEP)
    frames = np.zeros((n_frames, 1, 3))
    for frame in range(n_frames):
        for _ in range(STRIDE):
            fx = fy = 0.0
            for h, a, b, c, u, v in TERMS:
                dx, dy = x - u, y - v
                e = h * exp(a * dx * dx + b * dx * dy + c * dy * dy)
                fx -= e * (2.0 * a * dx + b * dy)
                fy -= e * (2.0 * c * dy + b * dx)
            x += STEP * fx + kick * normal(0.0, 1.0)
            y += STEP * fy + kick * normal(0.0, 1.0)
        frames[frame, 0, 0], frames[frame, 0, 1] = x, y
    return frames


def near(x, y, centre):
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < RADIUS**2


def on_a_grid(n: int = 220):
    """(timescale, slow eigenfunction, committor) of the exact motion, as functions of (x, y)."""
    xs, ys = np.linspace(-1.9, 1.4, n), np.linspace(-0.7, 2.3, n)
    X, Y = np.meshgrid(xs, ys, indexing="ij")
    V = np.minimum(potential(X, Y), 150.0)
    half = np.exp(-(V - V.min()) / (2.0 * KT))
    number = np.arange(n * n).reshape(n, n)
    rows, columns, rates, symmetric = [], [], [], []
    for axis, width in ((0, xs[1] - xs[0]), (1, ys[1] - ys[0])):
        i = number[:-1].ravel() if axis == 0 else number[:, :-1].ravel()
        j = number[1:].ravel() if axis == 0 else number[:, 1:].ravel()
        root = half.ravel()
        for a, b in ((i, j), (j, i)):
            rows.append(a)
            columns.append(b)
            rates.append(KT / width**2 * root[b] / root[a])
            symmetric.append(np.full(len(a), KT / width**2))
    place = (np.concatenate(rows), np.concatenate(columns))
    L = sp.csr_matrix((np.concatenate(rates), place), shape=(n * n, n * n))
    out = sp.diags(np.asarray(L.sum(1)).ravel())
    S = sp.csr_matrix((np.concatenate(symmetric), place), shape=(n * n, n * n)) - out
    values, vectors = eigsh(S, 2, sigma=1e-3, which="LM")
    slow = int(np.argmin(values))
    phi = (vectors[:, slow] / half.ravel()).reshape(n, n)
    in_a, in_b = near(X, Y, A).ravel(), near(X, Y, B).ravel()
    rest = ~(in_a | in_b)
    generator = (L - out).tocsr()
    q = in_b.astype(float)
    q[rest] = spsolve(generator[rest][:, rest], -generator[rest] @ q)
    return (
        -1.0 / values[slow],
        RegularGridInterpolator((xs, ys), phi, bounds_error=False, fill_value=None),
        RegularGridInterpolator((xs, ys), q.reshape(n, n), bounds_error=False, fill_value=None),
    )


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=500_000)
    parser.add_argument("--landmarks", type=int, default=4000)
    parser.add_argument("--beta", type=float, default=10.0)
    parser.add_argument("--lag", type=int, default=10, help="frames")
    parser.add_argument("--saved", type=Path, default=None, help="frames of `simulate`, as .npy")
    parser.add_argument("--out", type=Path, default=None, help="folder of muller_brown.json")
    given = parser.parse_args(argv)
    started = time.perf_counter()
    frames = simulate(given.frames) if given.saved is None else np.load(given.saved)
    simulated = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dm = slow_manifold(
        frames, given.lag, 4, align=None, beta=given.beta, alpha=0.5, landmarks=given.landmarks
    )
    mapped = time.perf_counter()
    # the committor on the landmarks, then one step of the chain from every frame
    x, y = dm.X_fit_[:, 0], dm.X_fit_[:, 1]
    q = committor(dm, near(x, y, A), near(x, y, B), tol=1e-6)
    inside = np.ascontiguousarray(frames[:, 0])
    q = FlashDiffusion(inside, dm.X_fit_, q, dm.beta_, 0.0, dm.weights_, normalize="row")
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    timescale, phi, exact_q = on_a_grid()
    where = inside[:, :2]
    phi, exact_q = phi(where), np.clip(exact_q(where), 0.0, 1.0)
    psi = dm.eigenvectors_[:, 0]
    between = (exact_q > 0.1) & (exact_q < 0.9)
    result = {
        "frames": len(frames),
        "landmarks": given.landmarks,
        "beta": given.beta,
        "steps per frame": STRIDE,
        "kT": KT,
        "lag": given.lag,
        "timescale": dm.timescales_[0] * given.lag * STRIDE * STEP,
        "timescale on the grid": timescale,
        "second timescale": dm.timescales_[1] * given.lag * STRIDE * STEP,
        "eigenvalues": dm.eigenvalues_.tolist(),
        "residual": float(dm.residuals_.max()),
        "smallest row sums of the kernel between landmarks": np.sort(dm.density_[dm.landmarks_])[
            :3
        ].tolist(),
        "slow coordinate, correlation": abs(float(np.corrcoef(psi, phi)[0, 1])),
        "slow coordinate, rank correlation": abs(float(spearmanr(psi, phi).statistic)),
        "committor, rank correlation": float(spearmanr(q, exact_q).statistic),
        "committor, mean error": float(np.abs(q - exact_q).mean()),
        "committor, mean error where 0.1 < q < 0.9": float(np.abs(q - exact_q)[between].mean()),
        "frames with 0.1 < q < 0.9": int(between.sum()),
        "seconds": {
            "simulation, or reading": simulated - started,
            "map of all frames": mapped - simulated,
            "committor of all frames": done - mapped,
        },
        "memory beyond the frames, MB": (peak - before) / 1024,
        "frames, MB": frames.nbytes / 2**20,
        "threads": torch.get_num_threads(),
        "date": str(datetime.date.today()),
        "versions": {
            "flashdiffusion": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "muller_brown.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(), indent=1) + "\n")
