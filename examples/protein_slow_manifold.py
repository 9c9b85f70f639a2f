"""The slow manifold of a protein: adenylate kinase opens along the first coordinate.

    # MDAnalysis and its test trajectory
    pip install ./shared-kernels "./packages/flashdiffusion[examples]"
    python examples/protein_slow_manifold.py

98 frames lead from the closed to the open state. Frames are read one by one, aligned and compared
by mass-weighted RMSD; the map does not know their order. Without MDAnalysis, --hinge takes
simulated arms instead. Writes protein_slow_manifold.png to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from flashdiffusion import slow_manifold

plt.style.use("shared_kernels.pictures")

Frames = Callable[[], Iterator[np.ndarray]]


def adenylate_kinase(atoms: str) -> tuple[Frames, np.ndarray]:
    """The frames, as a function, and the masses."""
    import MDAnalysis
    from MDAnalysisTests.datafiles import DCD, PSF

    universe = MDAnalysis.Universe(PSF, DCD)
    chosen = universe.select_atoms(atoms)

    def frames() -> Iterator[np.ndarray]:
        for _ in universe.trajectory:
            yield chosen.positions.astype(np.float64)

    return frames, chosen.masses


def hinge(n_frames: int = 98, atoms: int = 40) -> tuple[Frames, np.ndarray]:
    """Two arms that open from 20 to 160 degrees, with thermal noise."""

    def frames() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        arm = np.linspace(1.0, 20.0, atoms // 2)
        for angle in np.radians(np.linspace(20.0, 160.0, n_frames)):
            x = np.concatenate((arm, np.cos(angle) * arm))
            y = np.concatenate((0.0 * arm, np.sin(angle) * arm))
            yield np.stack((x, y, 0.0 * x), 1) + 0.2 * rng.standard_normal((atoms, 3))

    return frames, np.ones(atoms)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atoms", default="name CA", help="MDAnalysis' selection")
    parser.add_argument("--hinge", action="store_true", help="simulated arms, no MDAnalysis")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args(argv)
    frames, masses = hinge() if given.hinge else adenylate_kinase(given.atoms)
    dm = slow_manifold(frames, n_components=3, weights=masses, beta="median")
    psi = dm.transform()
    number = np.arange(len(psi))
    order = abs(float(spearmanr(psi[:, 0], number).statistic))

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0))
    points = left.scatter(psi[:, 0], psi[:, 1], c=number, s=14, cmap="viridis")
    left.set(xlabel="λ₁ψ₁", ylabel="λ₂ψ₂", title="the slow manifold")
    figure.colorbar(points, ax=left, label="frame")
    right.plot(number, psi[:, 0], ".-", color="C0")
    right.set(xlabel="frame", ylabel="λ₁ψ₁", title=f"rank correlation {order:.4f}")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "protein_slow_manifold.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"|Spearman| of the first coordinate with the frame: {order:.5f}; {path}")
    return {"order": order, "frames": len(psi)}


if __name__ == "__main__":
    main()
