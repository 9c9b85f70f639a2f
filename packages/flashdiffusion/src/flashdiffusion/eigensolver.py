"""The top eigenpairs of a symmetric Markov operator that is known by its products with blocks.

`block_krylov` keeps every block it has multiplied (orthogonalised twice in float64) and takes Ritz
pairs of the whole space: one sweep over the kernel serves all wanted pairs at once. The known
top vector is locked and never multiplied. At the memory budget it restarts with its best Ritz
vectors (thick restart). `lobpcg` and `lanczos` (scipy's) are there for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._group import Rows
from ._workers import subtract_rows, wide_product

SOLVERS = ("auto", "dense", "krylov", "lobpcg", "lanczos")

Apply = Callable[[Tensor], Tensor]


@dataclass
class Eigenpairs:
    """values (k,) descending, vectors (N, k) orthonormal, residuals (k,) |A v - lambda v|.

    n_half_passes of the n_passes were in half precision. Of the pairs the first n_converged are
    within `allowed`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    n_passes: int
    converged: bool
    n_half_passes: int = 0
    n_converged: int = 0

    def judged(self, tol: float) -> Eigenpairs:
        """The one place that says what has converged. M has no eigenvalue above 1, and no NaN."""
        good = self.residuals <= allowed(self.values, tol)
        good &= torch.isfinite(self.values) & (self.values <= 1.0 + 1e-6)
        good &= torch.isfinite(self.vectors).all(0)
        self.n_converged = int(good.long().cumprod(0).sum())
        self.converged = bool(good.all())
        return self


def allowed(values: Tensor, tol: float, floor: float = 0.0) -> Tensor:
    """The residual at which a pair counts as converged: tol, and sqrt(tol) |lambda|.

    A vector whose residual is as large as its eigenvalue is noise, however small both are. `floor`
    is what the products' precision can reach.
    """
    return (tol**0.5 * values.abs()).clamp(max=tol).clamp(min=min(floor, tol))


def _scaled(residuals: Tensor, values: Tensor, tol: float, floor: float) -> float:
    """The largest residual, in units in which tol is what is allowed."""
    if not tol < float("inf"):
        return float(residuals.max())
    return float((residuals * (tol / allowed(values, tol, floor))).max())


@dataclass
class Krylov:
    """Where block_krylov stands after a pass: enough to go on from, with the same bits.

    basis (m, N) and the block (b, N) to be multiplied next, of the rows that this process keeps;
    H (m, m); `restarted` where the basis is not that of the pass before with a block more.
    """

    basis: Tensor
    block: Tensor
    H: Tensor
    n_passes: int
    next_check: int
    previous: float
    checked: int
    restarted: bool = False


def _project(block: Tensor, bases: tuple[Tensor, ...], rows: Rows) -> Tensor:
    """`block` without what lies along the rows of `bases`: twice, because the first time rounds."""
    for basis in (*bases, *bases):
        if len(basis):
            block = block - rows.total(block @ basis.T) @ basis
    return block


def _orthonormal(
    block: Tensor, known: Tensor, *, rows: Rows, also: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """Rows of `block` (b, N), orthogonal to those of `known`, made orthonormal to each other.

    Returns Q (b, N), R (b, b) with block = R Q, and rows.first of `also`. Directions that vanish
    are replaced by others, deterministically, with zero columns in R.
    """
    # the rows of R have the lengths of the block's columns: no sum over N
    q, r, *agreed = rows.qr(block.T, *also)
    q = q.T
    size = r.diagonal().abs()
    scale = r.norm(dim=0).max().clamp(min=1e-300)
    lost = size <= 1e-13 * scale
    if bool(lost.any()):
        n_lost = int(lost.sum())
        generator = torch.Generator().manual_seed(n_lost)
        fresh = torch.randn(n_lost, rows.N, generator=generator, dtype=block.dtype)
        fresh = rows.mine(fresh.T).T.to(block.device)
        fresh = _project(fresh, (known, q[~lost]), rows)
        r[lost] = 0.0
        q[lost] = rows.qr(fresh.T)[0].T
    if float(size.min()) < 1e-6 * float(scale):
        # nearly dependent rows: QR has magnified what was left along `known`
        q, again = rows.qr(_project(q, (known,), rows).T)
        q, r = q.T, again @ r
    return q, r.T, *agreed


def block_krylov(
    apply: Apply,
    n_pairs: int,
    start: Tensor,
    *,
    locked: Tensor | None = None,
    tol: float = 1e-6,
    max_passes: int = 300,
    max_basis: int = 400,
    on_pass: Callable[[int, float], object] | None = None,
    rows: Rows | None = None,
    orthonormal: bool = False,
    floor: float = 0.0,
    resume: Krylov | None = None,
    on_state: Callable[[Krylov], None] | None = None,
) -> Eigenpairs:
    """The n_pairs algebraically largest eigenpairs of a symmetric operator.

    Args:
        apply: (N, b) float64 -> (N, b) float64, the operator times a block; one pass each.
        n_pairs: wanted pairs, beside the locked ones; fewer are found where no whole number of
            blocks lies between them and all there are.
        start: (N, b) start block, b >= 1; good guesses save passes.
        locked: (N, p) exact eigenvectors, orthonormal, to stay away from.
        tol: largest |A v - lambda v| that counts as converged; see `allowed` for small lambda.
        max_passes: sweeps before giving up.
        max_basis: columns kept before a thick restart.
        on_pass: called with (passes, largest residual) at each look at the residuals; what it finds
            is returned where it gives something true.
        rows: which rows of all vectors (start, locked, what `apply` takes and gives, the result)
            this process keeps; None is all.
        orthonormal: the start block's columns are that, and stay away from `locked`.
        floor: residuals below it are not asked for: the precision of `apply` does not have them.
        resume: go on from there; `start` then only tells the sizes.
        on_state: called with the state after each pass but the last.
    """
    rows = Rows(len(start)) if rows is None else rows
    N, b = start.shape
    free = rows.N - (0 if locked is None else locked.shape[1])
    b = min(b, free)
    n_pairs = min(n_pairs, free)
    against = start.new_empty((0, N)) if locked is None else locked.T.contiguous()
    max_basis = min(max(max_basis, 2 * (n_pairs + b)), free)
    # [p + max_basis + b, N]: the locked vectors, those of the basis
    p = len(against)
    known = start.new_empty((p + max_basis + b, N))
    known[:p] = against
    basis = known[p:]
    H = start.new_zeros((max_basis + b, max_basis + b))
    m = n_passes = 0
    next_check = checked = 0
    previous = float("inf")
    if resume is None and orthonormal:
        block = start[:, :b].T
    elif resume is None:
        block, _ = _orthonormal(_project(start[:, :b].T, (against,), rows), against, rows=rows)
    else:
        m, block, n_passes = len(resume.basis), resume.block, resume.n_passes
        basis[:m], H[:m, :m] = resume.basis, resume.H
        next_check, previous, checked = resume.next_check, resume.previous, resume.checked
    while True:
        product = apply(block.T).T
        n_passes += 1
        basis[m : m + b] = block
        # a symmetric operator takes a block to itself, the one before it and a new one: those go
        # first, and what rounding left along all others in the pass that orthogonalises
        near, end = p + m - b if m > n_pairs + 3 * b else 0, p + m + b
        h = product.new_zeros(end, b)
        h[near:] = rows.total(wide_product(known[near:end], product))
        residual_block = product.clone(memory_format=torch.contiguous_format)
        subtract_rows(residual_block, h[near:], known[near:end])
        rest = rows.total(wide_product(known[:end], residual_block))
        subtract_rows(residual_block, rest, known[:end])
        h = (h + rest)[p:]
        H[: m + b, m : m + b] = h
        H[m : m + b, : m + b] = h.T
        diagonal = H[m : m + b, m : m + b]
        H[m : m + b, m : m + b] = 0.5 * (diagonal + diagonal.T)
        m += b
        filled = m + b > free
        full, last = filled or m + b > max_basis, filled or n_passes >= max_passes
        looks = filled or (m >= n_pairs and (n_passes >= next_check or full or last))
        ritz = tuple(torch.linalg.eigh(H[:m, :m])) if looks else ()
        R = None
        if looks and last:
            ritz = rows.first(*ritz)
        else:
            following, R, *found = _orthonormal(
                residual_block, known[: p + m], rows=rows, also=ritz
            )
            ritz = tuple(found)
        restarted = False
        if looks:
            values, S = ritz[0].flip(0), ritz[1].flip(1)
            # A B = B H + Z e_last^T exactly, so this is |A v - lambda v| of the measured products
            tail = S[m - b : m, :n_pairs]
            if R is not None:
                residuals = (R.T @ tail).norm(dim=0)
            else:
                residuals = rows.total((residual_block.T @ tail).square().sum(0)).sqrt()
            worst = _scaled(residuals, values[:n_pairs], tol, floor)
            stopped = on_pass is not None and bool(on_pass(n_passes, worst))
            if worst <= tol or last or stopped:
                vectors = (S[:, :n_pairs].T @ basis[:m]).T
                return Eigenpairs(values[:n_pairs], vectors, residuals, n_passes, worst <= tol)
            if full:
                keep = min(n_pairs + b // 2 + 1, m - 1)
                basis[:keep] = S[:, :keep].T @ basis[:m]
                H.zero_()
                H[range(keep), range(keep)] = values[:keep]
                m, restarted = keep, True
            next_check = n_passes + _until_next(worst, previous, n_passes - checked, tol)
            previous, checked = worst, n_passes
        block = following  # bound: the last look has returned
        if on_state is not None:
            on_state(
                Krylov(
                    basis[:m], block, H[:m, :m], n_passes, next_check, previous, checked, restarted
                )
            )


def _until_next(worst: float, previous: float, n_passes: int, tol: float) -> int:
    """Passes until the residual is worth an eigh: half of those left at the rate of the last.

    Convergence quickens, and a look costs less than the pass that a late one wastes.
    """
    if not tol < worst < previous < float("inf"):
        return 1
    left = n_passes * math.log(worst / tol) / math.log(previous / worst)
    return int(min(max(1.0, 0.5 * left), 8.0))


def rayleigh_ritz(
    apply: Apply, vectors: Tensor, locked: Tensor | None = None, rows: Rows | None = None,
    orthonormal: bool = False,
) -> Eigenpairs:  # fmt: skip
    """One pass: the best pairs within span(vectors), with measured residuals."""
    k = vectors.shape[1]
    return block_krylov(
        apply, k, vectors, locked=locked, tol=np.inf, max_passes=1, max_basis=k, rows=rows,
        orthonormal=orthonormal,
    )  # fmt: skip


def lobpcg(
    apply: Apply, n_pairs: int, start: Tensor, *, locked: Tensor | None = None,
    tol: float = 1e-6, max_passes: int = 300,
) -> Eigenpairs:  # fmt: skip
    """scipy's LOBPCG on the same operator; a dense solve where it has fewer than 5 rows a pair."""
    free = len(start) - (0 if locked is None else locked.shape[1])
    if free < 5 * n_pairs:
        eye = torch.eye(len(start), dtype=start.dtype, device=start.device)
        return dense(apply(eye), n_pairs, locked).judged(tol)
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import lobpcg as solve

    counted, operator = _counted(apply, start, LinearOperator)
    constraints = None if locked is None else locked.cpu().numpy()
    rows = Rows(len(start))
    against = start.new_empty((0, len(start))) if locked is None else locked.T
    block, _ = _orthonormal(_project(start.T, (against,), rows), against, rows=rows)
    _, vectors = solve(
        operator,
        block.T.cpu().numpy()[:, :n_pairs],
        Y=constraints,
        tol=tol,
        maxiter=max_passes,
        largest=True,
        verbosityLevel=0,
    )
    return _verified(apply, vectors, start, locked, tol, counted)


def lanczos(
    apply: Apply, n_pairs: int, start: Tensor, *, locked: Tensor | None = None,
    tol: float = 1e-6, max_passes: int = 300,
) -> Eigenpairs:  # fmt: skip
    """scipy's implicitly restarted Lanczos (ARPACK) on the same operator, one vector per pass."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    counted, operator = _counted(apply, start, LinearOperator, locked)
    try:
        _, vectors = eigsh(
            operator,
            n_pairs,
            which="LA",
            tol=0.1 * tol,
            v0=start[:, -1].cpu().numpy(),
            maxiter=max(1, max_passes * 4),
        )
    except ArpackNoConvergence as error:
        vectors = error.eigenvectors
        if vectors.shape[1] < n_pairs:
            missing = start[:, : n_pairs - vectors.shape[1]].cpu().numpy()
            vectors = np.concatenate((vectors, missing), 1)
    return _verified(apply, vectors, start, locked, tol, counted)


def _counted(apply: Apply, start: Tensor, linear_operator: type, locked: Tensor | None = None):
    """A scipy operator A - locked locked^T (deflated) and the list whose length is its passes."""
    counted: list[int] = []

    def product(block: np.ndarray) -> np.ndarray:
        counted.append(1)
        columns = torch.from_numpy(np.ascontiguousarray(block.reshape(len(block), -1)))
        columns = columns.to(start.device, start.dtype)
        out = apply(columns)
        if locked is not None:
            out = out - locked @ (locked.T @ columns)
        return out.cpu().numpy().reshape(block.shape)

    N = len(start)
    operator = linear_operator((N, N), matvec=product, matmat=product, dtype=np.float64)
    return counted, operator


def _verified(
    apply: Apply, vectors: np.ndarray, start: Tensor, locked: Tensor | None, tol: float,
    counted: list,
) -> Eigenpairs:  # fmt: skip
    block = torch.from_numpy(np.ascontiguousarray(vectors)).to(start.device, start.dtype)
    pairs = rayleigh_ritz(apply, block, locked)
    pairs.n_passes += len(counted)
    return pairs.judged(tol)


def dense(M: Tensor, k: int, top: Tensor | None = None) -> Eigenpairs:
    """The k largest pairs of a symmetric matrix, without that of the known vectors top (N, p)."""
    M = 0.5 * (M + M.T)
    # known pairs go to the far end of the spectrum
    values, vectors = torch.linalg.eigh(M if top is None else M - 2.0 * top @ top.T)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    residuals = (M @ vectors - vectors * values).norm(dim=0)
    return Eigenpairs(values, vectors, residuals, 1, False)


# ---- names of the published 0.1.2


def lanczos_eigsh(
    matvec: Callable[[np.ndarray], np.ndarray], N: int, k: int = 8, tol: float = 0.0,
    maxiter: int | None = None, ncv: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The k largest eigenvalues (k,) descending and eigenvectors (N, k), by scipy's eigsh.

    Args:
        matvec: (N,) -> (N,), a symmetric operator.
        tol, maxiter, ncv: eigsh's.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((N, N), matvec=lambda v: matvec(v.ravel()), dtype=np.float64)
    values, vectors = eigsh(operator, k, which="LA", tol=tol, maxiter=maxiter, ncv=ncv)
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def lobpcg_eigsh(
    matvec: Callable[[np.ndarray], np.ndarray], N: int, k: int = 8, tol: float = 1e-8,
    maxiter: int = 300, seed: int = 42,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """As `lanczos_eigsh`, by LOBPCG from a random block."""

    def apply(V: Tensor) -> Tensor:
        columns = [matvec(column) for column in V.numpy().T]
        return torch.from_numpy(np.stack(columns, 1))

    start = torch.from_numpy(np.random.default_rng(seed).standard_normal((N, k)))
    pairs = lobpcg(apply, k, start, tol=tol, max_passes=maxiter)
    return pairs.values.numpy(), pairs.vectors.numpy()
