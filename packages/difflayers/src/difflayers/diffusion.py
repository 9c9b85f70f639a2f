"""Diffusion operators: smoothing patterns over a graph."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.ops import full_precision

from . import _checks, _kept
from .graph.ranks import RankLaplacian

# Chebyshev terms below this share of the result are left out.
_NEGLIGIBLE = 1e-14


def _n_terms(time: float) -> int:
    """How many Chebyshev terms exp(-time * lambda) has above rounding: about 8 sqrt(time)."""
    return int(20 + 9 * math.sqrt(time))


def _heat_series(time: Tensor, n_terms: int) -> list[Tensor]:
    """Chebyshev coefficients of exp(-time * lambda) on lambda in [0, 2], in T_k(lambda - 1).

    c_k = (2 - [k = 0]) / M sum_j cos(k theta_j) exp(-time (1 + cos theta_j)), by Gauss's rule with
    M nodes. time: float64 of any shape.
    """
    n_nodes = 2 * n_terms + 8
    j = torch.arange(n_nodes, dtype=torch.float64, device=time.device)
    theta = torch.pi * (j + 0.5) / n_nodes
    values = torch.exp(-time.unsqueeze(-1) * (1.0 + torch.cos(theta)))
    return [
        (1.0 if k == 0 else 2.0) / n_nodes * (values * torch.cos(k * theta)).sum(-1)
        for k in range(n_terms)
    ]


@functools.lru_cache(maxsize=256)
def heat_coefficients(time: float) -> tuple[float, ...]:
    """The coefficients of `_heat_series` for one number, without the negligible last ones."""
    with full_precision("cpu"):
        exact = torch.tensor(time, dtype=torch.float64, device="cpu")
        numbers = [float(c) for c in _heat_series(exact, _n_terms(time))]
    while len(numbers) > 1 and abs(numbers[-1]) < _NEGLIGIBLE:
        numbers.pop()
    return tuple(numbers)


def _chebyshev(
    shifted: Callable[[Tensor], Tensor], x: Tensor, coefficients: Sequence[float] | Sequence[Tensor]
) -> Tensor:
    """sum_k c_k T_k(A) x, where ``shifted(x)`` is A x with the spectrum of A in [-1, 1]."""
    before, now = x, None
    out = coefficients[0] * x
    for c in coefficients[1:]:
        after = shifted(x) if now is None else 2.0 * shifted(now) - before
        before, now = (x if now is None else now), after
        out = out + c * after
    return out


class Laplacian(Protocol):
    """What `apply` wants to know of a Laplacian L: a graph has it, and so has a matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its products."""

    @property
    def half(self) -> float:
        """Half an upper bound of the spectrum, for mode "heat"."""

    def laplacian(self, x: Tensor) -> Tensor:
        """L x."""

    def exponential(self, x: Tensor, time: float | Tensor) -> Tensor:
        """exp(-time L) x by eigenvectors, for mode "spectral"."""


def apply(
    graph: Laplacian,
    x: Tensor,
    mode: str,
    eta: float | Tensor,
    steps: int = 1,
    *,
    restart: float = 0.1,
    largest_eta: float = 1.0,
    coefficients: Sequence[float] | None = None,
) -> Tensor:
    """H(L) x, in x's dtype; sums are in the graph's dtype, under autocast too.

    simple: I - eta L. iterative, factored: (I - eta L)^steps. ppr: z <- (1 - restart)(I - eta L) z
    + restart x, ``steps`` times from x. spectral, heat: exp(-eta steps L).

    Args:
        eta: a number, or a tensor with one step for each item, none above ``largest_eta``.
        coefficients: the Chebyshev coefficients of mode "heat", where they are known.
    """
    with full_precision(x.device.type):
        start = x.to(graph.dtype)
        if mode == "spectral":
            out = graph.exponential(x, eta * steps)
        elif mode == "heat":
            time = eta * steps * graph.half
            series: Sequence[Any]
            if isinstance(time, Tensor):
                terms = _n_terms(steps * graph.half * largest_eta)
                series = [c.to(start) for c in _heat_series(time.double(), terms)]
            else:
                series = heat_coefficients(float(time)) if coefficients is None else coefficients
            out = _chebyshev(lambda y: graph.laplacian(y) / graph.half - y, start, series)
        else:
            share = restart if mode == "ppr" else 0.0
            out = start
            for _ in range(1 if mode == "simple" else steps):
                out = out - eta * graph.laplacian(out)
                out = (1.0 - share) * out + share * start if share else out
        return out.to(x.dtype)


class _Matrix:
    """A Laplacian (N, N), dense or ``sparse_coo``, on dim 0 of x (N, d) or (N, B, d)."""

    def __init__(self, L: Tensor, half: float = 1.0) -> None:
        self.L, self.dtype, self.half = L, L.dtype, half
        self.H: Tensor | None = None
        self.modes: tuple[Tensor, Tensor] | None = None

    def laplacian(self, x: Tensor) -> Tensor:
        return _product(self.L, x)

    def exponential(self, x: Tensor, time: float | Tensor) -> Tensor:
        """By ``H``, which is exp(-time L) already, or by ``modes``."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.H is not None:
            return _product(self.H.to(dtype), x)
        values, U = self.modes  # type: ignore[misc]
        kept = torch.exp(-time * values).to(dtype).view(-1, *[1] * (x.dim() - 1))
        return _product(U.to(dtype), kept * _product(U.mT.to(dtype), x))


class _Adjacency(_Matrix):
    """diag(deg) - W, which is not formed."""

    def __init__(self, W: Tensor, deg: Tensor) -> None:
        super().__init__(W)
        self.deg = deg

    def laplacian(self, x: Tensor) -> Tensor:
        return self.deg.view(-1, *[1] * (x.dim() - 1)) * x - _product(self.L, x)


def _product(M: Tensor, x: Tensor) -> Tensor:
    """M x over dim 0 of x (N, d) or (N, B, d), in M's dtype; M dense or sparse."""
    flat = x.flatten(1).to(M.dtype)
    out = torch.sparse.mm(M, flat) if M.is_sparse else M @ flat
    return out.view(x.shape)


class DiffusionOperator(ABC):
    """X -> H(L) X on dim 0 of (N, d) or (N, B, d), any dtype.

    ``precompute(L)`` with a Laplacian (N, N), dense or ``sparse_coo``, comes first, returning
    the operator itself.
    """

    @property
    @abstractmethod
    def _mode(self) -> str: ...

    _needs: ClassVar[tuple[str, str]] = ("L", "be given by precompute(L)")

    def __init__(self, eta: float, steps: int = 1) -> None:
        self.eta = _checks.number("eta", eta)
        self.steps = _checks.positive("steps", steps)
        self.restart = 0.0
        self._graph: _Matrix | None = None
        self._coefficients: tuple[float, ...] | None = None

    @staticmethod
    def create(mode: str, eta: float, steps: int = 3) -> DiffusionOperator:
        """The operator of a mode name, still without its Laplacian."""
        table: dict[str, Callable[..., DiffusionOperator]] = {
            "simple": SimpleDiffusion,
            "iterative": IterativeDiffusion,
            "spectral": SpectralDiffusion,
            "factored": FactoredDiffusion,
            "ppr": RestartDiffusion,
            "heat": HeatDiffusion,
        }
        checks.in_set("mode", mode, tuple(table))
        return table[mode](eta=eta, steps=steps)

    def precompute(self, L: Tensor) -> DiffusionOperator:
        """Keep L (N, N)."""
        self._graph = _Matrix(_checked(L))
        return self

    def __call__(self, X: Tensor) -> Tensor:
        if self._graph is None:
            name, must = self._needs
            must += " before the operator is applied"
            checks.fail(name, must, None, error=RuntimeError)
        checks.floating("X", X)
        N = self._graph.L.shape[0]
        if X.dim() not in (2, 3) or X.shape[0] != N:
            checks.fail("X", f"have shape (N, d) or (N, B, d) with N = {N}", tuple(X.shape))
        steps = 1 if self._mode == "spectral" else self.steps
        return apply(
            *(self._graph, X, self._mode, self.eta, steps),
            restart=self.restart,
            coefficients=self._coefficients,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eta={self.eta}, steps={self.steps})"


def _checked(L: Tensor) -> Tensor:
    checks.floating("L", L, may_be_sparse=True)
    checks.shape("L", L, (L.shape[-1], L.shape[-1]), "(N, N)")
    return L


class SimpleDiffusion(DiffusionOperator):
    """One explicit Euler step, (I - eta L) X; ``steps`` is ignored."""

    _mode = "simple"


class IterativeDiffusion(DiffusionOperator):
    """(I - eta L)^steps X.

    ``early_stop_tol`` is accepted and not used: all steps are made, without a look at values.
    """

    _mode = "iterative"

    def __init__(self, eta: float, steps: int = 3, early_stop_tol: float = 1e-6) -> None:
        super().__init__(eta, steps)
        self.early_stop_tol = _checks.number("early_stop_tol", early_stop_tol)


class SpectralDiffusion(DiffusionOperator):
    """The heat kernel U exp(-eta Lambda) U^T X by an eigendecomposition; ``steps`` is ignored.

    Eigenvalues are found in float64 and none is taken below 0, so that nothing grows at any eta. A
    mode whose eigenvalue is wrong by e is wrong by a factor exp(eta e): e is about 1e-16 |L| from
    the decomposition, and 1e-7 |L| where L itself was rounded to float32; for an eta beyond 1e5
    give L in float64. An L that needs a gradient gets it through the matrix exponential, which has
    one at repeated eigenvalues, too.
    """

    _mode = "spectral"

    def precompute(self, L: Tensor) -> SpectralDiffusion:
        """Decompose L: O(N^3) once."""
        self._graph = graph = _Matrix(_checked(L))
        dense = L.to_dense() if L.is_sparse else L
        if torch.is_grad_enabled() and L.requires_grad:
            graph.H = torch.linalg.matrix_exp(-self.eta * dense.double())
            return self

        def modes() -> tuple[Tensor, Tensor]:
            values, U = torch.linalg.eigh(dense.double())
            return values.clamp(min=0.0), U

        graph.modes = _kept.make(L.device.type, modes)
        return self


class RestartDiffusion(DiffusionOperator):
    """Personalised PageRank: z <- (1 - restart) (I - eta L) z + restart X, ``steps`` times from X.

    The fixed point is restart (I - (1 - restart)(I - eta L))^-1 x: however many the steps, X keeps
    its share, so the result cannot be over-smoothed.
    """

    _mode = "ppr"

    def __init__(self, eta: float, steps: int = 3, restart: float = 0.1) -> None:
        super().__init__(eta, steps)
        self.restart = _checks.number("restart", restart, 0.0, 1.0)


class HeatDiffusion(DiffusionOperator):
    """The heat kernel exp(-eta * steps * L) X by Chebyshev polynomials: no eigendecomposition.

    Exact to rounding, like `SpectralDiffusion` with time eta * steps, at the cost of about
    20 + 9 sqrt(eta steps) products with L (scaled by its largest degree where that exceeds 1).
    Rounding grows with the number of products: about 1e-7 (1e-16 in float64) times that number.
    """

    _mode = "heat"

    def precompute(self, L: Tensor) -> HeatDiffusion:
        """Bound the spectrum by Gershgorin: the largest row sum of |L|."""
        _checked(L)

        def half() -> float:
            rows = (
                torch.sparse.sum(L.coalesce().abs(), 1).to_dense()
                if L.is_sparse
                else L.abs().sum(-1)
            )
            return max(float(rows.max()) / 2.0, 1e-12) if rows.numel() else 1.0

        self._graph = graph = _Matrix(L, _kept.make(L.device.type, half))
        self._coefficients = heat_coefficients(self.eta * self.steps * graph.half)
        return self


class FactoredDiffusion(DiffusionOperator):
    """(1 - eta deg) X + eta W X, applied ``steps`` times: no Laplacian is formed.

    Three ways to one: ``FactoredDiffusion(W, deg, eta, steps)``; or ``FactoredDiffusion(eta,
    steps)`` and then ``precompute_from_graph(W, deg)`` or ``precompute(L)``.

    Args:
        W: (N, N) adjacency, dense or ``sparse_coo``. deg: (N,). Both are differentiable.
        eta: step; the operator amplifies where eta * deg > 1.

    Example:
        >>> W, deg = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.ones(2)
        >>> FactoredDiffusion(W, deg, 0.25)(torch.tensor([[1.0], [0.0]]))
        tensor([[0.7500],
                [0.2500]])
    """

    _mode = "factored"
    _needs = ("W", "be given by precompute_from_graph(W, deg) or precompute(L)")

    def __init__(
        self,
        W: Tensor | float | None = None,
        deg: Tensor | int | None = None,
        eta: float | None = None,
        steps: int | None = None,
    ) -> None:
        if W is not None and not isinstance(W, Tensor):
            # FactoredDiffusion(eta), FactoredDiffusion(eta, steps)
            if eta is not None or (deg is not None and steps is not None):
                checks.fail("W", "be a torch.Tensor", type(W).__name__, error=TypeError)
            W, deg, eta, steps = None, None, W, steps if deg is None else deg  # type: ignore[assignment]
        if eta is None:
            checks.fail("eta", "be given", None)
        super().__init__(eta, 1 if steps is None else steps)
        self.W: Tensor | None = None
        self.deg: Tensor | None = None
        if W is not None or deg is not None:
            self.precompute_from_graph(W, deg)  # type: ignore[arg-type]

    def precompute_from_graph(self, W: Tensor, deg: Tensor) -> FactoredDiffusion:
        """Keep the adjacency W (N, N) and the degrees (N,)."""
        checks.floating("W", W, may_be_sparse=True)
        checks.shape("W", W, (W.shape[-1], W.shape[-1]), "(N, N)")
        checks.floating("deg", deg)
        checks.shape("deg", deg, (W.shape[0],), lambda: f"(N,) = ({W.shape[0]},)")
        self.W, self.deg = W, deg
        self._graph = _Adjacency(W, deg)
        return self

    def precompute(self, L: Tensor) -> FactoredDiffusion:
        """deg is the diagonal of L and W the rest, negated: (I - eta L)^steps for any L."""
        _checked(L)
        if not L.is_sparse:
            deg = L.diagonal()
            return self.precompute_from_graph(torch.diag(deg) - L, deg)
        L = L.coalesce()
        i, j = L.indices()
        off = i != j
        W = torch.sparse_coo_tensor(
            L.indices()[:, off], -L.values()[off], L.shape, check_invariants=False
        )
        deg = L.values().new_zeros(L.shape[0]).index_put((i[~off],), L.values()[~off])
        return self.precompute_from_graph(W.coalesce(), deg)


def apply_diffusion(
    X: Tensor, L: Tensor | RankLaplacian, eta: float, mode: str = "simple", steps: int = 3
) -> Tensor:
    """Smooth X over a graph in one call.

    simple: (I - eta L) X. iterative and factored: (I - eta L)^steps X. spectral: exp(-eta L) X by
    eigendecomposition. ppr: restart 0.1, ``steps`` times. heat: exp(-eta steps L) X by Chebyshev.

    Args:
        X: (N, d) or (N, B, d), any floating dtype.
        L: Laplacian (N, N), dense or ``sparse_coo``; or a :class:`graph.RankLaplacian`: X is then
            what this rank holds of patterns that are split over ranks, and so is the result. Every
            mode but "spectral", with the gradient of X.

    Example:
        >>> L = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> apply_diffusion(torch.tensor([[1.0], [0.0]]), L, 0.25)
        tensor([[0.7500],
                [0.2500]])
    """
    checks.in_set("mode", mode, _checks.DIFFUSION_MODES)
    name = "iterative" if mode == "factored" else mode
    if isinstance(L, RankLaplacian):
        operator = DiffusionOperator.create(name, eta, steps)
        L.agreed(X, operator.eta, operator.steps, mode)
        return apply(L, X, name, operator.eta, operator.steps, restart=operator.restart)
    return DiffusionOperator.create(name, eta, steps).precompute(L)(X)
