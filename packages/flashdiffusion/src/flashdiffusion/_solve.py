"""The eigenpairs of a Markov operator: which solver, in which precisions, from which start.

A dense kernel is solved by block Krylov in stages of rising precision. Each stage starts with the
vectors of the stage before it, and the last stages take products with the exact operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _filter, eigensolver
from ._checkpoint import Unsaved
from ._graph import Graph
from ._group import Rows
from ._operator import Kernel, Reversible
from ._progress import Progress
from ._workers import algebra_on_one_thread

_DENSE_UP_TO = 512
_BASIS_BYTES = 96 * 2**20
_MAX_PASSES = 300
# Residuals that products in float32, and in float64, cannot be made to go below.
_FLOORS = {torch.float32: 2e-7, torch.float64: 1e-14}
# Where the rough stage ends: below this residual products in half precision find little that the
# next stage can use (results/half_rung.json), and after so many passes the next stage goes on.
_ROUGH_TOL, _ROUGH_PASSES = 3e-2, 20
# Above this beta |x|^2 float32 exponents lose digits that float64 passes would have to find again.
_MIXED_ABOVE = 16.0


class Wanted(NamedTuple):
    """What is asked of the solver: parameters of `DiffusionMap`."""

    n_pairs: int
    tol: float
    solver: str
    precision: str


class Stage(NamedTuple):
    """A solve with products of one kernel, to `tol` or as near as `floor` lets it come."""

    kernel: Kernel
    n_pairs: int
    tol: float
    floor: float
    max_passes: int


# In the order that they run; a checkpoint knows a stage by its place here. "rough" takes products
# in half precision, "working" in float32 where that is enough; "measure" is one exact product, and
# "refine" goes on with exact products where the measured residuals are above tol.
_STAGES = ("rough", "working", "measure", "refine")


def eigenpairs(
    operator: Reversible,
    wanted: Wanted,
    rng: np.random.RandomState,
    progress: Progress,
    checkpoint: Unsaved,
) -> eigensolver.Eigenpairs:
    """The largest pairs of the operator's symmetric form, beside the trivial one."""
    kernel: Any = operator.kernel
    N, k, solver = kernel.shape[0], wanted.n_pairs, wanted.solver
    top, is_sparse = operator.stationary.sqrt()[:, None], isinstance(kernel, Graph)
    many = k + 1 > N / 5
    if solver == "auto":
        small = N <= _DENSE_UP_TO or many
        solver = "dense" if small and wanted.precision != "half" else "krylov"
    # for many pairs of a sparse kernel, the filter's basis would be as large as the matrix
    if solver == "dense" or (is_sparse and solver == "krylov" and many):
        return _dense(operator, top, wanted)
    # 32 columns a pass do for many pairs, but not where few more than those exist
    n_columns = max(k + 4, 6) if k < 30 or k + 32 >= N else 32
    if is_sparse:
        n_columns = min(k + 5 if k < 30 else 32, N - 1)
    if kernel.x.shape[1] or not is_sparse:
        start = _start_block(kernel.x, kernel.held, top, n_columns, rng)
    else:
        start = torch.from_numpy(rng.standard_normal((N, n_columns))).to(top.device)
    if solver in ("lobpcg", "lanczos"):
        solve = eigensolver.lobpcg if solver == "lobpcg" else eigensolver.lanczos
        return solve(operator.apply, k, start, locked=top, tol=wanted.tol)
    if is_sparse:
        matrix = _filter.symmetric_form(kernel.matrix, operator.rscale.cpu().numpy())
        return _filter.filtered_krylov(
            matrix, k, start, locked=top, tol=wanted.tol, on_pass=progress
        )
    return _in_stages(operator, start, top, wanted, progress, checkpoint)


@algebra_on_one_thread()
def _in_stages(
    operator: Reversible,
    start: Tensor,
    top: Tensor,
    wanted: Wanted,
    progress: Progress,
    checkpoint: Unsaved,
) -> eigensolver.Eigenpairs:
    rows = operator.kernel.kept
    # vectors are the rows that this process keeps, until the last line
    start, locked = rows.mine(start), rows.mine(top)
    found = checkpoint.latest() or {}
    vectors, state = found.get("vectors", start), found.get("state")
    n_half, n_full = found.get("before", (0, 0))
    stages = dict(_stages(operator, start.shape[1], wanted))
    first = _STAGES[found["stage"]] if found else next(iter(stages))
    N, b = rows.N, start.shape[1]
    max_basis = min(400, max(3 * (wanted.n_pairs + b), _BASIS_BYTES // (8 * N)))
    pairs: Any = None
    for name in list(stages)[list(stages).index(first) :]:
        number, stage = _STAGES.index(name), stages[name]
        if name == "refine":
            if pairs is not None and (pairs.converged or progress.stopped):
                break
            if n_full >= _MAX_PASSES:
                break
            vectors = vectors[:, : wanted.n_pairs]
        before = (n_half, n_full)
        if name != first:
            checkpoint.save_vectors(number, before, vectors)
        measures = name == "measure"
        krylov = eigensolver.Krylov(
            vectors,
            vectors.shape[1] if measures else stage.n_pairs,
            locked=locked,
            tol=stage.tol,
            floor=stage.floor,
            max_passes=stage.max_passes - (n_full if name == "refine" else 0),
            max_basis=b if measures else max_basis,
            rows=rows,
            orthonormal=measures,
            state=state,
        )
        pairs = krylov.solve(
            partial(operator.apply, kernel=stage.kernel, rows=rows),
            progress.after(n_half + n_full),
            partial(checkpoint.save, number, before),
        )
        vectors, state = pairs.vectors, None
        if name == "rough":
            n_half = pairs.n_passes
            stage.kernel.release()
        else:
            n_full += pairs.n_passes
    pairs.n_passes, pairs.n_half_passes = n_half + n_full, n_half
    pairs.vectors = rows.whole(pairs.vectors)
    judged: eigensolver.Eigenpairs = pairs.judged(wanted.tol)
    return judged


def _stages(operator: Reversible, n_columns: int, wanted: Wanted) -> Iterator[tuple[str, Stage]]:
    exact: Any = operator.kernel
    k, tol = wanted.n_pairs, wanted.tol
    if wanted.precision == "half":
        # all columns, not only the wanted ones: they are the next stage's start block
        half = exact.in_precision("half")
        yield "rough", Stage(half, n_columns, _ROUGH_TOL, 0.0, _ROUGH_PASSES)
    floor = _FLOORS[exact.dtype]
    working, limits = exact, (0.7 * tol, floor, _MAX_PASSES)
    if exact.dtype == torch.float64 and wanted.precision in ("auto", "half"):
        wide = exact.spread > _MIXED_ABOVE
        working = exact.in_precision("mixed" if wide else "float32")
        limits = (max(0.5 * tol, 4e-7), 4e-7, 100)
    # what these products leave out, the measured ones do not
    if isinstance(working, Kernel):
        working = operator.without_negligible(working)
    yield "working", Stage(working, k, *limits)
    yield "measure", Stage(exact, k, tol, floor, 1)
    yield "refine", Stage(exact, k, tol, floor, _MAX_PASSES)


def _dense(operator: Reversible, top: Tensor, wanted: Wanted) -> eigensolver.Eigenpairs:
    held, rows = operator.kernel.held, operator.kernel.kept
    own = slice(held.start, held.stop)
    one = torch.eye(held.N, dtype=torch.float64, device=top.device)[own]
    M = held.collect(operator.apply(one))
    pairs = eigensolver.dense(M, wanted.n_pairs, held.collect(top))
    pairs.values, pairs.vectors, pairs.residuals = rows.first(
        pairs.values, pairs.vectors, pairs.residuals
    )
    pairs.vectors = pairs.vectors[own]
    return pairs.judged(wanted.tol)


def _start_block(x: Tensor, held: Rows, top: Tensor, b: int, rng: np.random.RandomState) -> Tensor:
    """sqrt(d) times the widest coordinates, their squares, and noise: (N, b)."""
    x = x.double()
    x = x - held.total(x.sum(0)) / held.N
    variance = held.total(x.square().sum(0)) / (held.N - 1)
    widest = variance.sort(descending=True, stable=True).indices[: max(1, b // 3)]
    x = x[:, widest] / variance[widest].sqrt().clamp(min=1e-300)
    columns = torch.cat((x, x * x), 1)
    n_noise = max(2, b - columns.shape[1])
    noise = held.normals(rng, n_noise).to(x.device)
    return torch.cat((columns[:, : b - n_noise], noise), 1) * top
