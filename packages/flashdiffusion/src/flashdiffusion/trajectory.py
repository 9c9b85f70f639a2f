"""The slow manifold of a trajectory: aligned frames, diffusion map, implied timescales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from shared_kernels import checks, distributed

from . import _checks, _group, sources
from ._frames import Frames, Points, align_frames, require_frames_first
from .dmap import DiffusionMap

__all__ = ["ALIGN", "align_frames", "slow_manifold"]

ALIGN = ("kabsch", "center", None)


def _sample(
    points: Iterable[Tensor], landmarks: Any, random_state: Any
) -> tuple[Tensor, np.ndarray]:
    """One reading: the landmark points (m, features) and their numbers, ascending.

    Every point draws a random number as it passes, and the m smallest stay: each set of m points is
    equally likely, and how many there are need not be known before.
    """
    if isinstance(landmarks, (int, np.integer)):
        m, wanted = int(landmarks), None
        checks.positive_int("landmarks", m)
    else:
        _checks.plain("landmarks", landmarks)
        wanted = np.asarray(landmarks)
        _checks.no_mask("landmarks", wanted)
        wanted = np.sort(wanted)
        m = len(wanted)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or len(np.unique(wanted)) != m:
            checks.fail("landmarks", "be a number or distinct indices", repr(landmarks))
    rng = check_random_state(random_state)
    kept, numbers = None, np.empty(0, dtype=np.int64)
    draws, n = np.empty(0), 0
    for batch in points:
        own = np.arange(n, n + len(batch))
        n += len(batch)
        if wanted is not None:
            chosen = wanted[(wanted >= own[0]) & (wanted <= own[-1])]
            rows = batch[torch.from_numpy(chosen - own[0])]
            kept = rows if kept is None else torch.cat((kept, rows))
            numbers = np.concatenate((numbers, chosen))
            continue
        draws = np.concatenate((draws, rng.random_sample(len(batch))))
        numbers = np.concatenate((numbers, own))
        kept = batch if kept is None else torch.cat((kept, batch))
        stay = np.sort(np.argsort(draws, kind="stable")[:m])
        kept, draws, numbers = kept[torch.from_numpy(stay)], draws[stay], numbers[stay]
    if kept is None or len(numbers) < max(2, m):
        checks.fail("landmarks", f"be in [2, {n}], the number of points", landmarks)
    return kept, numbers


def slow_manifold(
    trajectory: Any,
    lag: int = 1,
    n_components: int = 4,
    align: str | None = "kabsch",
    *,
    weights: Any = None,
    reference: Any = None,
    n_delays: int = 1,
    frame_weights: Any = None,
    selection: str | None = None,
    start: int | None = None,
    stop: int | None = None,
    step: int | None = None,
    unit: str = "nm",
    unwrap: bool | None = None,
    progress: bool = False,
    beta: float | str = "bgh",
    alpha: float = 0.5,
    **diffusion_map: Any,
) -> DiffusionMap:
    """A diffusion map of a trajectory in the RMSD metric, with its implied timescales.

    Each frame is aligned to the reference; squared distance is then (weighted) squared RMSD. With
    n_delays = m, frame t stands for the frames t, t + lag, .., t + (m-1) lag together. Timescales
    come from the motion along the coordinates: t_k = -1 / ln rho_k, with rho_k the eigenvalues of
    their time-lagged correlation (made symmetric in time).

    Args:
        trajectory: (T, atoms, 3) numpy or torch (MDAnalysis' ``timeseries()`` may give
            (atoms, T, 3): that is refused where distances between neighbours tell it; pass
            order="fac"), or an iterable of batches (b, atoms, 3), of mdtraj's chunks
            (`md.iterload`, in nm) or of frames (atoms, 3), or a function that returns such an
            iterable anew each time. Where it has a length, it must keep it: a file that was cut is
            not taken for a whole one. All aligned frames are kept, in float32 unless given as
            float64. With landmarks=m they are not: the trajectory is read twice, to choose the
            landmarks and to extend the map to all frames by batches, and what is kept is O(m atoms
            + T n_components); it may then be larger than memory (a function, np.memmap, or what can
            be iterated twice; of a plain iterator the aligned frames are kept).
        lag: frames between the two times of a correlation, >= 1.
        n_components: coordinates.
        align: "kabsch" (move and turn), "center" (move) or None.
        weights: (atoms,) positive, for example masses.
        reference: (atoms, 3) to align to; None is the first frame.
        n_delays: frames per point.
        frame_weights: (T,) positive importance weights of the frames (target over sampled density);
            the chain then has the target's density (exact at alpha = 1/2). With delays a point has
            the weight of its first frame (or pass one weight per point). Correlations in time mean
            nothing there: timescales_ is nan.
        selection, start, stop, step, unit, unwrap, progress: of `sources.Source`, where the
            trajectory is an MDAnalysis Universe or AtomGroup or an mdtraj Trajectory; lengths are
            in `unit`, so that both give the same map. Files larger than memory: pass a Source.
        beta, alpha, diffusion_map: parameters of DiffusionMap; landmarks=m (a number, or indices of
            points) for many frames.

    Returns:
        A fitted DiffusionMap with `timescales_` (n_components,) in units of the lag, descending
        (nan where a correlation is not positive, and where nothing moves), and `reference_`
        (atoms, 3). Its `transform` takes new frames (n, atoms, 3), with the atoms in the order of
        the fit: they are aligned to `reference_` with the fit's weights, and joined as with
        n_delays.

    beta is in one over the square of the frames' unit: beta in nm^-2 is 100 times beta in A^-2. The
    rules ("bgh", "median", "self-tuning") find the same map in either unit.

    Example:
        >>> frames = np.random.default_rng(0).standard_normal((60, 5, 3))
        >>> slow_manifold(frames, n_components=2).transform().shape
        (60, 2)

    Source: Rohrdanz, Zheng, Maggioni, Clementi, J. Chem. Phys. 134 (2011) 124116; Noe and Nueske,
    Multiscale Model. Simul. 11 (2013) 635 (timescales); Banisch et al. (2020) (frame weights).
    """
    wanted = {"selection": selection, "start": start, "stop": stop, "step": step, "unit": unit}
    trajectory = sources.opened(trajectory, {**wanted, "unwrap": unwrap, "progress": progress})
    if diffusion_map.get("affinity", "rbf") != "rbf":
        checks.fail("affinity", "be 'rbf' for frames", repr(diffusion_map["affinity"]))
    if diffusion_map.get("shard_points"):
        checks.fail(
            "shard_points",
            "be False for frames",
            True,
            "correlations in time need all of them",
            NotImplementedError,
        )
    dm = DiffusionMap(beta=beta, alpha=alpha, n_components=n_components, **diffusion_map)
    ranks = distributed.resolve(dm.group)
    points = Points(trajectory, align, weights, reference, lag, n_delays)
    every = omega = None
    with distributed.agreement(ranks) as agreed:
        require_frames_first(trajectory)
        checks.positive_int("lag", lag)
        checks.positive_int("n_delays", n_delays)
        checks.in_set("align", align, ALIGN)
        agreed.equal["lag"] = distributed.fingerprint(lag, n_delays, align)
        if frame_weights is not None and dm.landmarks is not None:
            checks.fail("frame_weights", "be None with landmarks", "an array")
        if dm.landmarks is None:
            every = torch.cat(list(points))
        if frame_weights is not None and every is not None:
            omega = _point_weights(frame_weights, len(every), (n_delays - 1) * lag)
            agreed.equal["frame_weights"] = distributed.fingerprint(omega.numpy())
    if every is None:
        _fit_landmarks(dm, points, ranks)
    else:
        dm.fit(every)
    if omega is None:
        dm.timescales_ = _timescales(dm.eigenvectors_, lag)
        if dm.sees_one_point_:
            dm.timescales_[:] = np.nan
    else:
        dm = dm.reweighted(omega.sqrt())
        dm.timescales_ = np.full(n_components, np.nan)
    if points.target is not None:
        dm.reference_ = points.target.numpy()
        dm.frames_ = Frames(align, weights, lag, n_delays)
    return dm


def _point_weights(frame_weights: Any, n_points: int, delay: int) -> Tensor:
    """Of each point, from those of all frames: that of its first frame. Or one per point."""
    omega = _checks.as_tensor("frame_weights", frame_weights).double()
    checks.shape("frame_weights", omega, (None,), "(T,)")
    if len(omega) not in (n_points, n_points + delay):
        wanted = f"have shape ({n_points + delay},), one per frame"
        wanted += f", or ({n_points},), one per point" if delay else ""
        checks.fail("frame_weights", wanted, tuple(omega.shape))
    if not bool(((omega > 0) & torch.isfinite(omega)).all()):
        checks.fail("frame_weights", "be positive and finite", float(omega.min()))
    return omega[:n_points]


def _fit_landmarks(dm: DiffusionMap, points: Points, ranks: distributed.Ranks | None) -> None:
    """Two readings: one to choose the landmarks, one to extend their map to all points."""
    landmarks = dm.landmarks
    rng = _group.agreed_rng(dm.random_state, ranks)
    with distributed.agreement(ranks) as agreed:
        if not callable(points.trajectory) and iter(points.trajectory) is points.trajectory:
            # it can be read once
            batches: Iterable[Tensor] = list(points)
        else:
            batches = points
        rows, numbers = _sample(batches, landmarks, rng)
        agreed.equal["trajectory"] = distributed.fingerprint(rows.numpy(), numbers, points.count)
    try:
        dm.landmarks = None
        dm.fit(rows)
    finally:
        dm.landmarks = landmarks
    dm.landmarks_ = numbers
    dm._extend((batch.numpy() for batch in batches), ranks)


def _timescales(psi: np.ndarray, lag: int) -> np.ndarray:
    """-1 / ln rho of the generalised problem C(lag) v = rho C(0) v, symmetric in time."""
    from scipy.linalg import eigh

    psi = psi - psi.mean(0)
    before, after = psi[:-lag], psi[lag:]
    same = before.T @ before + after.T @ after
    moved = before.T @ after
    # a coordinate that is a combination of others has no timescale of its own
    jitter = 1e-12 * np.trace(same) / len(same)
    rho = eigh(moved + moved.T, same + jitter * np.eye(len(same)), eigvals_only=True)[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            (rho > 0) & (rho < 1), -1.0 / np.log(rho), np.where(rho >= 1, np.inf, np.nan)
        )
