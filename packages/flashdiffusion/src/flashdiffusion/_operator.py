"""Products with the matrix exp(-beta score) by backend, and Markov operators made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shared_kernels import device, dispatch
from shared_kernels.distributed import Ranks

from ._group import Rows, rows_of
from ._native import NativeProducts
from ._problem import Problem
from ._torch import TorchProducts
from ._triton.products import TritonProducts

_BACKENDS: dict[str, Any] = {
    "native": NativeProducts,
    "torch": TorchProducts,
    "triton": TritonProducts,
}
# Where a call is explained: what was chosen among, by product.
_explained: ContextVar[dict[str, str] | None] = ContextVar("explained", default=None)


@contextmanager
def explained() -> Iterator[dict[str, str]]:
    """Collect an explanation of each kind of product that runs in here."""
    found: dict[str, str] = {}
    token = _explained.set(found)
    try:
        yield found
    finally:
        _explained.reset(token)


class Kernel:
    """The matrix of a problem, (N, M), known by its products with vectors.

    Args:
        problem: points, beta, score and precision.
        tile: rows and columns of a tile.
        skip_below: tile pairs whose entries are all smaller are dropped; the points are then
            ordered in space.
        backend: "auto", "native" (compiled, CPU), "torch" (alias "cpu": tiled torch, any device)
            or "triton".
        ranks: processes that hold the same kernel and share its sweeps; each product is then
            collective, and whole on every rank.
    """

    # K_ii of a symmetric kernel; a sparse one has a vector here
    diagonal = 1.0
    # parts of the graph; known of a sparse kernel alone
    n_parts: int | None = None
    # whether the caller can compute the dense formula instead
    has_reference = False

    def __init__(
        self,
        problem: Problem,
        tile: int | None = None,
        skip_below: float | None = None,
        backend: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.problem, self.backend, self.ranks = problem, backend, ranks
        self.tile, self.skip_below = tile, skip_below
        self.x, self.shape, self.dtype = problem.x, problem.shape, problem.dtype
        self.same, self.symmetric = problem.same, problem.symmetric
        # what each backend has built from the points
        self._products: dict[str, Any] = {}

    @property
    def held(self) -> Rows:
        """Which points this process has: all of them."""
        return Rows(self.shape[0])

    @property
    def kept(self) -> Rows:
        """Which rows of a solve's vectors this process keeps."""
        return rows_of(self.ranks, self.shape[0])

    @property
    def spread(self) -> float:
        return self.problem.spread

    def transposed(self) -> Kernel:
        """The kernel between y and x, for sums over rows."""
        turned = self.problem.transposed()
        return Kernel(turned, self.tile, self.skip_below, self.backend, self.ranks)

    def in_precision(self, precision: str) -> Kernel:
        """The same matrix in another precision, without the entries that are negligible there."""
        problem = replace(self.problem, precision=precision)
        return Kernel(problem, self.tile, problem.negligible, self.backend, self.ranks)

    def leaving_out(self, below: float) -> Kernel:
        """The same matrix, where entries that are all smaller than `below` may be left out."""
        if self.skip_below is None or below <= self.skip_below:
            return self
        return Kernel(self.problem, self.tile, below, self.backend, self.ranks)

    # ---- backends

    def reasons(self, product: str = "matvec") -> dict[str, str | None]:
        """Backend -> why it cannot run "matvec" or "softmax" (rows shifted by their maximum)."""
        # in order of preference
        is_gpu = device.target(self.x).is_gpu
        names = ("triton", "torch", "native") if is_gpu else ("native", "torch", "triton")
        found: dict[str, str | None] = {}
        for name in names:
            backend = _BACKENDS[name]
            why_not = backend.why_not if product == "matvec" else backend.softmax_why_not
            found[name] = why_not(self.problem)
        return {**found, "reference": None} if self.has_reference else found

    def chosen(self, product: str) -> str:
        """The backend that runs this product; an error says why one that is asked for cannot."""
        op, reasons = f"flashdiffusion::{product}", self.reasons(product)
        found = _explained.get()
        if found is not None:
            found[op] = dispatch.explain(op, reasons)
        return dispatch.choose(op, self.backend, reasons)

    def explain(self, product: str) -> str:
        """Which backend would run this product, and why not another."""
        return dispatch.explain(f"flashdiffusion::{product}", self.reasons(product))

    def products(self, name: str) -> Any:
        """This matrix as one backend holds it."""
        if name not in self._products:
            made = _BACKENDS[name](self.problem, self.tile, self.skip_below, self.ranks)
            self._products[name] = made
        return self._products[name]

    def release(self) -> None:
        """Give back what the backends have built from the points."""
        self._products.clear()

    # ---- products

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (M, r) -> (N, r) in the kernel's dtype."""
        product: Tensor = self.products(self.chosen("matvec")).matvec(V)
        return product

    def density(self) -> Tensor:
        """Row sums K 1: (N,) float64."""
        one = torch.ones(self.shape[1], 1, dtype=torch.float64, device=self.x.device)
        return self.matvec(one)[:, 0].double()

    def softmax(self, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_j softmax_j(-beta score_ij + bias_j) V_j (N, r) and the log-sum-exp (N,)."""
        out, lse = self._shifted().softmax(V, bias)
        if self.problem.metric and self.shape[1] and not bool(torch.isfinite(lse).all()):
            raise FloatingPointError(
                "distances to a point overflow in this precision: leave out the far ones, or "
                "take another unit"
            )
        return out, lse

    def log_sum_exp(self, bias: Tensor | None = None) -> Tensor:
        """log sum_j exp(-beta score_ij + bias_j): (N,) float64."""
        return self.softmax(self.x.new_empty(self.shape[1], 0), bias)[1]

    def biased(self, V: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
        """sum_j exp(-beta score_ij + row_bias_i + column_bias_j) V_j: (N, r)."""
        return self._shifted().biased(V, row_bias, column_bias)

    def _shifted(self) -> TorchProducts:
        products: TorchProducts = self.products(self.chosen("softmax"))
        return products


def require_row_sums(kernel: Kernel, weights: Tensor, sums: Tensor) -> None:
    """No entry is negative, so (K w)_i >= K_ii w_i: what says otherwise is not K w."""
    # a float32 sum of N terms rounds
    slack = 1.0 - (1e-4 if kernel.dtype == torch.float32 else 1e-9)
    least = kernel.diagonal * weights
    good = torch.isfinite(sums) & (sums >= slack * least)
    if kernel.symmetric and not bool(good.all()):
        worst = float((sums / least)[~good][0])
        raise FloatingPointError(
            f"a row sum of the kernel is {worst:.6g} times its diagonal entry, and must be finite "
            f"and at least 1: the exponents have lost their digits; pass the points in float64, or "
            f"leave out the far ones"
        )


def _require_finite(out: Tensor, V: Tensor) -> None:
    # sums are cheaper than a look at each entry, and are finite only where all entries are
    if bool(torch.isfinite(out.sum())) or not bool(torch.isfinite(V).all()):
        return
    if not bool(torch.isfinite(out).all()):
        raise FloatingPointError(
            "a product with the kernel is not finite although the vectors are: the exponents have "
            "lost their digits; pass the points in float64, or leave out the far ones"
        )


class Reversible:
    """P_ij = K_ij w_j / (K w)_i and its symmetric form M, for a symmetric K with K_ii = 1.

    w = r^-alpha h with r = K 1: alpha-normalisation and Doob's h-transform are the same step. The
    degrees d = w * K w are P's stationary weights, M = diag(rscale) K diag(rscale) with
    rscale = sqrt(w / K w), and M sqrt(d) = sqrt(d).

    `weights`, `row_sums` = K w, `degree`, `rscale`: (N,) float64.
    """

    def __init__(self, kernel: Kernel, weights: Tensor, row_sums: Tensor | None = None) -> None:
        if row_sums is None:
            row_sums = kernel.matvec(weights[:, None])[:, 0].double()
        with kernel.held.agreed():
            require_row_sums(kernel, weights, row_sums)
        self.kernel, self.weights, self.row_sums = kernel, weights, row_sums
        self.degree = weights * row_sums
        self.rscale = (weights / row_sums).sqrt()

    @property
    def stationary(self) -> Tensor:
        """P's stationary distribution: (N,), sum 1."""
        return self.degree / self.kernel.held.total(self.degree.sum())

    @classmethod
    def normalised(cls, kernel: Kernel, alpha: float, h: Tensor | None = None) -> Reversible:
        """w = r^-alpha h: one pass for r, and one for K w unless w = 1."""
        density = kernel.density()
        with kernel.held.agreed():
            require_row_sums(kernel, torch.ones_like(density), density)
        weights = density**-alpha
        if h is not None:
            weights = weights * (h / h.max())
        return cls(kernel, weights, density if alpha == 0.0 and h is None else None)

    def without_negligible(self, kernel: Kernel) -> Kernel:
        """`kernel` without more entries than M's norm can show.

        Entries below t change M by less than t max(rscale) sum(rscale) in norm. That is N t where
        all row sums are 1, as `Problem.negligible` has it, and less where they are larger.
        """
        norm = float(self.rscale.max() * self.rscale.sum())
        return kernel.leaving_out(kernel.problem.negligible * len(self.rscale) / norm)

    def apply(self, V: Tensor, kernel: Kernel | None = None, rows: Rows | None = None) -> Tensor:
        """M V, float64, (N, r); `kernel` may be the same matrix in another precision.

        With `rows`, of V and of the product only those that this process keeps.
        """
        kernel = kernel or self.kernel
        rows = Rows(len(self.rscale)) if rows is None else rows
        scale = rows.mine(self.rscale)[:, None]
        # rounded before the ranks exchange it, not after: half the bytes
        scaled = rows.whole((V * scale).to(kernel.dtype))
        out = rows.mine(kernel.matvec(scaled)).double() * scale
        with kernel.held.agreed():
            _require_finite(out, V)
        return out

    def markov(self, V: Tensor) -> Tensor:
        """P V, float64, (N, r)."""
        out = self.kernel.matvec(V * self.weights[:, None]).double() / self.row_sums[:, None]
        with self.kernel.held.agreed():
            _require_finite(out, V)
        return out
