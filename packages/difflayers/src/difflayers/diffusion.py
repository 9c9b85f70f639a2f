"""Diffusion operators: smoothing patterns over a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks

# Chebyshev terms below this share of the result are left out.
_NEGLIGIBLE = 1e-14


def _matmul(M: Tensor, x: Tensor) -> Tensor:
    """M x over dim 0 of x (N, d) or (N, B, d), in M's dtype; M dense or sparse."""
    flat = x.flatten(1).to(M.dtype)
    out = torch.sparse.mm(M, flat) if M.is_sparse else M @ flat
    return out.view(x.shape)


def heat_coefficients(time: float | Tensor, terms: int | None = None) -> list[float] | list[Tensor]:
    """Chebyshev coefficients of exp(-time * lambda) on lambda in [0, 2], in T_k(lambda - 1).

    c_k = (2 - [k = 0]) / M sum_j cos(k theta_j) exp(-time (1 + cos theta_j)) (Gauss).
    A tensor time (any shape) gives tensors and needs ``terms``.
    """
    if isinstance(time, Tensor):
        z, n = time.double(), terms or 1
    else:
        z, n = torch.tensor(float(time), dtype=torch.float64), terms or int(20 + 2 * time)
    nodes = 2 * n + 8
    j = torch.arange(nodes, dtype=torch.float64, device=z.device)
    theta = torch.pi * (j + 0.5) / nodes
    values = torch.exp(-z.unsqueeze(-1) * (1.0 + torch.cos(theta)))
    table = [
        (1.0 if k == 0 else 2.0) / nodes * (values * torch.cos(k * theta)).sum(-1) for k in range(n)
    ]
    if isinstance(time, Tensor):
        return table
    numbers = [float(c) for c in table]
    while len(numbers) > 1 and abs(numbers[-1]) < _NEGLIGIBLE:
        numbers.pop()
    return numbers


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
    """x -> H(L) x on dim 0 of (N, d) or (N, B, d), any dtype.

    ``precompute(L)`` with a Laplacian (N, N), dense or ``sparse_coo``, comes first, returning
    the operator itself.
    """

    def __init__(self, eta: float, steps: int = 1) -> None:
        _checks.number("eta", eta)
        checks.positive_int("steps", steps)
        self.eta, self.steps = eta, steps
        self._L: Tensor | None = None

    @staticmethod
    def create(mode: str, eta: float, steps: int = 3) -> DiffusionOperator:
        """The operator of a mode name; "factored" is made from a graph instead."""
        table: dict[str, Callable[..., DiffusionOperator]] = {
            "simple": SimpleDiffusion,
            "iterative": IterativeDiffusion,
            "spectral": SpectralDiffusion,
            "ppr": RestartDiffusion,
            "heat": HeatDiffusion,
        }
        checks.in_set("mode", mode, tuple(table))
        return table[mode](eta, steps)

    def precompute(self, L: Tensor) -> DiffusionOperator:
        """Keep L (N, N)."""
        checks.floating("L", L)
        checks.shape("L", L, (L.shape[-1], L.shape[-1]), "(N, N)")
        self._L = L
        return self

    def _laplacian(self, x: Tensor) -> Tensor:
        if self._L is None:
            checks.fail(
                "L",
                "be given by precompute(L) before the operator is applied",
                None,
                error=RuntimeError,
            )
        _check_nodes(x, self._L.shape[0])
        return self._L

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor: ...

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x).to(x.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eta={self.eta}, steps={self.steps})"


def _check_nodes(x: Tensor, N: int) -> None:
    checks.floating("x", x)
    if x.dim() not in (2, 3) or x.shape[0] != N:
        checks.fail("x", f"have shape (N, d) or (N, B, d) with N = {N}", tuple(x.shape))


class SimpleDiffusion(DiffusionOperator):
    """One explicit Euler step, (I - eta L) x; ``steps`` is ignored."""

    def _apply(self, x: Tensor) -> Tensor:
        return x - self.eta * _matmul(self._laplacian(x), x)


class IterativeDiffusion(DiffusionOperator):
    """(I - eta L)^steps x."""

    def __init__(self, eta: float, steps: int = 3) -> None:
        super().__init__(eta, steps)

    def _apply(self, x: Tensor) -> Tensor:
        L = self._laplacian(x)
        out = x.to(L.dtype)
        for _ in range(self.steps):
            out = out - self.eta * _matmul(L, out)
        return out


class SpectralDiffusion(DiffusionOperator):
    """The heat kernel U exp(-eta Lambda) U^T x by an eigendecomposition; ``steps`` is ignored."""

    def precompute(self, L: Tensor) -> SpectralDiffusion:
        """Decompose L: O(N^3) once."""
        super().precompute(L)
        dense = L.to_dense() if L.is_sparse else L
        wide = torch.promote_types(L.dtype, torch.float32)
        values, self._U = torch.linalg.eigh(dense.to(wide))
        self._filter = torch.exp(-self.eta * values)
        return self

    def _apply(self, x: Tensor) -> Tensor:
        self._laplacian(x)
        modes = _matmul(self._U.mT, x)
        return _matmul(self._U, self._filter.view(-1, *[1] * (x.dim() - 1)) * modes)


class RestartDiffusion(DiffusionOperator):
    """Personalised PageRank: z <- (1 - restart) (I - eta L) z + restart x, ``steps`` times from x.

    The fixed point is restart (I - (1 - restart)(I - eta L))^-1 x: however many the steps, x keeps
    its share, so the result cannot be over-smoothed.
    """

    def __init__(self, eta: float, steps: int = 3, restart: float = 0.1) -> None:
        super().__init__(eta, steps)
        _checks.number("restart", restart, 0.0, 1.0)
        self.restart = restart

    def _apply(self, x: Tensor) -> Tensor:
        L = self._laplacian(x)
        start = x.to(L.dtype)
        out = start
        for _ in range(self.steps):
            out = (1.0 - self.restart) * (out - self.eta * _matmul(L, out)) + self.restart * start
        return out


class HeatDiffusion(DiffusionOperator):
    """The heat kernel exp(-eta * steps * L) x by Chebyshev polynomials: no eigendecomposition.

    Exact to rounding, like `SpectralDiffusion` with time eta * steps, at the cost of about
    20 + 2 eta steps products with L (scaled by its largest degree where that exceeds 1).
    """

    def precompute(self, L: Tensor) -> HeatDiffusion:
        """Bound the spectrum by Gershgorin: the largest row sum of |L|."""
        super().precompute(L)
        rows = (
            torch.sparse.sum(L.coalesce().abs(), 1).to_dense() if L.is_sparse else L.abs().sum(-1)
        )
        self._half = max(float(rows.max()) / 2.0, 1e-12)
        self._coefficients = heat_coefficients(self.eta * self.steps * self._half)
        return self

    def _apply(self, x: Tensor) -> Tensor:
        L = self._laplacian(x)
        return chebyshev(
            lambda y: _matmul(L, y) / self._half - y, x.to(L.dtype), self._coefficients
        )


class FactoredDiffusion(DiffusionOperator):
    """(1 - eta deg) x + eta W x, applied ``steps`` times: no Laplacian is formed.

    Args:
        W: (N, N) adjacency, dense or ``sparse_coo``. deg: (N,). Both are differentiable.
        eta: step; the operator amplifies where eta * deg > 1.
    """

    def __init__(self, W: Tensor, deg: Tensor, eta: float, steps: int = 1) -> None:
        super().__init__(eta, steps)
        checks.floating("W", W)
        checks.shape("W", W, (W.shape[-1], W.shape[-1]), "(N, N)")
        checks.shape("deg", deg, (W.shape[0],), lambda: f"(N,) = ({W.shape[0]},)")
        self.W, self.deg = W, deg

    def precompute(self, L: Tensor) -> FactoredDiffusion:
        """Nothing to do: W and deg say it all."""
        return self

    def _apply(self, x: Tensor) -> Tensor:
        _check_nodes(x, self.W.shape[0])
        keep = (1.0 - self.eta * self.deg).view(-1, *[1] * (x.dim() - 1))
        out = x.to(self.W.dtype)
        for _ in range(self.steps):
            out = keep * out + self.eta * _matmul(self.W, out)
        return out


def apply_diffusion(
    x: Tensor, L: Tensor, eta: float, mode: str = "simple", steps: int = 3
) -> Tensor:
    """Smooth x over a graph in one call.

    simple: (I - eta L) x. iterative and factored: (I - eta L)^steps x. spectral: exp(-eta L) x by
    eigendecomposition. ppr: restart 0.1, ``steps`` times. heat: exp(-eta steps L) x by Chebyshev.

    Args:
        x: (N, d) or (N, B, d), any floating dtype.
        L: Laplacian (N, N), dense or ``sparse_coo``.

    Example:
        >>> L = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> apply_diffusion(torch.tensor([[1.0], [0.0]]), L, 0.25)
        tensor([[0.7500],
                [0.2500]])
    """
    checks.in_set("mode", mode, _checks.DIFFUSION_MODES)
    name = "iterative" if mode == "factored" else mode
    return DiffusionOperator.create(name, eta, steps).precompute(L)(x)
