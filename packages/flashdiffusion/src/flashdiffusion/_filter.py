"""Eigenpairs of a sparse symmetric Markov matrix: block Krylov on a Chebyshev filter of it.

A sparse product costs so little that orthogonalising after each would be most of the work. So
`eigensolver.block_krylov` is given a polynomial p(M) instead of M: it has the same eigenvectors,
the wanted end of the spectrum lies above 1 / cosh(..) and the rest is pressed below it, and one of
its sweeps is `degree` products. Values and residuals are measured with M itself in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ._workers import algebra_on_one_thread
from .eigensolver import Apply, Eigenpairs, allowed, block_krylov, rayleigh_ritz

# acosh(p's value at 1 over its largest below the cut): first to move the cut, then to solve. More
# leaves the wanted pairs near the cut below rounding, less leaves the work to orthogonalisation.
_FIRST_RISE, _RISE = 10.0, 2.1
_MOST_DEGREE = 400
_ROUGH_PASSES, _FIRST_SWEEPS, _SWEEPS, _STAGES = 4, 4, 40, 12
_BOUND_PASSES = 12
_BASIS_BYTES = 256 * 2**20
# What sweeps in float32 can reach; below it they are taken in float64.
_FLOAT32_TOL = 1e-6


def product(matrix: sparse.csr_matrix, dtype: torch.dtype, on: torch.device) -> Apply:
    """V -> matrix V in this dtype; by torch's sparse product where it has a fast one."""
    values = torch.from_numpy(matrix.data).to(on, dtype)
    if on.type == "cpu" and not torch.backends.mkl.is_available():
        ours = sparse.csr_matrix((values.numpy(), matrix.indices, matrix.indptr), matrix.shape)
        return lambda V: torch.from_numpy(ours @ V.to(dtype).numpy())
    # int32 where it is enough: half the memory of the indices
    index = torch.int32 if matrix.nnz < 2**31 - 1 else torch.int64
    with warnings.catch_warnings():
        # torch calls its CSR layout a beta
        warnings.filterwarnings("ignore", message="Sparse CSR")
        sparsely = torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr).to(on, index),
            torch.from_numpy(matrix.indices).to(on, index),
            values,
            matrix.shape,
            device=on,
            check_invariants=True,
        )
    return lambda V: sparsely @ V.to(dtype)


def chebyshev(multiply: Apply, V: Tensor, degree: int, low: float, cut: float) -> Tensor:
    """T_m(t(M)) V / T_m(t(1)), t taking [low, cut] to [-1, 1]: at most 1 in size, 1 at M = 1.

    The scaled three-term recurrence of Zhou and Saad (2007), Algorithm 2.
    """
    half, middle = 0.5 * (cut - low), 0.5 * (cut + low)
    first = half / (1.0 - middle)
    scale = first
    before, now = V, multiply(V).sub_(V, alpha=middle).mul_(first / half)
    for _ in range(2, degree + 1):
        following = 1.0 / (2.0 / first - scale)
        after = multiply(now).sub_(now, alpha=middle)
        after.mul_(2.0 * following / half).sub_(before, alpha=scale * following)
        before, now, scale = now, after, following
    return now


def _degree(rise: float, low: float, cut: float) -> int:
    """So that the filter is cosh(rise) times larger at 1 than below the cut."""
    return min(max(round(rise / math.acosh((2.0 - low - cut) / (cut - low))), 2), _MOST_DEGREE)


def _filtered(multiply: Apply, dtype: torch.dtype, degree: int, low: float, cut: float) -> Apply:
    return lambda V: chebyshev(multiply, V.to(dtype), degree, low, cut).double()


def _steepness(value: float, degree: int, low: float, cut: float) -> float:
    """At least |p(v) - p(u)| / |v - u| for an eigenvalue v above the cut and all u below it.

    So |M x - v x| is at most |p(M) x - p(v) x| over this. Near v it is p's derivative, far away the
    difference to what is left below the cut.
    """

    def t(x: float) -> float:
        return (2.0 * x - low - cut) / (cut - low)

    angle, top = math.acosh(max(t(value), 1.0 + 1e-9)), degree * math.acosh(t(1.0))
    at_value, below = math.cosh(degree * angle) / math.cosh(top), 1.0 / math.cosh(top)
    slope = degree * math.sinh(degree * angle) / math.cosh(top) / math.sinh(angle)
    far = (at_value - below) / (value - low)
    return max(min(slope * 2.0 / (cut - low), far), 1e-12)


@algebra_on_one_thread()
def filtered_krylov(
    matrix: sparse.csr_matrix,
    n_pairs: int,
    start: Tensor,
    *,
    locked: Tensor,
    tol: float,
    on_pass: Callable[[int, float], object] | None = None,
) -> Eigenpairs:
    """The n_pairs algebraically largest eigenpairs of M beside the known top one.

    Args:
        matrix: M (N, N) symmetric, its spectrum in [-1, 1].
        n_pairs: wanted pairs, well below N.
        start: (N, b) start block; more columns than n_pairs where that is below 30.
        locked: (N, 1) unit vector with M v = v.
        tol: largest |M v - lambda v|, measured in float64.
        on_pass: called with (products, largest residual); something true ends the solve.

    Source: Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006) 172 (filters).
    """
    on, (N, b) = start.device, start.shape
    # neighbours beside each other in memory: products are up to twice as fast
    order = torch.from_numpy(sparse.csgraph.reverse_cuthill_mckee(matrix, True).astype(np.int64))
    permutation = order.numpy()
    matrix = matrix[permutation][:, permutation].tocsr()
    matrix.sort_indices()
    order = order.to(on)
    start, locked = start[order], locked[order]
    exact, quick = product(matrix, torch.float64, on), product(matrix, torch.float32, on)
    spare = n_pairs + min(5, N - 2 - n_pairs)
    max_basis = max(5 * b, 2 * (spare + b), min(400, _BASIS_BYTES // (8 * N)))
    # the least eigenvalue, from below: Ritz value, residual and a margin (12 steps of Lanczos)
    noise = start[:, -1:].clone()
    least = block_krylov(
        lambda V: -exact(V), 1, noise, tol=1e-12, max_passes=_BOUND_PASSES, max_basis=_BOUND_PASSES
    )
    low = max(-1.0, -float(least.values[0]) - float(least.residuals[0]) - 0.01)
    rough = block_krylov(
        lambda V: quick(V).double(),
        spare,
        start,
        locked=locked,
        tol=1e-12,
        max_passes=max(_ROUGH_PASSES, -(-spare // b)),
        max_basis=max_basis,
    )
    n_passes = _BOUND_PASSES + rough.n_passes
    pairs, vectors, cut = rough, rough.vectors, float(rough.values[-1])
    multiply, dtype = quick, torch.float32
    wanted, sweeps, filter_tol, tightened = spare, max(_FIRST_SWEEPS, -(-spare // b) + 2), 0.0, 0.5
    best, least_worst = rough, float("inf")
    for stage in range(_STAGES):
        # below 1 by what the largest degree can tell apart
        cut = min(max(cut, low + 1e-3), 1.0 - 1e-5)
        degree = _degree(_RISE if stage else _FIRST_RISE, low, cut)
        if stage:
            wanted, sweeps = n_pairs, _SWEEPS
            steepness = _steepness(float(pairs.values[n_pairs - 1]), degree, low, cut)
            filter_tol = tightened * (tol if dtype == torch.float64 else max(tol, _FLOAT32_TOL))
            filter_tol *= steepness

        found = block_krylov(
            _filtered(multiply, dtype, degree, low, cut),
            wanted,
            vectors[:, :b],
            locked=locked,
            tol=max(filter_tol, 1e-300),
            max_passes=sweeps,
            max_basis=max_basis,
        )
        pairs = rayleigh_ritz(exact, found.vectors, locked, orthonormal=True)
        n_passes += found.n_passes * degree + 1
        limit = allowed(pairs.values[:n_pairs], tol)
        worst = tol * float((pairs.residuals[:n_pairs] / limit).max())
        # of a spectrum that falls to 0 a filter cannot tell the end apart, and may lose it
        best = pairs if worst <= least_worst else best
        least_worst = min(worst, least_worst)
        stopped = on_pass is not None and bool(on_pass(n_passes, worst))
        if worst <= tol or stopped or stage == _STAGES - 1:
            break
        if stage == 0:
            cut = max(cut, float(pairs.values[-1]))
            vectors = pairs.vectors
            continue
        tightened *= 0.3 if found.converged and dtype == torch.float64 else 1.0
        # long filters near 1 round away more than others: what float32 has not solved, float64 does
        multiply, dtype = exact, torch.float64
        vectors = torch.cat((pairs.vectors, start[:, : max(0, b - n_pairs)]), 1)
    vectors = torch.empty_like(best.vectors[:, :n_pairs])
    vectors[order] = best.vectors[:, :n_pairs]
    return Eigenpairs(
        best.values[:n_pairs], vectors, best.residuals[:n_pairs], n_passes, False
    ).judged(tol)


def symmetric_form(matrix: sparse.csr_matrix, rscale: Any) -> sparse.csr_matrix:
    """diag(rscale) K diag(rscale)."""
    scale = sparse.diags(np.asarray(rscale))
    return (scale @ matrix @ scale).tocsr()
