"""The eigenpairs of one operator by sweeps of rising precision.

Each solve starts where the one before it ended; the last sweeps are those of the exact operator.
Checkpoints name the solve that they belong to by its stage: HALF, FAST, MEASURE or MEND.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import eigensolver
from ._checkpoint import Checkpoint
from ._group import Rows
from ._operator import Kernel, Reversible
from ._progress import Progress
from ._workers import algebra_on_one_thread

HALF, FAST, MEASURE, MEND = range(4)
_BASIS_BYTES = 96 * 2**20
_MAX_PASSES = 300
# Residuals that float32 products cannot be made to go below.
_FLOAT32_FLOOR = 2e-7
# Where a rough solve ends: below this fp16 distances find little that the next solve can use
# (results/half_rung.json), and what has not come so far in these passes is left to it.
HALF_TOL, HALF_PASSES = 3e-2, 20


@algebra_on_one_thread()
def climb(
    operator: Reversible, fast: Kernel, start: Tensor, top: Tensor, k: int, tol: float, *,
    half: Kernel | None, rows: Rows, saved: Checkpoint | None, progress: Progress,
) -> eigensolver.Eigenpairs:  # fmt: skip
    """HALF: a rough solve, if asked for; FAST: one to near tol; MEASURE: the pairs again, from an
    exact product; MEND: what is left.

    Vectors are the rows that this process keeps, until the last line.
    """
    N = len(start)
    max_basis = min(400, max(3 * (k + start.shape[1]), _BASIS_BYTES // (8 * N)))
    start, locked = rows.mine(start), rows.mine(top)
    two_precisions = fast is not operator.kernel

    def floor(kernel: Kernel) -> float:
        return _FLOAT32_FLOOR if kernel.dtype == torch.float32 else 1e-14

    found: dict[str, Any] = {} if saved is None else saved.latest() or {}
    stage = found.get("stage", FAST if half is None else HALF)
    state = found.get("state")
    vectors = found.get("vectors", start)
    n_half, n_full = found.get("before", (0, 0))

    def products(kernel: Kernel) -> eigensolver.Apply:
        return lambda V: operator.apply(V, kernel, rows)

    def keep(stage: int) -> Any:
        return None if saved is None else lambda at: saved.save(stage, (n_half, n_full), at)

    def shown(n_passes: int, residual: float) -> bool:
        return progress(n_half + n_full + n_passes, residual)

    def begin(stage: int) -> None:
        if saved is not None:
            saved.save_vectors(stage, (n_half, n_full), vectors)

    if stage == HALF and half is not None:
        # all columns, not only the wanted: they are the next solve's start block
        rough = eigensolver.block_krylov(
            products(half), start.shape[1], start, locked=locked, rows=rows, tol=HALF_TOL,
            max_basis=max_basis, max_passes=HALF_PASSES, on_pass=shown, resume=state,
            on_state=keep(HALF),
        )  # fmt: skip
        vectors, n_half = rough.vectors, rough.n_passes
        half.release()
        state = None
        begin(FAST)
    if stage <= FAST:
        pairs = eigensolver.block_krylov(
            products(fast), k, vectors, locked=locked, rows=rows,
            tol=max(0.5 * tol, 4e-7) if two_precisions else 0.7 * tol, max_basis=max_basis,
            max_passes=100 if two_precisions else _MAX_PASSES, on_pass=shown, resume=state,
            on_state=keep(FAST), floor=4e-7 if two_precisions else floor(fast),
        )  # fmt: skip
        vectors, n_full, state = pairs.vectors, pairs.n_passes, None
        begin(MEASURE)
    exact, worst = products(operator.kernel), float("inf")
    if stage <= MEASURE:
        # the pairs again, from a product of their own (in float64 where the input is)
        pairs = eigensolver.rayleigh_ritz(exact, vectors, locked, rows, orthonormal=True)
        vectors, n_full = pairs.vectors, n_full + 1
        limit = eigensolver.allowed(pairs.values, tol, floor(operator.kernel))
        worst = tol * float((pairs.residuals / limit).max())
        progress(n_half + n_full, worst)
    mends = stage == MEND or (worst > tol and n_full < _MAX_PASSES and not progress.stopped)
    if mends:
        if stage < MEND:
            begin(MEND)
        pairs = eigensolver.block_krylov(
            exact, k, vectors[:, :k], locked=locked, rows=rows, tol=tol, max_basis=max_basis,
            max_passes=_MAX_PASSES - n_full, on_pass=shown, resume=state, on_state=keep(MEND),
            floor=floor(operator.kernel),
        )  # fmt: skip
        n_full += pairs.n_passes
    pairs.n_passes, pairs.n_half_passes = n_half + n_full, n_half
    pairs.vectors = rows.whole(pairs.vectors)
    return pairs.judged(tol)


def dense(
    operator: Reversible, top: Tensor, k: int, tol: float, rows: Rows
) -> eigensolver.Eigenpairs:
    M = operator.apply(torch.eye(len(top), dtype=torch.float64, device=top.device))
    pairs = eigensolver.dense(M, k, top)
    pairs.values, pairs.vectors, pairs.residuals = rows.first(
        pairs.values, pairs.vectors, pairs.residuals
    )
    return pairs.judged(tol)


def start_block(x: Tensor, top: Tensor, b: int, rng: np.random.RandomState) -> Tensor:
    """sqrt(d) times the widest coordinates, their squares, and noise: (N, b)."""
    x = x.double() - x.double().mean(0)
    widest = x.var(0).sort(descending=True, stable=True).indices[: max(1, b // 3)]
    x = x[:, widest] / x[:, widest].std(0).clamp(min=1e-300)
    columns = torch.cat((x, x * x), 1)
    n_noise = max(2, b - columns.shape[1])
    noise = torch.from_numpy(rng.standard_normal((len(x), n_noise))).to(x.device)
    return torch.cat((columns[:, : b - n_noise], noise), 1) * top
