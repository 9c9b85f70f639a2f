"""A Schroedinger bridge between two point clouds, drawn at five times.

    python examples/bridge_frames.py                        # half a minute
    python examples/bridge_frames.py --points 150 --out somewhere

Points on a ring are carried into two moons: of all random walks on the union of both clouds that
start in one and end in the other, the bridge is the most likely. Its marginal at each step is a
distribution over the union; nothing of size N x N is built. Writes bridge_frames.png to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from flashdiffusion import schroedinger_bridge

plt.style.use("shared_kernels.pictures")


def clouds(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 2) a ring on the left, (n, 2) two moons on the right, (4 n, 2) the plane between."""
    rng = np.random.default_rng(0)
    angle = 2.0 * np.pi * rng.random(n)
    ring = np.stack((np.cos(angle) - 3.0, np.sin(angle)), 1)
    half = np.pi * rng.random(n)
    upper = rng.random(n) < 0.5
    moons = np.where(
        upper[:, None],
        np.stack((np.cos(half), np.sin(half) - 0.25), 1),
        np.stack((1.0 - np.cos(half), 0.25 - np.sin(half)), 1),
    )
    moons = moons + [2.5, 0.0]
    plane = rng.random((4 * n, 2)) * [8.5, 3.6] + [-4.4, -1.8]
    return (
        ring + 0.06 * rng.standard_normal((n, 2)),
        moons + 0.06 * rng.standard_normal((n, 2)),
        plane,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--beta", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args(argv)
    ring, moons, plane = clouds(given.points)
    union = np.concatenate((ring, moons, plane))
    # a distribution needs mass everywhere: a millionth is spread over the rest
    mu, nu = np.full((2, len(union)), 1e-6 / len(union))
    mu[: len(ring)] += 1.0 / len(ring)
    nu[len(ring) : len(ring) + len(moons)] += 1.0 / len(moons)
    mu, nu = mu / mu.sum(), nu / nu.sum()
    bridge = schroedinger_bridge(union, union, mu, nu, given.beta, steps=given.steps, tol=1e-6)
    means = [step.marginal @ union for step in bridge.steps]

    shown = np.linspace(0, given.steps, 5).round().astype(int)
    figure, panels = plt.subplots(1, 5, figsize=(7.2, 1.5))
    for panel, s in zip(panels, shown, strict=True):
        marginal = bridge.steps[s].marginal
        panel.scatter(*union.T, s=1, color="0.88")
        seen = marginal > 0.02 / len(union)
        panel.scatter(*union[seen].T, s=6e3 * marginal[seen], color="C0", alpha=0.6, lw=0)
        panel.set(title=f"step {s}", xticks=[], yticks=[], aspect="equal")
        panel.spines[:].set_visible(False)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "bridge_frames.png"
    figure.savefig(path)
    plt.close(figure)
    travelled = [float(m[0]) for m in means]
    print(
        f"{bridge.n_iter} iterations, marginals off by {bridge.marginal_error:.1e}; mean x from "
        f"{travelled[0]:.2f} to {travelled[-1]:.2f}; {path}"
    )
    return {
        "error": bridge.marginal_error,
        "start": travelled[0],
        "end": travelled[-1],
        "middle": travelled[given.steps // 2],
    }


if __name__ == "__main__":
    main()
