"""The cases every leg runs, and the point sets whose spectra are known."""

import numpy as np
import torch

from shared_kernels.testing import Case, tolerance

# How wrong a result may be. What samples decide (timescales, densities) is bounded where it stands.
ROUNDING = 1e-12  # float64: the same sum in another order
CANCELLED = 1e-10  # float64: differences of sums
SOLVED = tolerance(torch.float64)  # eigenpairs after the float64 pass
ITERATED = 1e-8  # float64: fixed points of an iteration
ORACLE = 1e-7  # answers known in closed form, or by another method
TOL = 1e-6  # the default tol: residuals, marginals, the flat torus
SPANS = 1e-5  # subspaces: a residual over a gap
FLOAT32 = tolerance(torch.float32)
ROWS = 1e-4  # eigenvectors of float32 sweeps; training rows as new points
SPHERE = 2e-3  # a lattice instead of the sphere


def power_score(x, y):
    """A score that is not symmetric and not an inner product."""
    diff = x - y
    return diff.abs().pow(1.5).sum(-1) + 0.1 * diff[..., 0]


CASES = [
    Case("symmetric", N=130, alpha=0.5),
    Case("symmetric-alpha-0", N=97, alpha=0.0),
    Case("symmetric-alpha-1-r1", N=97, alpha=1.0, r=1),
    Case("symmetric-doob", N=70, alpha=0.3, h=True, normalize="symmetric"),
    Case("row-of-one-set", N=97, alpha=0.5, normalize="row"),
    Case("row-doob-of-one-set", N=97, alpha=0.5, h=True),
    Case("row-of-two-sets", N=65, M=130, alpha=0.5),
    Case("row-alpha-0", N=65, M=33, alpha=0.0, beta=0.4),
    Case("row-alpha-1-doob", N=33, M=130, alpha=1.0, h=True),
    Case("none-of-one-set", N=129, normalize="none"),
    Case("none-of-two-sets", N=31, M=70, normalize="none", r=1),
    Case("one-point", N=1, alpha=0.5),
    Case("one-key", N=5, M=1, alpha=0.5),
    Case("one-dimension", N=64, d=1, alpha=0.5),
    Case("many-dimensions", N=64, d=60, beta=0.02, alpha=0.5),
    Case("sharp", N=100, alpha=0.5, beta=60.0),
    Case("sharp-rows", N=64, M=64, alpha=0.5, beta=60.0),
    Case("dot", N=80, score="dot", alpha=0.5),
    Case("dot-rows", N=70, M=65, score="dot", alpha=0.0),
    Case("cosine", N=80, score="cosine", alpha=1.0, beta=4.0),
    Case("cosine-rows-doob", N=33, M=65, score="cosine", h=True),
    Case("l1", N=70, score="l1", alpha=0.5),
    Case("l1-rows", N=33, M=70, score="l1", alpha=0.5, h=True),
    Case("callable", N=70, score=power_score, alpha=0.5),
    Case("callable-rows", N=33, M=70, score=power_score, alpha=0.5, h=True),
    Case("callable-none", N=33, M=70, score=power_score, normalize="none"),
    Case("dot-none", N=33, M=70, score="dot", normalize="none"),
]


def inputs(case, dtype=torch.float32, seed=0):
    """(Q, K, V, keyword arguments) of a case."""
    g = torch.Generator().manual_seed(seed)
    d, r = case.get("d", 3), case.get("r", 4)
    M = case.get("M", case.N)
    Q = torch.randn(case.N, d, generator=g, dtype=torch.float64).to(dtype)
    K = Q if "M" not in case.values else torch.randn(M, d, generator=g, dtype=torch.float64)
    V = torch.randn(M, r, generator=g, dtype=torch.float64)
    V = V[:, 0] if r == 1 else V
    h = torch.rand(M, generator=g, dtype=torch.float64) + 0.2 if case.get("h") else None
    kwargs = {
        "beta": case.get("beta", 0.8),
        "alpha": case.get("alpha", 0.5),
        "h": h,
        "score_mod": case.get("score"),
        "normalize": case.get("normalize", "auto"),
    }
    return Q, K.to(dtype), V.to(dtype), kwargs


def circle(N, shift=0.0):
    angle = np.arange(N) * (2.0 * np.pi / N)
    return np.stack((np.cos(angle), np.sin(angle)), 1) + shift


def sphere(N):
    """A Fibonacci lattice on the unit sphere."""
    i = np.arange(N) + 0.5
    z = 1.0 - 2.0 * i / N
    angle = np.pi * (1.0 + 5.0**0.5) * i
    radius = np.sqrt(1.0 - z * z)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), z), 1)


def torus(n):
    """n x n equispaced points of the flat torus, in four dimensions."""
    c = circle(n)
    a, b = np.divmod(np.arange(n * n), n)
    return np.concatenate((c[a], c[b]), 1)


def swiss_roll(N, seed=0):
    rng = np.random.default_rng(seed)
    t = 1.5 * np.pi * (1.0 + 2.0 * rng.random(N))
    return np.stack((t * np.cos(t), 21.0 * rng.random(N), t * np.sin(t)), 1), t
