"""Hear the shape of a sphere: diffusion rates against l (l + 1) of the Laplacian.

Each comes 2 l + 1 times.

python examples/diffusion_map_sphere.py --out packages/flashdiffusion/docs/sphere.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import ive

from flashdiffusion import DiffusionMap

plt.style.use("shared_kernels.pictures")


def sphere(n):
    """A Fibonacci lattice on the unit sphere."""
    i = np.arange(n) + 0.5
    z = 1 - 2 * i / n
    angle = np.pi * (1 + 5**0.5) * i
    radius = np.sqrt(1 - z * z)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), z), 1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=6000)
    parser.add_argument("--beta", type=float, default=60.0)
    parser.add_argument("--degrees", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("sphere.png"))
    options = parser.parse_args(arguments)

    degree = np.concatenate([[n] * (2 * n + 1) for n in range(1, options.degrees + 1)])
    X, beta = sphere(options.points), options.beta
    dm = DiffusionMap(beta=beta, alpha=1.0, n_components=len(degree)).fit(X)
    # exp(-beta |x - y|^2) is a heat step of time 1 / (4 beta), up to O(1 / beta) ...
    rates = -4 * beta * np.log(dm.eigenvalues_)
    # ... and on the sphere its eigenvalues are known at every beta
    exact = ive(degree + 0.5, 2 * beta) / ive(0.5, 2 * beta)
    error = np.abs(dm.eigenvalues_ - exact).max()

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0))
    k = np.arange(1, len(degree) + 1)
    left.plot(k, degree * (degree + 1), "_", color="C1", markersize=12, label="l (l + 1)")
    left.plot(k, rates, ".", label="−4 β log λ")
    left.set(xlabel="k", ylabel="rate")
    left.set_title(f"{options.points} points: multiplets of 3, 5, 7, …")
    left.legend()
    right.semilogy(k, np.maximum(np.abs(dm.eigenvalues_ - exact), 1e-17), ".", label="|λ − exact|")
    right.semilogy(k, dm.residuals_, "x", color="C1", label="residual")
    right.set(xlabel="k", title=f"error of λ at most {error:.1e}")
    right.legend()
    figure.savefig(options.out)
    plt.close(figure)
    return {
        "rate_error": float(np.abs(rates / (degree * (degree + 1)) - 1).max()),
        "value_error": float(error),
        "residual": float(dm.residuals_.max()),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.6g}")
