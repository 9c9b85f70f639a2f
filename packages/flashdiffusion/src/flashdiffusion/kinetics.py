"""Kinetics of a chain: passage times, reactive flux, and tests of a Markov model in time.

The first two are exact for the chain P of a fitted map, whose clock ticks once a step. The others
look at a trajectory's coordinates and count in frames.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from shared_kernels import checks, distributed

from . import _checks, _graph, doob
from .dmap import DiffusionMap
from .trajectory import _timescales


def mean_first_passage_time(
    dm: DiffusionMap, B: Any, *, tol: float = 1e-8, max_iter: int = 1000
) -> np.ndarray:
    """tau_i, the mean number of steps of the chain from x_i until it is in B.

    tau = 0 on B and tau = 1 + P tau elsewhere, solved like the committor: conjugate gradients on
    the symmetric form, one pass a step.

    Args:
        dm: a fitted DiffusionMap.
        B: boolean mask (N,) over the fitted points, or indices; not empty.
        tol: largest |1 + P tau - tau| / max tau outside B.
        max_iter: passes before giving up, with a ConvergenceWarning.

    Returns:
        (N,) float64 in steps of P; inf where B cannot be reached.

    Example:
        >>> X = np.random.default_rng(0).random((50, 2))
        >>> dm = DiffusionMap(beta=5.0, n_components=2).fit(X)
        >>> bool((mean_first_passage_time(dm, [0]) >= 0).all())
        True

    Source: Norris, "Markov chains" (1997), theorem 1.3.5.
    """
    with dm.agreement() as agreed:
        tol = _checks.positive("tol", tol)
        checks.positive_int("max_iter", max_iter)
        in_b = doob._mask("B", B, len(dm.X_fit_))
        agreed.equal["B"] = distributed.fingerprint(in_b.numpy())
        agreed.equal["tol"] = distributed.fingerprint(tol, max_iter)
    operator = dm.operator()
    device = operator.weights.device
    reached = doob._reached(dm, operator, in_b.to(device))
    inside = ~in_b.to(device) & reached
    root = operator.degree.sqrt()
    root = root / root.max()
    tau = torch.zeros_like(root)
    if bool(inside.any()):
        # the scale of tau is estimated by the Rayleigh quotient of the constant function
        nothing = torch.zeros_like(root)
        scale = 1.0
        for _ in range(3):
            u, residual = doob._solve(
                dm, operator, inside, root, nothing, tol * scale, max_iter, source=root
            )
            tau = torch.where(inside, u / root, 0.0)
            longest = float(tau.max())
            if residual <= tol * longest:
                break
            scale = longest
        if residual > tol * max(longest, 1.0):
            _checks.warn_unconverged(
                f"the passage times have not converged: max |1 + P tau - tau| is {residual:.2e} "
                f"after {max_iter} passes, {longest:.2e} is the longest, tol is {tol:.1e}",
            )
    tau = tau.clamp(min=0.0)
    tau[~reached] = float("inf")
    return tau.cpu().numpy()


class ReactiveFlux(NamedTuple):
    """Transition-path theory of A -> B.

    `committor` q (N,), `flux` transitions per step, `rate` per step spent last in A,
    `mean_first_passage_time` 1 / rate, `density` (N,) of reactive paths, normalised, and `current`:
    the net flux i -> j as CSR where the kernel is sparse, else None.
    """

    committor: np.ndarray
    flux: float
    rate: float
    mean_first_passage_time: float
    density: np.ndarray
    current: Any


def reactive_flux(dm: DiffusionMap, A: Any, B: Any, **options: Any) -> ReactiveFlux:
    """How often the chain goes from A to B, and where it passes.

    With q the committor and pi the stationary distribution, flux = sum_{i in A} pi_i (P q)_i,
    rate = flux / sum pi (1 - q), density ~ pi q (1 - q), current_ij = max(0, f_ij - f_ji) with
    f_ij = pi_i (1 - q_i) P_ij q_j.

    Args:
        dm: a fitted DiffusionMap.
        A, B: boolean masks (N,) over the fitted points, or indices; disjoint, not empty.
        options: of `committor`.

    Returns:
        ReactiveFlux.

    Source: Metzner, Schuette and Vanden-Eijnden, Multiscale Model. Simul. 7 (2009) 1192.
    """
    q = doob.committor(dm, A, B, **options)
    in_a = doob._mask("A", A, len(q)).numpy()
    operator = dm.operator()
    degree = operator.degree.cpu().numpy()
    pi = degree / degree.sum()
    known = np.nan_to_num(q)
    flux = float((pi * dm.markov(known))[in_a].sum())
    rate = flux / float((pi * (1.0 - known))[~np.isnan(q)].sum())
    density = pi * known * (1.0 - known)
    total = density.sum()
    current = None
    if isinstance(operator.kernel, _graph.Graph):
        # pi_i P_ij = K_ij w_i w_j / sum d
        scale = sparse.diags(operator.weights.cpu().numpy())
        steps = (scale @ operator.kernel.matrix @ scale).tocoo() / degree.sum()
        steps = sparse.coo_matrix(steps)
        # f_ij - f_ji = pi_i P_ij (q_j - q_i)
        net = steps.data * np.maximum(known[steps.col] - known[steps.row], 0.0)
        current = sparse.csr_matrix((net, (steps.row, steps.col)), shape=steps.shape)
        current.eliminate_zeros()
    return ReactiveFlux(
        q,
        flux,
        rate,
        1.0 / rate if rate > 0.0 else float("inf"),
        density / (total if total > 0.0 else 1.0),
        current,
    )


def _coordinates(coordinates: Any) -> np.ndarray:
    if isinstance(coordinates, DiffusionMap):
        coordinates.require_whole()
        return np.asarray(coordinates.eigenvectors_)
    x = _checks.as_tensor("coordinates", coordinates).double().numpy()
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not np.isfinite(x).all():
        checks.fail("coordinates", "be finite of shape (T, k)", x.shape)
    return x


def implied_timescales(coordinates: Any, lags: Any) -> np.ndarray:
    """-lag / ln rho_k(lag) of the time-lagged correlation of the coordinates, for several lags.

    Where the motion along them is Markovian the curves are flat: a lag is long enough from there
    on. `plots.plot_timescales` draws them.

    Args:
        coordinates: (T, k) in the order of time, or what `slow_manifold` returned.
        lags: frames, each at least 1.

    Returns:
        (lags, k) in frames, descending in each row; nan where a correlation is not positive.

    Source: Swope, Pitera and Suits, J. Phys. Chem. B 108 (2004) 6571.
    """
    x = _coordinates(coordinates)
    _checks.plain("lags", lags)
    lags = np.atleast_1d(np.asarray(lags))
    if lags.ndim != 1 or lags.dtype.kind not in "iu" or not len(lags) or lags.min() < 1:
        checks.fail("lags", "be ints of at least 1", repr(lags))
    if lags.max() >= len(x) - 1:
        checks.fail("lags", f"be below {len(x) - 1} for {len(x)} frames", int(lags.max()))
    return np.stack([_timescales(x, int(lag)) * lag for lag in lags])


def free_energy(
    coordinates: Any, *, weights: Any = None, components: tuple[int, ...] = (0, 1), bins: int = 50
) -> tuple[np.ndarray, list[np.ndarray]]:
    """F = -ln p over one or two coordinates, in units of kT, 0 at its minimum.

    Args:
        coordinates: (T, k), or a fitted map.
        weights: (T,) of the frames; None counts them.
        components: one or two columns.
        bins: along each.

    Returns:
        F (bins,) or (bins, bins), inf where no frame fell, and the edges along each axis.
    """
    x = _coordinates(coordinates)
    if len(components) not in (1, 2) or not all(0 <= c < x.shape[1] for c in components):
        checks.fail("components", f"be one or two indices in [0, {x.shape[1]})", components)
    checks.positive_int("bins", bins)
    if weights is not None:
        _checks.plain("weights", weights)
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(x),) or not (np.isfinite(weights) & (weights >= 0)).all():
            checks.fail("weights", f"be finite, not negative, of shape ({len(x)},)", weights.shape)
    p, edges = np.histogramdd(x[:, list(components)], bins=bins, weights=weights)
    with np.errstate(divide="ignore"):
        F = -np.log(p / p.sum())
    return F - F[np.isfinite(F)].min(), list(edges)


class ChapmanKolmogorov(NamedTuple):
    """`lags` (n,), `predicted` (n, s, s) = T(lag)^k, `estimated` (n, s, s) = T(k lag), `error`."""

    lags: np.ndarray
    predicted: np.ndarray
    estimated: np.ndarray
    error: float


def chapman_kolmogorov(states: Any, lag: int, n_steps: int = 5) -> ChapmanKolmogorov:
    """Does T(lag)^k predict T(k lag)? Transition matrices are counted between states.

    Args:
        states: (T,) integers from 0, the state of each frame; make them by cutting a coordinate
            (np.digitize) or by clustering.
        lag: frames, at least 1.
        n_steps: k = 1 .. n_steps.

    Returns:
        ChapmanKolmogorov; error is the largest |predicted - estimated|.

    Source: Prinz et al., J. Chem. Phys. 134 (2011) 174105.
    """
    _checks.plain("states", states)
    s = np.asarray(states)
    if s.ndim != 1 or s.dtype.kind not in "iu" or not len(s) or s.min() < 0:
        checks.fail("states", "be (T,) integers from 0", f"{s.dtype} of shape {s.shape}")
    checks.positive_int("lag", lag)
    checks.positive_int("n_steps", n_steps)
    if lag * n_steps >= len(s):
        checks.fail("lag", f"be below {len(s) / n_steps:.0f} for {n_steps} steps", lag)
    n = int(s.max()) + 1
    lags = lag * np.arange(1, n_steps + 1)
    estimated = np.stack([_transition_matrix(s, int(k), n) for k in lags])
    predicted = np.stack([np.linalg.matrix_power(estimated[0], k) for k in range(1, n_steps + 1)])
    return ChapmanKolmogorov(lags, predicted, estimated, float(np.abs(predicted - estimated).max()))


def _transition_matrix(states: np.ndarray, lag: int, n: int) -> np.ndarray:
    counts = np.zeros((n, n))
    np.add.at(counts, (states[:-lag], states[lag:]), 1.0)
    sums = counts.sum(1, keepdims=True)
    if (sums == 0.0).any():
        never = np.flatnonzero(sums[:, 0] == 0.0)
        checks.fail("states", f"each be left at lag {lag}", f"states {never.tolist()} that are not")
    shares: np.ndarray = counts / sums
    return shares
