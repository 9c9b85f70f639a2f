"""Are the parameters of a DiffusionMap legal, and do they go together?"""

from __future__ import annotations

from typing import Any

import numpy as np

from shared_kernels import checks

from . import _checks, eigensolver
from ._neighbours import SEARCHES

BANDWIDTHS = ("bgh", "median", "self-tuning")
# The solve rests on these alone; the others say where it runs, or what is shown.
_NOT_OF_THE_PROBLEM = ("group", "checkpoint", "device", "verbose", "random_state", "landmarks")


def of_the_problem(dm: Any) -> dict[str, Any]:
    """The parameters that must be the same for the same result, by name."""
    parameters = dm.get_params(deep=False).items()
    return {name: value for name, value in parameters if name not in _NOT_OF_THE_PROBLEM}


def check(dm: Any, N: int) -> None:
    """All parameters, for N points; `landmarks` has `checked_landmarks`."""
    if isinstance(dm.beta, str):
        checks.in_set("beta", dm.beta, BANDWIDTHS)
    else:
        _checks.positive("beta", dm.beta)
    checks.in_set("affinity", dm.affinity, ("rbf", "precomputed"))
    checks.in_set("search", dm.search, SEARCHES)
    if not isinstance(dm.shard_points, bool):
        checks.fail("shard_points", "be True or False", repr(dm.shard_points))
    if dm.shard_points:
        _check_split(dm)
    if dm.affinity == "precomputed" or dm.neighbors is not None:
        _check_sparse(dm)
        _check_neighbors(dm, N)
    elif dm.search != "exact":
        checks.fail("search", "be 'exact' without `neighbors`", dm.search)
    _checks.alpha_range(dm.alpha)
    _checks.positive("tol", dm.tol)
    if not isinstance(dm.n_components, (int, np.integer)) or dm.n_components < 1:
        checks.fail("n_components", "be an int of at least 1", repr(dm.n_components))
    if dm.n_components >= N:
        checks.fail(
            "n_components",
            f"be at most {N - 1}, points minus one (n_samples = {N})",
            dm.n_components,
        )
    if dm.tile is not None:
        checks.positive_int("tile", dm.tile)
    checks.in_set("solver", dm.solver, eigensolver.SOLVERS)
    if dm.solver in ("lobpcg", "lanczos") and (dm.group, dm.checkpoint) != (None, None):
        checks.fail(
            "solver", "be 'auto', 'krylov' or 'dense' with `group` or `checkpoint`", dm.solver
        )
    checks.in_set("precision", dm.precision, (*_checks.PRECISIONS, "half"))
    if dm.precision == "half" and dm.solver not in ("auto", "krylov"):
        checks.fail("solver", "be 'auto' or 'krylov' with precision='half'", dm.solver)


def _check_split(dm: Any) -> None:
    if dm.landmarks is not None:
        checks.fail(
            "landmarks",
            "be None with shard_points=True",
            repr(dm.landmarks),
            "give the landmarks alone to a map of every process, and transform the rest",
        )
    if dm.neighbors is not None or dm.affinity != "rbf":
        checks.fail(
            "shard_points", "be False with a sparse kernel", True, "one process solves that"
        )
    if dm.precision == "half":
        checks.fail("precision", "not be 'half' with shard_points=True", "half")


def _check_sparse(dm: Any) -> None:
    for name in ("group", "checkpoint", "tile"):
        if getattr(dm, name) is not None:
            checks.fail(
                name,
                "be None with a sparse kernel",
                repr(getattr(dm, name)),
                "it has no tiles, and one process solves it",
            )
    if dm.precision not in ("auto", "float64"):
        checks.fail("precision", "be 'auto' or 'float64' with a sparse kernel", dm.precision)
    if dm.affinity == "rbf":
        return
    if dm.neighbors is not None:
        checks.fail("neighbors", "be None with affinity='precomputed'", dm.neighbors)
    if dm.landmarks is not None:
        checks.fail("landmarks", "be None with affinity='precomputed'", repr(dm.landmarks))
    if dm.beta != "bgh":
        checks.fail(
            "beta",
            "be left out with affinity='precomputed'",
            repr(dm.beta),
            "the matrix holds the kernel's values",
        )


def _check_neighbors(dm: Any, N: int) -> None:
    k = dm.neighbors
    if k is None:
        return
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k < N:
        checks.fail("neighbors", f"be an int in [1, {N - 1}], points minus one", repr(k))


def checked_landmarks(dm: Any, N: int) -> int | np.ndarray | None:
    """How many rows of N to choose, or which, or None; fewer points than that must do, too."""
    if dm.landmarks is None:
        return None
    if isinstance(dm.landmarks, (int, np.integer)):
        if not 2 <= dm.landmarks <= N:
            checks.fail("landmarks", f"be in [2, {N}]", dm.landmarks)
        _check_landmark_count(dm, int(dm.landmarks))
        return int(dm.landmarks)
    _checks.plain("landmarks", dm.landmarks)
    rows = np.asarray(dm.landmarks)
    _checks.no_mask("landmarks", rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(np.unique(rows)) != len(rows):
        checks.fail("landmarks", "be a number or distinct row indices", repr(dm.landmarks))
    if len(rows) < 2 or rows.min() < 0 or rows.max() >= N:
        checks.fail("landmarks", f"be at least two indices in [0, {N})", repr(dm.landmarks))
    _check_landmark_count(dm, len(rows))
    return rows


def _check_landmark_count(dm: Any, n: int) -> None:
    if dm.n_components >= n:
        checks.fail("n_components", f"be at most {n - 1}, points minus one", dm.n_components)
    _check_neighbors(dm, n)
