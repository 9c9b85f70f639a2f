"""Bandwidths from the data, and the extension of eigenvectors to new points."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks, pairwise

from . import _checks
from ._checks import Points
from ._problem import LOG2_E

# At most so many points choose a bandwidth.
SAMPLE = 2048
# The neighbour whose distance is a point's local scale.
NEIGHBOUR = 7


class Bandwidth(NamedTuple):
    """What the Berry-Giannakis-Harlim rule found.

    `beta` the chosen inverse temperature, `dimension` the intrinsic dimension it implies, and the
    curve: `betas` (n,) with `slopes` (n,) = d log S / d log(1/beta).
    """

    beta: float
    dimension: float
    betas: np.ndarray
    slopes: np.ndarray


def _sample(X: Any, n_sample: int, random_state: Any) -> Tensor:
    from sklearn.utils import check_random_state

    x = _checks.as_tensor("X", X)
    checks.shape("X", x, (None, None), "(N, d)")
    _checks.finite("X", x)
    checks.positive_int("n_sample", n_sample)
    if x.shape[0] < 2:
        checks.fail("X", "have at least 2 rows", x.shape[0])
    if x.shape[0] > n_sample:
        rows = check_random_state(random_state).permutation(x.shape[0])[:n_sample]
        x = x[torch.from_numpy(rows).to(x.device)]
    return x.double()


def _distances(x: Tensor) -> Tensor:
    """Squared distances of all pairs of a sample: (m (m - 1) / 2,), float64."""
    # a sample of bounded size: this is not N^2
    return torch.pdist(x - x.mean(0)).square()


def median_bandwidth(X: Any, *, n_sample: int = SAMPLE, random_state: Any = 0) -> float:
    """beta = 1 / (2 median |x_i - x_j|^2), the median over pairs of at most n_sample points.

    Where half of the pairs coincide, the median of the pairs that do not; 1.0 if all do.

    Example:
        >>> median_bandwidth(np.array([[0.0], [2.0]]))
        0.125
    """
    sq = _distances(_sample(X, n_sample, random_state))
    median = float(sq.median())
    if median == 0.0:
        positive = sq[sq > 0]
        median = float(positive.median()) if len(positive) else 0.5
    return 1.0 / (2.0 * median)


def bgh_bandwidth(X: Any, *, n_sample: int = SAMPLE, random_state: Any = 0) -> Bandwidth:
    """The beta where S(beta) = mean_ij exp(-beta |x_i - x_j|^2) grows fastest in log-log scale.

    d log S / d log(1/beta) = beta sum K d^2 / sum K is at most half the intrinsic dimension, and
    comes nearest where the kernel sees the manifold rather than single points or the whole set.

    Args:
        X: (N, d) points.
        n_sample: at most so many points enter, chosen by random_state.

    Returns:
        Bandwidth(beta, dimension, betas, slopes); dimension = 2 max slope.

    Source: Berry and Harlim, "Variable bandwidth diffusion kernels" (2016), section 4; Berry,
    Giannakis and Harlim (2015).
    """
    x = _sample(X, n_sample, random_state)
    sq = _distances(x)
    positive = sq[sq > 0]
    if len(positive) == 0:
        return Bandwidth(1.0, 0.0, np.ones(1), np.zeros(1))
    low, high = float(positive.min()), float(positive.max())
    # in units of the largest: float32 holds them whatever the unit of the points
    sq = sq / high
    sq = sq.float() if high / low < 1e30 else sq

    def slope(beta: float) -> float:
        # exponents of two: exp2 is the faster one
        e = (sq * (-beta * LOG2_E)).clamp_(min=-86.0)
        k = e.exp2()
        # pairs count twice, the diagonal has K = 1 and d = 0
        total = len(x) + 2.0 * float(k.sum(dtype=torch.float64))
        return -2.0 / LOG2_E * float(k.mul_(e).sum(dtype=torch.float64)) / total

    # by factors of about two first, then finely around the best
    n = min(64, int(np.log2(high / low)) + 10)
    coarse = np.geomspace(0.05, 20.0 * (high / low), n)
    rough = np.array([slope(b) for b in coarse])
    best = int(np.argmax(rough))
    fine = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, n - 1)], 11)
    exact = np.array([slope(b) for b in fine])
    best = int(np.argmax(exact))
    beta = float(fine[best])
    if 0 < best < len(fine) - 1:
        # the vertex of the parabola through three points, equally spaced in log beta
        left, middle, right = exact[best - 1 : best + 2]
        bend = left - 2.0 * middle + right
        if bend < 0.0:
            beta *= float((fine[1] / fine[0]) ** (0.5 * (left - right) / bend))
    betas, kept = np.unique(np.concatenate((coarse, fine)), return_index=True)
    slopes = np.concatenate((rough, exact))[kept]
    return Bandwidth(beta / high, 2.0 * float(exact.max()), betas / high, slopes)


def local_scales(x: Tensor, k: int, y: Tensor | None = None) -> Tensor:
    """Distances to the k-th neighbour (of rows of y, to the (k+1)-th nearest): (N,) float64.

    0 where a point has k copies.
    """
    points = x.double()
    others = points if y is None else y.double()
    size = float(torch.cat((points, others)).abs().max()) if x.numel() and others.numel() else 0.0
    # a power of two is exact: squares of any unit are then within any format's range
    unit = 2.0 ** round(np.log2(size)) if size > 0.0 else 1.0
    # a row of y is its own nearest neighbour, so its k-th is the one after
    n_neighbours = min(int(k) + 1, others.shape[0])
    among = None if y is None else others / unit
    return pairwise.knn(points / unit, n_neighbours, Y=among)[0][:, -1].sqrt() * unit


def fallback_scale(y: Tensor, k: int, sigma: Tensor | None = None) -> float:
    """What stands for the scale of a point with k copies: the smallest positive one among y.

    Where every row of y has copies, that of its distinct rows; 1 if there is only one.
    """
    sigma = local_scales(y, k) if sigma is None else sigma
    if not bool((sigma > 0).any()):
        distinct = torch.unique(y, dim=0) if y.shape[1] else y[:1]
        if len(distinct) < 2:
            return 1.0
        sigma = local_scales(distinct, k)
    return float(sigma[sigma > 0].min())


def knn_bandwidth(X: Points, k: int = NEIGHBOUR, *, Y: Any = None) -> Points:
    """Local scales sigma_i = |x_i - its k-th nearest neighbour|: exact, in tiles.

    Args:
        X: (N, d) points.
        k: which neighbour; min(k, points - 1) is used.
        Y: None, or the (M, d) points among which the neighbours are sought: sigma is then the
            distance to the (k+1)-th nearest of them, which is continuous in x and equal to the
            above for rows of Y.

    Returns:
        (N,) of X's kind and dtype, > 0. A point with k copies gets the smallest positive sigma
        among the rows of Y (of X, where Y is None); if all of those have copies, the smallest
        among the distinct rows. So it depends on no other row of X but through Y.
    """
    x = _checks.as_tensor("X", X)
    checks.shape("X", x, (None, None), "(N, d)")
    checks.positive_int("k", k)
    y = x if Y is None else _checks.as_tensor("Y", Y).to(x.dtype)
    checks.shape("Y", y, (None, x.shape[1]), lambda: f"(M, {x.shape[1]}) like X")
    if y.shape[0] < 2:
        checks.fail("X" if Y is None else "Y", "have at least 2 rows", y.shape[0])
    _checks.finite("X", x)
    _checks.finite("Y", y)
    sigma = local_scales(x, k, None if Y is None else y)
    if not bool((sigma > 0).all()):
        sigma = sigma.where(sigma > 0, fallback_scale(y, k, sigma if Y is None else None))
    return _checks.like_input(sigma.to(x.dtype), X)


class FittedMap(Protocol):
    """A fitted DiffusionMap, by what is asked of it here."""

    def transform(self, X: Any = ..., t: float = ...) -> np.ndarray: ...


def nystrom_extension(dm: FittedMap, X: Any) -> np.ndarray:
    """Eigenvectors at new points: psi_k(x) = sum_j P(x, x_j) psi_k(x_j) / lambda_k.

    P(x, .) is proportional to K(x, x_j) w_j: the density of the new point cancels, and on the
    training rows this is the eigenvector itself.

    Args:
        dm: a fitted DiffusionMap.
        X: (n, d) points.

    Returns:
        (n, n_components).
    """
    return dm.transform(X, t=0)


def nystrom_extend(dm: FittedMap, X_new: Any, t: float = 1) -> np.ndarray:
    """Coordinates lambda_k^t psi_k at new points: `dm.transform(X_new, t)`, as 0.1.2 called it."""
    return dm.transform(X_new, t=t)
