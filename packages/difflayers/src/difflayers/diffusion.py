"""Diffusion operators: smoothing patterns over a graph."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks, _kept

# Chebyshev terms below this share of the result are left out.
_NEGLIGIBLE = 1e-14


def _matmul(M: Tensor, x: Tensor) -> Tensor:
    """M x over dim 0 of x (N, d) or (N, B, d), in M's dtype; M dense or sparse."""
    flat = x.flatten(1).to(M.dtype)
    out = torch.sparse.mm(M, flat) if M.is_sparse else M @ flat
    return out.view(x.shape)


def heat_terms(time: float) -> int:
    """How many Chebyshev terms exp(-time * lambda) has above rounding: about 8 sqrt(time)."""
    return int(20 + 9 * math.sqrt(time))


def heat_coefficients(time: float | Tensor, terms: int | None = None) -> list[float] | list[Tensor]:
    """Chebyshev coefficients of exp(-time * lambda) on lambda in [0, 2], in T_k(lambda - 1).

    c_k = (2 - [k = 0]) / M sum_j cos(k theta_j) exp(-time (1 + cos theta_j)) (Gauss).
    A tensor time (any shape) gives tensors and needs ``terms``. Those of a number are kept.
    """
    if not isinstance(time, Tensor):
        return list(heat_numbers(float(time)))
    return _heat_series(time.double(), terms or 1)


def _heat_series(z: Tensor, n: int) -> list[Tensor]:
    nodes = 2 * n + 8
    j = torch.arange(nodes, dtype=torch.float64, device=z.device)
    theta = torch.pi * (j + 0.5) / nodes
    values = torch.exp(-z.unsqueeze(-1) * (1.0 + torch.cos(theta)))
    return [
        (1.0 if k == 0 else 2.0) / nodes * (values * torch.cos(k * theta)).sum(-1) for k in range(n)
    ]


@functools.lru_cache(maxsize=256)
def heat_numbers(time: float) -> tuple[float, ...]:
    """`heat_coefficients` of a number, kept."""
    with _kept.full_precision("cpu"):
        z = torch.tensor(time, dtype=torch.float64, device="cpu")
        numbers = [float(c) for c in _heat_series(z, heat_terms(time))]
    while len(numbers) > 1 and abs(numbers[-1]) < _NEGLIGIBLE:
        numbers.pop()
    return tuple(numbers)


def chebyshev(shifted, x: Tensor, coefficients: list) -> Tensor:  # type: ignore[no-untyped-def]
    """sum_k c_k T_k(A) x, where ``shifted(x)`` is A x with the spectrum of A in [-1, 1]."""
    before, now = x, None
    out = coefficients[0] * x
    for c in coefficients[1:]:
        after = shifted(x) if now is None else 2.0 * shifted(now) - before
        before, now = (x if now is None else now), after
        out = out + c * after
    return out


class DiffusionOperator(ABC):
    """X -> H(L) X on dim 0 of (N, d) or (N, B, d), any dtype.

    ``precompute(L)`` with a Laplacian (N, N), dense or ``sparse_coo``, comes first, returning
    the operator itself.
    """

    def __init__(self, eta: float, steps: int = 1) -> None:
        self.eta = _checks.number("eta", eta)
        self.steps = _checks.positive("steps", steps)
        self._L: Tensor | None = None

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
        checks.floating("L", L)
        checks.shape("L", L, (L.shape[-1], L.shape[-1]), "(N, N)")
        self._L = L
        return self

    def _laplacian(self, X: Tensor) -> Tensor:
        if self._L is None:
            checks.fail(
                "L",
                "be given by precompute(L) before the operator is applied",
                None,
                error=RuntimeError,
            )
        _check_nodes(X, self._L.shape[0])
        return self._L

    @abstractmethod
    def _apply(self, X: Tensor) -> Tensor: ...

    def __call__(self, X: Tensor) -> Tensor:
        with _kept.full_precision(X.device.type):
            return self._apply(X).to(X.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eta={self.eta}, steps={self.steps})"


def _check_nodes(X: Tensor, N: int) -> None:
    checks.floating("X", X)
    if X.dim() not in (2, 3) or X.shape[0] != N:
        checks.fail("X", f"have shape (N, d) or (N, B, d) with N = {N}", tuple(X.shape))


class SimpleDiffusion(DiffusionOperator):
    """One explicit Euler step, (I - eta L) X; ``steps`` is ignored."""

    def _apply(self, X: Tensor) -> Tensor:
        return X - self.eta * _matmul(self._laplacian(X), X)


class IterativeDiffusion(DiffusionOperator):
    """(I - eta L)^steps X.

    ``early_stop_tol`` is accepted and not used: all steps are made, which costs no look at values.
    """

    def __init__(self, eta: float, steps: int = 3, early_stop_tol: float = 1e-6) -> None:
        super().__init__(eta, steps)
        self.early_stop_tol = _checks.number("early_stop_tol", early_stop_tol)

    def _apply(self, X: Tensor) -> Tensor:
        L = self._laplacian(X)
        out = X.to(L.dtype)
        for _ in range(self.steps):
            out = out - self.eta * _matmul(L, out)
        return out


class SpectralDiffusion(DiffusionOperator):
    """The heat kernel U exp(-eta Lambda) U^T X by an eigendecomposition; ``steps`` is ignored.

    Eigenvalues are found in float64 and none is taken below 0, so that nothing grows at any eta. A
    mode whose eigenvalue is wrong by e is wrong by a factor exp(eta e): e is about 1e-16 |L| from
    the decomposition, and 1e-7 |L| where L itself was rounded to float32; for an eta beyond 1e5
    give L in float64. An L that needs a gradient gets it through the matrix exponential, which has
    one at repeated eigenvalues, too.
    """

    def precompute(self, L: Tensor) -> SpectralDiffusion:
        """Decompose L: O(N^3) once."""
        super().precompute(L)
        self._H: Tensor | None = None
        if torch.is_grad_enabled() and L.requires_grad:
            dense = L.to_dense() if L.is_sparse else L
            self._H = torch.linalg.matrix_exp(-self.eta * dense.double())
            return self

        def modes() -> tuple[Tensor, Tensor]:
            dense = L.to_dense() if L.is_sparse else L
            values, U = torch.linalg.eigh(dense.double())
            return torch.exp(-self.eta * values.clamp(min=0.0)), U

        self._filter, self._U = _kept.make(L.device.type, modes)
        return self

    def _apply(self, X: Tensor) -> Tensor:
        dtype = torch.promote_types(self._laplacian(X).dtype, torch.float32)
        if self._H is not None:
            return _matmul(self._H.to(dtype), X)
        U, kept = self._U.to(dtype), self._filter.to(dtype)
        return _matmul(U, kept.view(-1, *[1] * (X.dim() - 1)) * _matmul(U.mT, X))


class RestartDiffusion(DiffusionOperator):
    """Personalised PageRank: z <- (1 - restart) (I - eta L) z + restart X, ``steps`` times from X.

    The fixed point is restart (I - (1 - restart)(I - eta L))^-1 x: however many the steps, X keeps
    its share, so the result cannot be over-smoothed.
    """

    def __init__(self, eta: float, steps: int = 3, restart: float = 0.1) -> None:
        super().__init__(eta, steps)
        self.restart = _checks.number("restart", restart, 0.0, 1.0)

    def _apply(self, X: Tensor) -> Tensor:
        L = self._laplacian(X)
        start = X.to(L.dtype)
        out = start
        for _ in range(self.steps):
            out = (1.0 - self.restart) * (out - self.eta * _matmul(L, out)) + self.restart * start
        return out


class HeatDiffusion(DiffusionOperator):
    """The heat kernel exp(-eta * steps * L) X by Chebyshev polynomials: no eigendecomposition.

    Exact to rounding, like `SpectralDiffusion` with time eta * steps, at the cost of about
    20 + 9 sqrt(eta steps) products with L (scaled by its largest degree where that exceeds 1).
    Rounding grows with the number of products: about 1e-7 (1e-16 in float64) times that number.
    """

    def precompute(self, L: Tensor) -> HeatDiffusion:
        """Bound the spectrum by Gershgorin: the largest row sum of |L|."""
        super().precompute(L)

        def half() -> float:
            rows = (
                torch.sparse.sum(L.coalesce().abs(), 1).to_dense()
                if L.is_sparse
                else L.abs().sum(-1)
            )
            return max(float(rows.max()) / 2.0, 1e-12) if rows.numel() else 1.0

        self._half = _kept.make(L.device.type, half)
        self._coefficients = heat_coefficients(self.eta * self.steps * self._half)
        return self

    def _apply(self, X: Tensor) -> Tensor:
        L = self._laplacian(X)
        return chebyshev(
            lambda y: _matmul(L, y) / self._half - y, X.to(L.dtype), self._coefficients
        )


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
        checks.floating("W", W)
        checks.shape("W", W, (W.shape[-1], W.shape[-1]), "(N, N)")
        checks.floating("deg", deg)
        checks.shape("deg", deg, (W.shape[0],), lambda: f"(N,) = ({W.shape[0]},)")
        self.W, self.deg = W, deg
        return self

    def precompute(self, L: Tensor) -> FactoredDiffusion:
        """deg is the diagonal of L and W what is beside it: (I - eta L)^steps for any L."""
        super().precompute(L)
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

    def _apply(self, X: Tensor) -> Tensor:
        if self.W is None or self.deg is None:
            checks.fail(
                "W",
                "be given by precompute_from_graph(W, deg) or precompute(L) before the operator "
                "is applied",
                None,
                error=RuntimeError,
            )
        _check_nodes(X, self.W.shape[0])
        keep = (1.0 - self.eta * self.deg).view(-1, *[1] * (X.dim() - 1))
        out = X.to(self.W.dtype)
        for _ in range(self.steps):
            out = keep * out + self.eta * _matmul(self.W, out)
        return out


def apply_diffusion(
    X: Tensor, L: Tensor, eta: float, mode: str = "simple", steps: int = 3
) -> Tensor:
    """Smooth X over a graph in one call.

    simple: (I - eta L) X. iterative and factored: (I - eta L)^steps X. spectral: exp(-eta L) X by
    eigendecomposition. ppr: restart 0.1, ``steps`` times. heat: exp(-eta steps L) X by Chebyshev.

    Args:
        X: (N, d) or (N, B, d), any floating dtype.
        L: Laplacian (N, N), dense or ``sparse_coo``.

    Example:
        >>> L = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> apply_diffusion(torch.tensor([[1.0], [0.0]]), L, 0.25)
        tensor([[0.7500],
                [0.2500]])
    """
    checks.in_set("mode", mode, _checks.DIFFUSION_MODES)
    name = "iterative" if mode == "factored" else mode
    return DiffusionOperator.create(name, eta, steps).precompute(L)(X)
