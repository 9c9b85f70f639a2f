"""Doob transforms of a diffusion map, and the committor: the chance to reach B before A."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks, distributed

from . import _checks, _graph
from ._operator import Reversible
from .dmap import DiffusionMap

# Beyond this the weights of P would underflow float32.
_WIDEST = 1e30
# Below this second eigenvalue (float32 sweeps may have found it) no part of the points is closed.
_CONNECTED = 1.0 - 1e-4
# A chance below it to step into a set cannot be told from none: sums of probabilities round.
_STEP = 1e-15


def doob_transform(dm: DiffusionMap, h: Any) -> DiffusionMap:
    """The map of the transformed chain P^h_ij = P_ij h_j / (P h)_i.

    P^h is reversible like P: it has the same kernel with weights w h, so its eigenpairs, stationary
    distribution and extension to new points come from the same sweeps.

    Args:
        dm: a fitted DiffusionMap.
        h: (N,) positive values at the fitted points (the landmarks, if it has them); the scale does
            not matter, and max h / min h is at most 1e30.

    Returns:
        A fitted DiffusionMap with the parameters of dm.

    Example:
        >>> X = np.random.default_rng(0).random((50, 2))
        >>> dm = DiffusionMap(beta=1.0, n_components=2).fit(X)
        >>> doob_transform(dm, np.linspace(1, 2, 50)).eigenvectors_.shape
        (50, 2)

    Source: Doob (1957); Coifman and Lafon's alpha is the case h = (column sums)^-alpha.
    """
    with dm.agreement() as agreed:
        values = _checks.doob(h, len(dm.X_fit_), torch.empty(0, device="cpu"))
        span = float(values.max() / values.min())
        if span > _WIDEST:
            checks.fail("h", "span at most a factor 1e30", f"{span:.1e}")
        agreed.equal["h"] = distributed.fingerprint(_checks.as_array(values))
    return dm.reweighted(values)


def committor(
    dm: DiffusionMap, A: Any, B: Any, *, tol: float = 1e-8, max_iter: int = 1000
) -> np.ndarray:
    """q_i, the probability that the chain from x_i reaches B before A.

    q = 0 on A, 1 on B and P q = q elsewhere. Solved in symmetric form (I - M) u = M sqrt(d) 1_B on
    the other points by conjugate gradients in float64, preconditioned with the slow eigenvectors
    that dm knows; each step is one pass.

    Args:
        dm: a fitted DiffusionMap.
        A, B: boolean masks (N,) over the fitted points, or index arrays; disjoint, not empty. An
            integer array of N zeros and ones could be both, and is refused.
        tol: largest |P q - q| outside A and B.
        max_iter: passes before giving up, with a ConvergenceWarning that tells the residual.

    Returns:
        (N,) float64 in [0, 1]; nan at points from which neither A nor B can be reached, with a
        warning that counts them.

    Source: E and Vanden-Eijnden, "Transition-path theory" (2010), section 2.
    """
    with dm.agreement() as agreed:
        tol = _checks.positive("tol", tol)
        checks.positive_int("max_iter", max_iter)
        N = len(dm.X_fit_)
        in_a, in_b = _mask("A", A, N), _mask("B", B, N)
        if bool((in_a & in_b).any()):
            checks.fail("A", "be disjoint from `B`", f"{int((in_a & in_b).sum())} points in both")
        agreed.equal["A"] = distributed.fingerprint(in_a.numpy())
        agreed.equal["B"] = distributed.fingerprint(in_b.numpy())
        agreed.equal["tol"] = distributed.fingerprint(tol, max_iter)
    operator = dm.operator()
    device = operator.weights.device
    ends = (in_a | in_b).to(device)
    reached = _reached(dm, operator, ends)
    inside = ~ends & reached
    root = operator.degree.sqrt()
    q = in_b.to(device, torch.float64)
    if bool(inside.any()):
        u, residual = _solve(dm, operator, inside, root, q * root, tol, max_iter)
        q = torch.where(inside, u / root, q)
        if residual > tol:
            _checks.warn_unconverged(
                f"the committor has not converged: max |P q - q| is {residual:.2e} after "
                f"{max_iter} passes, tol is {tol:.1e}",
            )
    q = q.clamp(0.0, 1.0)
    if not bool(reached.all()):
        _checks.warn(
            f"{int((~reached).sum())} of {N} points reach neither A nor B (they are apart from "
            f"both): their committor is nan",
        )
        q[~reached] = float("nan")
    return q.cpu().numpy()


def _reached(dm: DiffusionMap, operator: Reversible, ends: Tensor) -> Tensor:
    """(N,) bool: from which points a path leads to `ends` whose steps are more than rounding."""
    if isinstance(operator.kernel, _graph.Graph):
        return operator.kernel.leading_to(ends, operator.weights, _STEP)
    if float(dm.eigenvalues_[0]) < _CONNECTED:
        # a part that is closed to within rounding has an eigenvalue of 1
        return torch.ones_like(ends)
    reached = ends
    for _ in range(len(ends)):
        if bool(reached.all()):
            break
        further = reached | (operator.markov(reached.double()[:, None])[:, 0] > _STEP)
        if bool((further == reached).all()):
            break
        reached = further
    return reached


def _mask(name: str, points: Any, N: int) -> Tensor:
    _checks.plain(name, points)
    array = np.asarray(points.cpu() if isinstance(points, Tensor) else points)
    if array.ndim != 1 or (array.dtype.kind not in "biu" and len(array)):
        got = f"{array.dtype} of shape {array.shape}"
        checks.fail(name, "be a boolean mask or an array of indices", got)
    mask = np.zeros(N, dtype=bool)
    if array.dtype.kind == "b":
        if len(array) != N:
            checks.fail(name, f"have shape ({N},)", array.shape)
        mask = array
    elif len(array):
        if len(array) == N > 2 and not ((array != 0) & (array != 1)).any():
            checks.fail(
                name,
                "be a boolean mask or an array of indices",
                f"{N} integers, all 0 or 1",
                f"pass {name} == 1 for a mask, or np.unique({name}) for the points 0 and 1",
            )
        if array.min() < 0 or array.max() >= N:
            checks.fail(name, f"hold indices in [0, {N})", f"{array.min()} to {array.max()}")
        mask[array] = True
    if not mask.any():
        checks.fail(name, "not be empty", "no point")
    return torch.from_numpy(mask.copy())


def _solve(
    dm: DiffusionMap,
    operator: Any,
    inside: Tensor,
    root: Tensor,
    boundary: Tensor,
    tol: float,
    max_iter: int,
    source: Tensor | None = None,
) -> tuple[Tensor, float]:
    """(I - M) u = M boundary + source on `inside`: u (N,), zero outside, and max |P q - q|."""
    keep = inside.double()
    slow = torch.from_numpy(dm._fitted_eigenvectors()).to(root.device)
    # [N, k + 1]: constant and slow functions, without those that vanish inside
    coarse = torch.cat((torch.ones_like(slow[:, :1]), slow), 1) * (root * keep)[:, None]
    coarse, triangle = torch.linalg.qr(coarse)
    size = triangle.diagonal().abs()
    coarse = coarse[:, size > 1e-10 * size.max()]
    products = operator.apply(torch.cat((boundary[:, None], coarse), 1)) * keep[:, None]
    b = products[:, 0] if source is None else products[:, 0] + source * keep
    E = coarse.T @ coarse - coarse.T @ products[:, 1:]
    E = torch.linalg.cholesky(0.5 * (E + E.T) + 1e-14 * torch.eye(len(E), device=E.device))
    # M_ii = rscale^2 K_ii
    diagonal = (1.0 - operator.rscale**2 * operator.kernel.diagonal).clamp(min=1e-12)

    def precondition(r: Tensor) -> Tensor:
        slow_part = coarse @ torch.cholesky_solve((coarse.T @ r)[:, None], E)[:, 0]
        out: Tensor = keep * r / diagonal + slow_part
        return out

    u = coarse @ torch.cholesky_solve((coarse.T @ b)[:, None], E)[:, 0]
    r, p, rho = b, torch.zeros_like(u), 1.0
    residual = float("inf")
    for iteration in range(max_iter):
        if iteration % 50 == 0:
            # measured anew: the recurrence drifts
            r = b - u + operator.apply(u[:, None])[:, 0] * keep
            p, rho = torch.zeros_like(u), 1.0
        # r / sqrt(d) = P q - q
        residual = float((r / root).abs().max())
        if residual <= tol:
            break
        z = precondition(r)
        new = float(r @ z)
        p = z + (new / rho) * p
        rho = new
        Ap = p - operator.apply(p[:, None])[:, 0] * keep
        step = rho / float(p @ Ap)
        u, r = u + step * p, r - step * Ap
    return u, residual
