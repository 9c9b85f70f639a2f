"""The committor of a double well, from a simulated path alone.

    python examples/committor_double_well.py                # seconds
    python examples/committor_double_well.py --frames 600 --out somewhere

A particle diffuses in (x^2 - 1)^2 barrier + stiffness y^2 / 2. From each point, what is the chance
to reach the right well before the left one? `slow_manifold` knows nothing but the frames; the exact
answer is an integral over x alone. Writes committor_double_well.png to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from flashdiffusion import committor, slow_manifold

plt.style.use("shared_kernels.pictures")

BARRIER, STIFFNESS, STEP, STRIDE = 3.0, 10.0, 0.005, 10


def simulate(n_frames: int) -> np.ndarray:
    """(n_frames, 1, 3): overdamped Langevin motion at kT = 1, a frame in STRIDE steps."""
    rng = np.random.default_rng(0)
    frames = np.zeros((n_frames, 1, 3))
    x, y = -1.0, 0.0
    for frame in range(n_frames):
        for kick_x, kick_y in (2.0 * STEP) ** 0.5 * rng.standard_normal((STRIDE, 2)):
            x += -STEP * 4.0 * BARRIER * x * (x * x - 1.0) + kick_x
            y += -STEP * STIFFNESS * y + kick_y
        frames[frame, 0, :2] = x, y
    return frames


def exact(x: np.ndarray) -> np.ndarray:
    """The committor between x = -1 and x = 1: the integral of exp(V) up to x."""
    grid = np.linspace(-1.0, 1.0, 2001)
    total = np.cumsum(np.exp(BARRIER * (grid**2 - 1.0) ** 2))
    return np.interp(x, grid, (total - total[0]) / (total[-1] - total[0]))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=6000)
    parser.add_argument("--beta", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args(argv)
    frames = simulate(given.frames)
    x, y = frames[:, 0, 0], frames[:, 0, 1]
    dm = slow_manifold(frames, lag=5, n_components=3, align=None, beta=given.beta)
    q = committor(dm, x < -1.0, x > 1.0)
    between = np.abs(x) < 1.0
    measured = {
        "mean error": float(np.abs(q - exact(x))[between].mean()),
        "slowest timescale in frames": float(dm.timescales_[0] * 5),
    }

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0))
    points = left.scatter(x, y, c=q, s=4, cmap="PuOr_r", vmin=0.0, vmax=1.0)
    left.set(xlabel="x", ylabel="y", title="Where does a point end?")
    figure.colorbar(points, ax=left, label="chance to end on the right", ticks=[0, 0.5, 1])
    right.plot(x, q, ".", ms=2, color="0.6", label="from the frames")
    line = np.linspace(-1.4, 1.4, 300)
    right.plot(line, exact(line), color="C1", label="exact")
    right.set(xlabel="x", ylabel="committor", title="Beside the exact committor")
    right.legend()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "committor_double_well.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"mean error {measured['mean error']:.3f} between the wells; {path}")
    return measured


if __name__ == "__main__":
    main()
