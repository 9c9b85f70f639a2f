"""Schroedinger bridges: the most likely way from one distribution to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks
from ._operator import Kernel
from ._problem import Problem

# Each stage of the annealing multiplies beta by at most this.
_ANNEAL = 8.0
_STAGE_TOL = 1e-2
_STAGE_ITERATIONS = 30
# The rate of convergence is looked at every so many iterations.
_RELAX_EVERY = 10


class Step(NamedTuple):
    """One time of a dynamic bridge: logarithms of both potentials and the marginal, each (N,)."""

    forward: Any
    backward: Any
    marginal: Any


@dataclass
class Bridge:
    """plan_ij = exp(f_i + g_j) (K^steps)_ij, whose row sums are mu and column sums nu.

    Attributes:
        potentials: f (N,), g (M,).
        marginal_error: sum |column sums - nu|; the row sums are mu to rounding.
        n_iter: Sinkhorn iterations, two passes each per step.
        steps: for steps > 1 a Step for each time 0 .. steps, else empty.
    """

    potentials: tuple[Any, Any]
    marginal_error: float
    n_iter: int
    steps: list[Step]
    _kernel: Kernel = field(repr=False)
    _logs: tuple[Tensor, Tensor] = field(repr=False)
    _times: int = field(repr=False)

    def apply(self, V: Any) -> Any:
        """plan @ V: (M,) or (M, r) -> (N,) or (N, r). The plan is not stored."""
        return self._product(V, self._kernel, *self._logs)

    def apply_transpose(self, U: Any) -> Any:
        """plan.T @ U: (N,) or (N, r) -> (M,) or (M, r)."""
        return self._product(U, self._kernel.transposed(), *reversed(self._logs))

    def _product(self, V: Any, kernel: Kernel, left: Tensor, right: Tensor) -> Any:
        v = _checks.as_tensor("V", V)
        if v.dim() not in (1, 2) or v.shape[0] != kernel.shape[1]:
            n = kernel.shape[1]
            checks.fail("V", f"have shape ({n},) or ({n}, r)", tuple(v.shape))
        out = (v[:, None] if v.dim() == 1 else v).to(left.device, torch.float64)
        log = right
        for _ in range(self._times):
            # a weighted mean and the logarithm of the weights' sum: nothing overflows
            mean, log = kernel.softmax(out, log)
            out = mean.double()
        out = out * (left + log).exp()[:, None]
        return _checks.like_input((out[:, 0] if v.dim() == 1 else out).to(v.dtype), V)


def schroedinger_bridge(
    X: Any,
    Y: Any,
    mu: Any = None,
    nu: Any = None,
    beta: float = 1.0,
    steps: int = 1,
    tol: float = 1e-6,
    *,
    max_iter: int = 1000,
    precision: str = "auto",
    tile: int | None = None,
) -> Bridge:
    """The coupling of mu and nu nearest in relative entropy to K^steps, K = exp(-beta |x-y|^2).

    For steps = 1 it minimises sum_ij plan_ij |x_i - y_j|^2 + (1 / beta) sum plan log plan: entropic
    optimal transport with epsilon = 1 / beta. Sinkhorn's iteration in logarithms, with beta raised
    in stages from one over the largest cost; every half-step is one tiled log-sum-exp, so memory
    stays O((N + M) tile) and a small epsilon cannot overflow.

    Args:
        X: (N, d) points, numpy or torch.
        Y: (M, d), same dtype. For steps > 1 the same points as X.
        mu: (N,) positive, sum 1; None is uniform.
        nu: (M,) positive, sum 1; None is uniform.
        beta: inverse temperature, 1 / epsilon.
        steps: number of steps of the chain between mu and nu.
        tol: largest marginal_error; more is a ConvergenceWarning.
        max_iter: iterations in the last stage.
        precision: as for FlashDiffusion.

    Returns:
        Bridge: potentials, lazily applied plan, marginals at each step.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((40, 2))
        >>> bridge = schroedinger_bridge(X, X + 1.0, beta=2.0)
        >>> bool(np.allclose(bridge.apply(np.ones(40)), 1 / 40))
        True

    Source: Leonard, "A survey of the Schroedinger problem" (2014); Peyre and Cuturi (2019), ch. 4.
    """
    x, y, _, same = _checks.points_and_values(X, Y, Y, ("X", "Y"))
    beta = _checks.positive("beta", beta)
    tol = _checks.positive("tol", tol)
    checks.positive_int("steps", steps)
    checks.positive_int("max_iter", max_iter)
    checks.in_set("precision", precision, _checks.PRECISIONS)
    if 0 in (x.shape[0], y.shape[0]):
        checks.fail("X", "have at least 1 row, like `Y`", (x.shape[0], y.shape[0]))
    if steps > 1 and not same:
        checks.fail(
            "steps", "be 1 where X differs from Y", steps, "pass the union of both as X and Y"
        )
    log_mu = _log_marginal("mu", mu, x)
    log_nu = _log_marginal("nu", nu, y)

    def kernel_at(b: float) -> Kernel:
        return Kernel(Problem(x, None if same else y, b, precision=precision), tile)

    # bounding box: at least the largest cost
    low = torch.minimum(x.amin(0), y.amin(0)).double()
    high = torch.maximum(x.amax(0), y.amax(0)).double()
    largest = float(((high - low) ** 2).sum())
    stages = [beta]
    while stages[0] * largest > 4.0 * _ANNEAL:
        stages.insert(0, stages[0] / _ANNEAL)
    g = torch.zeros_like(log_nu)
    n_iter = 0
    # both potentials are one, and its equation is solved in a few averaged steps
    solve = _symmetric_sinkhorn if same and torch.equal(log_mu, log_nu) else _sinkhorn
    for k, b in enumerate(stages):
        last = k == len(stages) - 1
        if k:
            # potentials are costs times beta
            g = g * (b / stages[k - 1])
        f, g, error, n = solve(
            kernel_at(b),
            log_mu,
            log_nu,
            g,
            steps,
            tol if last else _STAGE_TOL,
            max_iter if last else _STAGE_ITERATIONS,
        )
        n_iter += n
    if error > tol:
        _checks.warn_unconverged(
            f"the bridge has not converged: the marginals are off by {error:.2e} after {n_iter} "
            f"iterations, tol is {tol:.1e}",
        )
    kernel = kernel_at(beta)

    def out(values: Tensor) -> Any:
        return _checks.like_input(values.to(x.dtype), X)

    path = []
    if steps > 1:
        ahead, behind = _powers(kernel, g, steps), _powers(kernel.transposed(), f, steps)
        for s in range(steps + 1):
            before, after = behind[s], ahead[steps - s]
            path.append(Step(out(before), out(after), out((before + after).exp())))
    return Bridge((out(f), out(g)), error, n_iter, path, kernel, (f, g), steps)


def _log_marginal(name: str, weights: Any, points: Tensor) -> Tensor:
    N = points.shape[0]
    if weights is None:
        return torch.full((N,), 1.0 / N, dtype=torch.float64, device=points.device).log()
    w = _checks.as_tensor(name, weights).to(points.device, torch.float64)
    checks.shape(name, w, (N,), lambda: f"({N},)")
    if not bool((w > 0).all() and torch.isfinite(w).all()):
        checks.fail(
            name,
            "be positive",
            f"a smallest value of {float(w.min())}",
            "leave out points without mass",
        )
    if abs(float(w.sum()) - 1.0) > 1e-4:
        checks.fail(name, "sum to 1", float(w.sum()), f"pass {name} / {name}.sum()")
    return (w / w.sum()).log()


def _powers(kernel: Kernel, log: Tensor, steps: int) -> list[Tensor]:
    """[log, log(K e^log), .., log(K^steps e^log)]."""
    out = [log]
    for _ in range(steps):
        out.append(kernel.log_sum_exp(out[-1]))
    return out


def _symmetric_sinkhorn(
    kernel: Kernel,
    log_mu: Tensor,
    log_nu: Tensor,
    g: Tensor,
    steps: int,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, float, int]:
    """As `_sinkhorn`, for one point set and one marginal: f = g = log mu - log(K^steps e^f).

    The mean of a potential and of what the other half-step makes of it (Feydy et al. 2019): the
    plain iteration swaps the errors of f and g forever, their mean has none of it.
    """
    for n in range(1, max_iter + 1):
        # log(K^steps e^g): f makes the rows exact, and what is off is the columns
        f = log_mu - _powers(kernel, g, steps)[-1]
        sums = _powers(kernel, f, steps)[-1]
        error = float(((g + sums).exp() - log_nu.exp()).abs().sum())
        if error <= tol or n == max_iter:
            break
        g = 0.5 * (g + f)
    return f, g, error, n


def _sinkhorn(
    kernel: Kernel,
    log_mu: Tensor,
    log_nu: Tensor,
    g: Tensor,
    steps: int,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, float, int]:
    """(f, g, error, iterations): rows exact, `error` is the column sums' distance from nu.

    Half-steps are stretched by omega (successive over-relaxation): where plain iterations shrink
    the error by rho, omega = 2 / (1 + sqrt(1 - rho)) shrinks it by omega - 1, which for small
    epsilons is several times fewer iterations. rho is read off the errors as they come; where they
    grow, plain iterations go on from the best potentials, and the last iterations are plain.
    """
    reverse = kernel.transposed()
    mu, nu, row_error = log_mu.exp(), log_nu.exp(), 0.0
    f, kept = log_mu - _powers(kernel, g, steps)[-1], g
    omega, best, earlier, plain_until = 1.0, float("inf"), float("inf"), _RELAX_EVERY
    for n in range(1, max_iter + 1):
        sums = _powers(reverse, f, steps)[-1]
        error = float(((g + sums).exp() - nu).abs().sum())
        # stretched steps leave the rows inexact too
        error = max(error, row_error)
        if omega == 1.0 and (error <= tol or n == max_iter):
            break
        if omega > 1.0 and (error <= 0.5 * tol or n >= max_iter - 2 or not error < 1e2 * best):
            # rows exact again, and what is left by plain iterations
            plain_until = max_iter if error <= 0.5 * tol else n + 4 * _RELAX_EVERY
            omega, earlier, row_error = 1.0, float("inf"), 0.0
            g = log_nu - sums if error < 1e2 * best else kept
            f = log_mu - _powers(kernel, g, steps)[-1]
            continue
        if error < best:
            best, kept = error, g
        if n % _RELAX_EVERY == 0:
            if n >= plain_until and error < earlier < float("inf"):
                rate = (error / earlier) ** (1.0 / _RELAX_EVERY)
                # of plain iterations, from that of stretched ones (Young 1954)
                rho = min(1.0 - 1e-9, (rate + omega - 1.0) ** 2 / (rate * omega**2))
                if rate > omega - 1.0:
                    omega = max(omega, min(1.9998, 2.0 / (1.0 + (1.0 - rho) ** 0.5)))
            earlier = error
        g = g + omega * (log_nu - sums - g)
        sums = _powers(kernel, g, steps)[-1]
        if omega > 1.0:
            row_error = float(((f + sums).exp() - mu).abs().sum())
        f = f + omega * (log_mu - sums - f)
    return f, g, error, n
