"""What a fitted diffusion map warns of: a bandwidth that does not fit, pairs that are noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _checks
from ._group import Rows


def warn_of_the_bandwidth(dm: Any, lonely: bool) -> None:
    """lonely: whether the median of the row sums is hardly above the diagonal entry."""
    if lonely:
        _checks.warn(
            f"most row sums of the kernel are 1: the bandwidth is too small (beta = "
            f"{dm.beta_:.3g} is too large) and most points see only themselves",
        )
    if dm.sees_one_point_:
        _checks.warn(
            f"all entries of the kernel are nearly 1: the bandwidth is too large (beta = "
            f"{dm.beta_:.3g} is too small), or all points are the same; the coordinates are noise",
        )


def warn_of_the_pairs(dm: Any, n_parts: int | None) -> None:
    """n_parts: parts of the graph of a sparse kernel; None of a dense one, which has no graph."""
    if not dm.converged_:
        _checks.warn_unconverged(_what_has_not_converged(dm))
    second = dm.eigenvalues_[0]
    # a large sparse graph in one part has eigenvalues very close to 1, too
    if 1.0 - 1e-6 < second <= 1.0 + 1e-6 if n_parts is None else n_parts > 1:
        _checks.warn(
            f"the second eigenvalue is {second:.9f}: the graph is disconnected, and "
            f"the first coordinates only tell its parts apart; take a smaller beta, or more "
            f"neighbors where the kernel is sparse",
        )


def warn_of_lonely_points(dm: Any, held: Rows) -> None:
    """The first coordinate may live on a few points that lie apart from the others."""
    # sum pi psi^2 = 1: the points that carry a coordinate have at most this stationary weight
    fourth = torch.tensor(dm.stationary_ @ dm.eigenvectors_[:, 0] ** 4, device=dm.device_)
    carried = 1.0 / float(held.total(fourth))
    least = float(held.each(torch.tensor(dm.density_.min(), device=dm.device_)).min())
    if carried < 0.01 and dm.eigenvalues_[0] <= 1.0 - 1e-6:
        _checks.warn(
            f"the first coordinate lives on {carried:.2%} of the stationary weight: a few "
            f"points lie apart from the others (the smallest row sum of the kernel is "
            f"{least:.3g}, 1 would be a point that sees only itself); take a "
            f"smaller beta, or leave them out",
        )


def _what_has_not_converged(dm: Any) -> str:
    values, largest, good = dm.eigenvalues_, dm.residuals_.max(), dm.n_converged_
    which = f"{good} of the {len(values)} eigenpairs have" if good else "the eigenpairs have not"
    words = (
        f"{which} converged: the largest residual is {largest:.2e} after {dm.n_passes_} passes, "
        f"tol is {dm.tol:.1e}"
    )
    if not np.isfinite(values).all() or values.max() > 1.0 + 1e-6:
        return (
            f"{words}, and an eigenvalue is {values.max():.7g}, where 1 is the largest: pass the "
            f"points in float64, or leave out the far ones"
        )
    if largest <= dm.tol:
        return (
            f"{words}; from number {good + 1} on |lambda| is below {dm.tol**-0.5:.3g} times the "
            f"residual and the vectors are noise: ask for fewer components, pass the points in "
            f"float64, or take a larger beta"
        )
    return words
