"""Directed chains: stationary distribution and probability current (NESS: not in equilibrium)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from ._checks import Points
from ._operator import Kernel
from ._problem import Problem
from .kernel import column_bias

_DENSE_UP_TO = 64


class _Chain:
    """P_ij = exp(-beta score_ij + bias_j - lse_i) as float64 products from both sides."""

    def __init__(
        self,
        Q: Any,
        K: Any,
        beta: Any,
        alpha: Any,
        h: Any,
        score_mod: Any,
        tile: Any,
        precision: str,
    ) -> None:
        K = Q if K is None else K
        q, k, _, same = _checks.points_and_values(Q, K, K)
        if q.shape[0] != k.shape[0]:
            checks.fail("K", f"have as many rows as `Q` ({q.shape[0]})", k.shape[0])
        if q.shape[0] == 0:
            checks.fail("Q", "have at least 1 row", 0)
        beta, score = _checks.kernel_options(beta, score_mod, precision)
        problem = Problem(q, None if same else k, beta, score, precision=precision)
        self.points, self.kernel = q, Kernel(problem, tile)
        h = None if h is None else _checks.doob(h, k.shape[0], k)
        bias = column_bias(self.kernel, _checks.alpha_range(alpha), h)
        zero = torch.zeros(k.shape[0], dtype=torch.float64, device=k.device)
        self.bias = zero if bias is None else bias
        self.lse = self.kernel.log_sum_exp(self.bias)
        self.reverse = self.kernel.transposed()

    def forward(self, V: Tensor) -> Tensor:
        """P V: expectations one step ahead."""
        return self.kernel.biased(V, -self.lse, self.bias).double()

    def backward(self, V: Tensor) -> Tensor:
        """P^T V: where probability goes."""
        return self.reverse.biased(V, self.bias, -self.lse).double()

    def stationary(self, tol: float, max_iter: int) -> tuple[Tensor, float]:
        """pi with pi P = pi, sum 1; and sum |pi P - pi|."""
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs

        N, device = len(self.lse), self.lse.device
        if N <= _DENSE_UP_TO:
            PT = self.backward(torch.eye(N, dtype=torch.float64, device=device))
            values, vectors = torch.linalg.eig(PT)
            pi = vectors[:, values.real.argmax()].real
        else:

            def product(v: np.ndarray) -> np.ndarray:
                column = torch.from_numpy(np.ascontiguousarray(v.reshape(N, 1))).to(device)
                return self.backward(column).cpu().numpy()[:, 0]

            operator = LinearOperator((N, N), matvec=product, dtype=np.float64)
            try:
                _, found = eigs(
                    operator, 1, which="LR", v0=np.full(N, 1.0 / N), tol=0.1 * tol, maxiter=max_iter
                )
            except ArpackNoConvergence as error:
                found = error.eigenvectors
                if found.shape[1] == 0:
                    found = np.full((N, 1), 1.0 / N)
            pi = torch.from_numpy(np.ascontiguousarray(found[:, 0].real)).to(device)
        # the leading vector of a positive matrix has one sign; what is left is rounding
        pi = pi.abs()
        # one more step by hand mends the rounding and gives the residual
        pi = self.backward((pi / pi.sum())[:, None])[:, 0]
        pi = pi / pi.sum()
        residual = float((self.backward(pi[:, None])[:, 0] - pi).abs().sum())
        if residual > tol:
            _checks.warn_unconverged(
                f"the stationary distribution has not converged: sum |pi P - pi| is "
                f"{residual:.2e}, tol is {tol:.1e}",
            )
        return pi, residual


def stationary_distribution(
    Q: Points,
    K: Any = None,
    beta: float = 1.0,
    alpha: float = 0.5,
    h: Any = None,
    *,
    score_mod: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    tile: int | None = None,
    precision: str = "auto",
    tol: float = 1e-6,
    max_iter: int = 300,
) -> Points:
    """pi with pi P = pi and sum 1, for the row-stochastic P of FlashDiffusion on N states.

    K (or a score that is not symmetric) makes the chain directed: state i looks with q_i and is
    looked at as k_i. Found by Arnoldi iteration on P^T, a pass per step; the residual is measured.

    Args:
        Q: (N, d) points, numpy or torch.
        K: (N, d), same dtype; None is Q.
        beta, alpha, h, score_mod, tile, precision: as for FlashDiffusion.
        tol: largest sum |pi P - pi|; more is a ConvergenceWarning.
        max_iter: restarts of the Arnoldi iteration.

    Returns:
        (N,) of Q's kind and dtype, non-negative.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((100, 2))
        >>> float(stationary_distribution(X, X[:, ::-1].copy()).sum().round(6))
        1.0
    """
    tol = _checks.positive("tol", tol)
    checks.positive_int("max_iter", max_iter)
    chain = _Chain(Q, K, beta, alpha, h, score_mod, tile, precision)
    pi, _ = chain.stationary(tol, max_iter)
    return _checks.like_input(pi.to(chain.points.dtype), Q)


def probability_current(
    Q: Points,
    K: Any = None,
    V: Any = None,
    beta: float = 1.0,
    alpha: float = 0.5,
    h: Any = None,
    *,
    score_mod: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    tile: int | None = None,
    precision: str = "auto",
    tol: float = 1e-6,
    max_iter: int = 300,
) -> Points:
    """J V with the current J_ij = pi_i P_ij - pi_j P_ji, which is never stored.

    J is antisymmetric with zero row sums, and vanishes where the chain keeps detailed balance:
    for symmetric scores of one point set, at any alpha and h. With V = Q, row i is the net flow of
    probability through state i times where it goes.

    Args:
        Q, K: (N, d), as for stationary_distribution.
        V: (N,) or (N, r); None is Q.
        others: as for stationary_distribution.

    Returns:
        J V, shaped as V, of Q's kind and dtype.
    """
    tol = _checks.positive("tol", tol)
    checks.positive_int("max_iter", max_iter)
    chain = _Chain(Q, K, beta, alpha, h, score_mod, tile, precision)
    v = chain.points if V is None else _checks.as_tensor("V", V)
    N = len(chain.lse)
    if v.dim() not in (1, 2) or v.shape[0] != N:
        checks.fail("V", f"have shape ({N},) or ({N}, r)", tuple(v.shape))
    columns = (v[:, None] if v.dim() == 1 else v).to(chain.lse.device, torch.float64)
    pi, _ = chain.stationary(tol, max_iter)
    # J 1 = 0: what all rows share only costs digits
    columns = columns - columns.mean(0)
    current = pi[:, None] * chain.forward(columns) - chain.backward(pi[:, None] * columns)
    current = current[:, 0] if v.dim() == 1 else current
    return _checks.like_input(current.to(chain.points.dtype), Q)
