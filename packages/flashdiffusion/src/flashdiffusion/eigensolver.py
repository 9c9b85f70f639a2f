"""The top eigenpairs of a symmetric Markov operator that is known by its products with blocks.

`Krylov` keeps every block it has multiplied (orthogonalised twice in float64) and takes Ritz pairs
of the whole space: one sweep over the kernel serves all wanted pairs at once. The known top vector
is locked and never multiplied. `lobpcg` and `lanczos` (scipy's) are there for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    return (math.sqrt(tol) * values.abs()).clamp(max=tol).clamp(min=min(floor, tol))


def _scaled(residuals: Tensor, values: Tensor, tol: float, floor: float) -> float:
    """The largest residual, in units in which tol is what is allowed."""
    if not tol < float("inf"):
        return float(residuals.max())
    return float((residuals * (tol / allowed(values, tol, floor))).max())


def _project(block: Tensor, bases: tuple[Tensor, ...], rows: Rows) -> Tensor:
    """`block` without its part along the rows of `bases`; taken twice, because the first rounds."""
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
        fresh = fresh[:, rows.start : rows.stop].to(block.device)
        fresh = _project(fresh, (known, q[~lost]), rows)
        r[lost] = 0.0
        q[lost] = rows.qr(fresh.T)[0].T
    if float(size.min()) < 1e-6 * float(scale):
        # nearly dependent rows: QR has magnified what was left along `known`
        q, again = rows.qr(_project(q, (known,), rows).T)
        q, r = q.T, again @ r
    return q, r.T, *agreed


class Krylov:
    """Block Krylov iteration on a symmetric operator A, one product with a block at a time.

    The space is spanned by orthonormal blocks; H is A within it. A step adds the block that was
    multiplied and prepares the next one; at times it also looks at the Ritz pairs, the best pairs
    within the space. Where the space has `max_basis` columns, a step restarts it with its best
    Ritz vectors (thick restart).

    Args:
        start: (N, b) start block, b >= 1; good guesses save passes.
        n_pairs: wanted pairs, beside the locked ones; fewer are found where no whole number of
            blocks lies between them and all there are.
        locked: (N, p) exact eigenvectors, orthonormal, to stay away from.
        tol: largest |A v - lambda v| that counts as converged; see `allowed` for small lambda.
        floor: residuals below it are not asked for: the precision of the products is not as good.
        max_passes: products before giving up.
        max_basis: columns kept before a thick restart.
        rows: which rows of all vectors (start, locked, products, results) this process keeps;
            None is all.
        orthonormal: the start block's columns are that, and stay away from `locked`.
        state: what `state()` of an earlier iteration gave: go on from there, with the same bits.
            `start` then only tells the sizes.

    Attributes:
        block: (N, b) float64, what is to be multiplied next.
        n_passes: products so far.
        residual: the largest one at the last look, in units in which tol is what is allowed.
        looked, restarted: whether the last step looked at the Ritz pairs, or restarted the basis.

    Example:
        >>> A = torch.diag(torch.linspace(1.0, 0.0, 50, dtype=torch.float64) ** 9)
        >>> krylov = Krylov(torch.randn(50, 4, dtype=torch.float64), 2)
        >>> while not krylov.step(A @ krylov.block):
        ...     pass
        >>> bool((krylov.ritz().values - A.diagonal()[:2]).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        start: Tensor,
        n_pairs: int,
        *,
        locked: Tensor | None = None,
        tol: float = 1e-6,
        floor: float = 0.0,
        max_passes: int = 300,
        max_basis: int = 400,
        rows: Rows | None = None,
        orthonormal: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.rows = rows = Rows(len(start)) if rows is None else rows
        N, p = len(start), 0 if locked is None else locked.shape[1]
        self.n_free = rows.N - p
        self.width = min(start.shape[1], self.n_free)
        self.n_pairs = min(n_pairs, self.n_free)
        self.tol, self.floor, self.max_passes = tol, floor, max_passes
        self.max_basis = min(max(max_basis, 2 * (self.n_pairs + self.width)), self.n_free)
        # [p + max_basis + b, N]: the locked vectors, then the basis
        self._known = start.new_empty((p + self.max_basis + self.width, N))
        if locked is not None:
            self._known[:p] = locked.T
        self._n_locked, self._basis = p, self._known[p:]
        self._H = start.new_zeros((self.max_basis + self.width,) * 2)
        self.n_columns = self.n_passes = self._next_look = self._last_look = 0
        self.residual, self.looked, self.restarted = float("inf"), False, False
        # at the last look: values, residuals, and the Ritz vectors in the basis (None: its rows)
        self._values = self._residuals = start.new_empty(0)
        self._combination: Tensor | None = None
        if state is not None:
            self._restore(**state)
        elif orthonormal:
            self._block = start[:, : self.width].T
        else:
            locked_rows = self._known[:p]
            block = _project(start[:, : self.width].T, (locked_rows,), rows)
            self._block, _ = _orthonormal(block, locked_rows, rows=rows)

    @property
    def block(self) -> Tensor:
        return self._block.T

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: tensors (of this process' rows) and numbers, by name."""
        m = self.n_columns
        return {
            "basis": self._basis[:m],
            "block": self._block,
            "H": self._H[:m, :m],
            "n_passes": self.n_passes,
            "next_look": self._next_look,
            "last_look": self._last_look,
            "residual": self.residual,
        }

    def _restore(
        self,
        basis: Tensor,
        block: Tensor,
        H: Tensor,
        n_passes: int,
        next_look: int,
        last_look: int,
        residual: float,
    ) -> None:
        self.n_columns = m = len(basis)
        self._basis[:m], self._block, self._H[:m, :m] = basis, block, H
        self.n_passes, self.residual = n_passes, residual
        self._next_look, self._last_look = next_look, last_look

    def solve(
        self,
        apply: Apply,
        on_pass: Callable[[int, float], object] | None = None,
        on_state: Callable[[Krylov], None] | None = None,
    ) -> Eigenpairs:
        """Steps with the products of `apply` until the pairs are good, or no more may be taken.

        Args:
            apply: (N, b) float64 -> (N, b) float64, the operator times a block; one pass each.
            on_pass: called with (passes, largest residual) at each look at the residuals; something
                true ends the solve.
            on_state: called with this iteration after each step but the last.
        """
        while True:
            ended = self.step(apply(self.block))
            if self.looked and on_pass is not None:
                ended = bool(on_pass(self.n_passes, self.residual)) or ended
            if ended:
                return self.ritz()
            if on_state is not None:
                on_state(self)

    def step(self, product: Tensor) -> bool:
        """Take in A times `block`, (N, b). Whether the iteration has ended."""
        remainder = self._add(product.T)
        m, b, rows = self.n_columns, self.width, self.rows
        filled = m + b > self.n_free
        full = filled or m + b > self.max_basis
        last = filled or self.n_passes >= self.max_passes
        due = self.n_passes >= self._next_look or full or last
        self.looked, self.restarted = filled or (m >= self.n_pairs and due), False
        ritz = tuple(torch.linalg.eigh(self._H[:m, :m])) if self.looked else ()
        R = None
        if self.looked and last:
            ritz = rows.first(*ritz)
        else:
            known = self._known[: self._n_locked + m]
            self._block, R, *agreed = _orthonormal(remainder, known, rows=rows, also=ritz)
            ritz = tuple(agreed)
        if not self.looked:
            return False
        before = self.residual
        self._look(ritz[0], ritz[1], remainder, R)
        if self.residual <= self.tol or last:
            return True
        if full:
            self._restart()
        since = self.n_passes - self._last_look
        self._next_look = self.n_passes + _until_next(self.residual, before, since, self.tol)
        self._last_look = self.n_passes
        return False

    def ritz(self) -> Eigenpairs:
        """The pairs of the last look, with the residuals that were measured there."""
        if not len(self._values):
            raise RuntimeError("no step has looked at the Ritz pairs yet: `looked` tells when")
        n, S = self.n_pairs, self._combination
        if S is None:
            vectors = self._basis[:n].T.clone()
        else:
            vectors = (S[:, :n].T @ self._basis[: len(S)]).T
        return Eigenpairs(
            self._values[:n], vectors, self._residuals, self.n_passes, self.residual <= self.tol
        )

    def _add(self, product: Tensor) -> Tensor:
        """Add the block to the basis; what of its product (b, N) lies outside of the basis."""
        m, b, p, rows = self.n_columns, self.width, self._n_locked, self.rows
        self._basis[m : m + b] = self._block
        # A symmetric operator takes a block to itself, the block before it and a new one. These
        # go first, and what rounding left along all others in a second pass.
        near, end = p + m - b if m > self.n_pairs + 3 * b else 0, p + m + b
        h = product.new_zeros(end, b)
        h[near:] = rows.total(wide_product(self._known[near:end], product))
        remainder = product.clone(memory_format=torch.contiguous_format)
        subtract_rows(remainder, h[near:], self._known[near:end])
        rest = rows.total(wide_product(self._known[:end], remainder))
        subtract_rows(remainder, rest, self._known[:end])
        h = (h + rest)[p:]
        H = self._H
        H[: m + b, m : m + b] = h
        H[m : m + b, : m + b] = h.T
        diagonal = H[m : m + b, m : m + b]
        H[m : m + b, m : m + b] = 0.5 * (diagonal + diagonal.T)
        self.n_columns, self.n_passes = m + b, self.n_passes + 1
        return remainder

    def _look(self, values: Tensor, S: Tensor, remainder: Tensor, R: Tensor | None) -> None:
        """Ritz pairs and their residuals. R (b, b): `remainder` = R times orthonormal rows."""
        m, n = self.n_columns, self.n_pairs
        self._values, self._combination = values.flip(0), S.flip(1)
        # A B = B H + Z e_last^T exactly, so this is |A v - lambda v| of the measured products
        tail = self._combination[m - self.width : m, :n]
        if R is not None:
            self._residuals = (R.T @ tail).norm(dim=0)
        else:
            self._residuals = self.rows.total((remainder.T @ tail).square().sum(0)).sqrt()
        self.residual = _scaled(self._residuals, self._values[:n], self.tol, self.floor)

    def _restart(self) -> None:
        """Keep the best Ritz vectors alone: they come first in the new basis."""
        S = self._combination
        if S is None:
            return
        kept = min(self.n_pairs + self.width // 2 + 1, self.n_columns - 1)
        self._basis[:kept] = S[:, :kept].T @ self._basis[: self.n_columns]
        self._H.zero_()
        self._H[range(kept), range(kept)] = self._values[:kept]
        self.n_columns, self.restarted, self._combination = kept, True, None


def block_krylov(
    apply: Apply,
    n_pairs: int,
    start: Tensor,
    *,
    on_pass: Callable[[int, float], object] | None = None,
    **options: Any,
) -> Eigenpairs:
    """The n_pairs algebraically largest eigenpairs of a symmetric operator: `Krylov.solve`.

    Args:
        apply, on_pass: of `Krylov.solve`.
        n_pairs, start, options: of `Krylov`.
    """
    return Krylov(start, n_pairs, **options).solve(apply, on_pass)


def _until_next(residual: float, before: float, n_passes: int, tol: float) -> int:
    """Passes until the residual is worth an eigh: half of those left at the rate of the last.

    Convergence quickens, and a look costs less than the pass that a late one wastes.
    """
    if not tol < residual < before < float("inf"):
        return 1
    left = n_passes * math.log(residual / tol) / math.log(before / residual)
    return int(min(max(1.0, 0.5 * left), 8.0))


def rayleigh_ritz(
    apply: Apply,
    vectors: Tensor,
    locked: Tensor | None = None,
    orthonormal: bool = False,
) -> Eigenpairs:
    """One pass: the best pairs within span(vectors), with measured residuals."""
    k = vectors.shape[1]
    return block_krylov(
        *(apply, k, vectors),
        tol=np.inf,
        max_passes=1,
        max_basis=k,
        locked=locked,
        orthonormal=orthonormal,
    )


def lobpcg(
    apply: Apply,
    n_pairs: int,
    start: Tensor,
    *,
    locked: Tensor | None = None,
    tol: float = 1e-6,
    max_passes: int = 300,
) -> Eigenpairs:
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
    apply: Apply,
    n_pairs: int,
    start: Tensor,
    *,
    locked: Tensor | None = None,
    tol: float = 1e-6,
    max_passes: int = 300,
) -> Eigenpairs:
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


def _counted(
    apply: Apply, start: Tensor, linear_operator: type, locked: Tensor | None = None
) -> tuple[Any, list[int]]:
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
    apply: Apply,
    vectors: np.ndarray,
    start: Tensor,
    locked: Tensor | None,
    tol: float,
    counted: list[int],
) -> Eigenpairs:
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
    matvec: Callable[[np.ndarray], np.ndarray],
    N: int,
    k: int = 8,
    tol: float = 0.0,
    maxiter: int | None = None,
    ncv: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
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
    matvec: Callable[[np.ndarray], np.ndarray],
    N: int,
    k: int = 8,
    tol: float = 1e-8,
    maxiter: int = 300,
    seed: int = 42,
) -> tuple[np.ndarray, np.ndarray]:
    """As `lanczos_eigsh`, by LOBPCG from a random block."""

    def apply(V: Tensor) -> Tensor:
        columns = [matvec(column) for column in V.numpy().T]
        return torch.from_numpy(np.stack(columns, 1))

    start = torch.from_numpy(np.random.default_rng(seed).standard_normal((N, k)))
    pairs = lobpcg(apply, k, start, tol=tol, max_passes=maxiter)
    return pairs.values.numpy(), pairs.vectors.numpy()
