"""Unroll a swiss roll: the first diffusion coordinate is the angle along the spiral.

python examples/diffusion_map_swiss_roll.py --out packages/flashdiffusion/docs/swiss_roll.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from flashdiffusion import DiffusionMap

plt.style.use("shared_kernels.pictures")


def swiss_roll(n, seed=0):
    rng = np.random.default_rng(seed)
    t = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return np.stack((t * np.cos(t), 21 * rng.random(n), t * np.sin(t)), 1), t


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("swiss_roll.png"))
    options = parser.parse_args(arguments)

    X, t = swiss_roll(options.points)
    # a few points see each other across 1 / sqrt(beta) = 2, and the sheets are 6 apart;
    # alpha = 1: the roll is sampled unevenly in arc length, and that should not matter
    dm = DiffusionMap(beta=0.25, alpha=1.0, n_components=6).fit(X)
    coordinates = dm.transform()
    order = abs(spearmanr(coordinates[:, 0], t).statistic)
    across = [abs(spearmanr(c, X[:, 1]).statistic) for c in coordinates.T]
    second = int(np.argmax(across))

    figure = plt.figure(figsize=(7.2, 2.7))
    roll = figure.add_subplot(1, 3, 1, projection="3d")
    roll.scatter(*X[:, [0, 2, 1]].T, c=t, s=3)
    roll.set(xticks=[], yticks=[], zticks=[])
    roll.set_title(f"{options.points} points")
    along = figure.add_subplot(1, 3, 2)
    along.scatter(t, coordinates[:, 0], c=t, s=3)
    along.set(xlabel="angle along the roll", ylabel="coordinate 1")
    along.set_title(f"rank correlation {order:.4f}")
    flat = figure.add_subplot(1, 3, 3)
    flat.scatter(coordinates[:, 0], coordinates[:, second], c=t, s=3)
    flat.set(xlabel="coordinate 1", ylabel=f"coordinate {second + 1}")
    flat.set_title("The sheet, unrolled")
    figure.savefig(options.out)
    plt.close(figure)
    return {"spearman": order, "across": across[second], "residual": float(dm.residuals_.max())}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.6g}")
