"""The slow manifold of a trajectory: aligned frames, diffusion map, implied timescales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from shared_kernels import checks

from . import _checks, _group, sources
from .dmap import DiffusionMap, Frames

ALIGN = ("kabsch", "center", None)
# Frames are aligned so many at a time.
_BATCH = 4096
# Coordinates (frames * atoms * 3) that are worked on at a time.
_BATCH_NUMBERS = 2**18
# Frames and atoms whose distances tell which axis is which.
_LOOKED_AT = 100


def align_frames(frames: Any, reference: Any, weights: Any = None) -> Any:
    """Move and turn each frame onto the reference: the least weighted sum |R x_a + t - y_a|^2.

    Kabsch's solution by singular value decomposition; reflections are not allowed.

    Args:
        frames: (T, atoms, 3).
        reference: (atoms, 3); the result is centred on the origin, whatever its centre.
        weights: (atoms,) positive, for example masses; None is equal.

    Returns:
        (T, atoms, 3) of the frames' kind and dtype.

    Source: Kabsch, Acta Cryst. A32 (1976) 922.
    """
    x = _frames("frames", frames)
    y = _checks.as_tensor("reference", reference).double()
    checks.shape(
        "reference", y, (x.shape[1], 3), lambda: f"({x.shape[1]}, 3), the atoms of `frames`"
    )
    w = _atom_weights(weights, x.shape[1])
    y = y - w @ y
    out = torch.cat([_kabsch(part, y, w) for part in x.split(_BATCH)]) if len(x) else x
    return _checks.like_input(out.to(x.dtype), frames)


def _kabsch(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    x = x.double()
    x = x - torch.einsum("a,tak->tk", w, x)[:, None]
    u, _, vh = torch.linalg.svd(torch.einsum("tak,a,al->tkl", x, w, y))
    # a reflection becomes the best rotation by turning the weakest direction
    sign = torch.sign(torch.linalg.det(u @ vh))
    u = torch.cat((u[..., :2], u[..., 2:] * sign[:, None, None]), -1)
    return x @ (u @ vh)


def _frames(name: str, frames: Any) -> Tensor:
    x = _checks.as_tensor(name, frames)
    if x.dim() != 3 or x.shape[2] != 3:
        checks.fail(name, "have shape (T, atoms, 3)", tuple(x.shape))
    _checks.finite(name, x)
    return x


def _atom_weights(weights: Any, atoms: int) -> Tensor:
    if weights is None:
        return torch.full((atoms,), 1.0 / max(1, atoms), dtype=torch.float64)
    w = _checks.as_tensor("weights", weights).double()
    checks.shape("weights", w, (atoms,), lambda: f"({atoms},), one per atom")
    if not bool(((w > 0) & torch.isfinite(w)).all()):
        checks.fail("weights", "be positive and finite", f"values down to {float(w.min())}")
    return w / w.sum()


class _Points:
    """The points of a trajectory in batches: aligned frames, or stacks of them with delays.

    Iterating reads the frames once, keeping only a batch and the frames that delays still need.
    `target` is the reference (atoms, 3) once the first batch is read, `count` the points of the
    last complete reading.
    """

    def __init__(
        self, trajectory: Any, align: str | None, weights: Any, reference: Any, lag: int,
        n_delays: int, new: bool = False,
    ) -> None:  # fmt: skip
        # `new` frames of a map that is fitted: few will do
        self.new = new
        self.trajectory, self.align, self.weights = trajectory, align, weights
        self.reference, self.lag, self.n_delays = reference, lag, n_delays
        self.target: Tensor | None = None
        self.count: int | None = None

    def __iter__(self) -> Iterator[Tensor]:
        n_points, wait = 0, (self.n_delays - 1) * self.lag
        waiting = None
        for rows in self._aligned():
            rows = rows if waiting is None else torch.cat((waiting, rows))
            n = len(rows) - wait
            if n > 0:
                parts = [rows[k * self.lag : k * self.lag + n] for k in range(self.n_delays)]
                yield rows if wait == 0 else torch.cat(parts, 1) / self.n_delays**0.5
                n_points += n
            waiting = rows[max(n, 0) :].clone() if wait else None
        if self.count not in (None, n_points):
            checks.fail(
                "trajectory", "give the same frames each time it is read",
                f"{self.count} points, then {n_points}",
            )  # fmt: skip
        self.count = n_points

    def _aligned(self) -> Iterator[Tensor]:
        """(b, atoms * 3) whose squared distances are squared RMSDs."""
        root = w = None
        n_frames = 0
        for batch in _large(_batches(self.trajectory)):
            if root is None or w is None:
                w = _atom_weights(self.weights, batch.shape[1])
                root = w.sqrt()[:, None]
                given = self.reference
                first = batch[0] if given is None else _checks.as_tensor("reference", given)
                checks.shape("reference", first, tuple(batch.shape[1:]), "(atoms, 3)")
                first = first.double()
                self.target = first - w @ first
            dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
            moved = batch.double()
            if self.align == "kabsch" and self.target is not None:
                moved = _kabsch(moved, self.target, w)
            elif self.align == "center":
                moved = moved - torch.einsum("a,tak->tk", w, moved)[:, None]
            n_frames += len(batch)
            yield (moved * root).to(dtype).flatten(1)
        if n_frames == 0:
            checks.fail("trajectory", "have at least one frame", "none")
        if self.new:
            if n_frames <= (self.n_delays - 1) * self.lag:
                most = (self.n_delays - 1) * self.lag
                checks.fail("X", f"have more than {most} frames, as the fit's delays", n_frames)
        elif n_frames <= self.n_delays * self.lag + 1:
            checks.fail(
                "trajectory",
                f"have more than {self.n_delays * self.lag + 1} frames for this lag and delays",
                n_frames,
            )  # fmt: skip


def _batches(trajectory: Any) -> Iterator[Tensor]:
    """Frames (b, atoms, 3): of an array, or of an iterable of batches or of single frames."""
    if isinstance(trajectory, (np.ndarray, Tensor)):
        _checks.plain("trajectory", trajectory)
        if trajectory.ndim != 3 or trajectory.shape[2] != 3:
            shape = tuple(trajectory.shape)
            checks.fail("trajectory", "have shape (T, atoms, 3)", shape)
        most = max(1, _BATCH_NUMBERS // max(1, 3 * trajectory.shape[1]))
        for start in range(0, len(trajectory), most):
            # a memory map is read by batches too
            yield _frames("trajectory", trajectory[start : start + most])
        return
    is_reader = hasattr(trajectory, "n_frames") and hasattr(trajectory, "ts")
    if not (callable(trajectory) or is_reader):
        _checks.plain("trajectory", trajectory)
    _require_own_memory(trajectory)
    if isinstance(trajectory, str) or not (
        callable(trajectory) or isinstance(trajectory, Iterable)
    ):
        checks.fail(
            "trajectory", "be an array, an iterable of frames or a function that returns one",
            type(trajectory).__name__, "open a file with MDAnalysis or mdtraj", error=TypeError,
        )  # fmt: skip
    atoms, number = None, 0
    promised = len(trajectory) if isinstance(trajectory, Sized) else 0
    batches = iter(trajectory() if callable(trajectory) else trajectory)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            if number < promised:
                # readers take the end of a file that was cut for the end of the trajectory, and
                # some then change their length
                checks.fail("trajectory", f"give all of its {promised} batches or frames", number)
            return
        except OSError as error:
            raise OSError(
                f"`trajectory` cannot be read after {number} batches or frames: {error}"
            ) from error
        # readers refill one buffer for all frames: what is kept is copied. np.asarray of a frame
        # object is slow
        if sources.kind_of(batch) == "mdtraj":
            # a chunk of iterload: its molecules are looked at, too
            batch = np.concatenate(list(sources.Source(batch)))
        own = batch.positions if hasattr(batch, "positions") else batch
        x = _checks.as_tensor(f"trajectory[{number}]", own)
        x = x.clone() if isinstance(own, Tensor) else x
        x = _frames(f"trajectory[{number}]", x[None] if x.dim() == 2 else x)
        if atoms is not None and x.shape[1] != atoms:
            checks.fail(f"trajectory[{number}]", f"have {atoms} atoms as before it", x.shape[1])
        atoms, number = x.shape[1], number + 1
        yield x


def require_frames_first(trajectory: Any) -> None:
    """Refuse an array (atoms, T, 3), as some readers' `timeseries` return it.

    The distance between two neighbours in a molecule hardly changes with time (by 1 to 3 % in
    proteins), whereas the steps that atoms take from one frame to the next differ between atoms (by
    30 to 60 %). So the axis along which distances between neighbours are constant counts atoms.
    """
    if not isinstance(trajectory, (np.ndarray, Tensor)) or trajectory.ndim != 3:
        return
    if min(trajectory.shape[:2]) < 4 or trajectory.shape[2] != 3:
        return
    part = _checks.as_tensor("trajectory", trajectory[:_LOOKED_AT, :_LOOKED_AT]).double()
    varies = []
    for axis in (0, 1):
        length = part.diff(dim=axis).norm(dim=2)
        mean, spread = length.mean(1 - axis), length.std(1 - axis)
        varies.append(float((spread / mean).median()))
    # never true of nan: points that do not move
    if varies[0] < 0.06 and varies[1] > 0.2:
        shape = tuple(trajectory.shape)
        checks.fail(
            "trajectory", "have shape (T, atoms, 3)",
            f"{shape}, where distances between neighbours along the first axis are constant within "
            f"{varies[0]:.1%}, as between atoms of a molecule",
            "pass timeseries(order='fac') or a transposed array (1, 0, 2); if the first axis does "
            "count frames, pass them as list(trajectory)",
        )  # fmt: skip


def _require_own_memory(trajectory: Any) -> None:
    """A list of frames that are one buffer holds the last frame many times."""
    if not isinstance(trajectory, (list, tuple)):
        return
    # a reader's Timestep, too, is one object for all frames
    arrays = [x.positions if hasattr(x, "positions") else x for x in trajectory]
    places = [
        (x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr())
        for x in arrays
        if isinstance(x, (np.ndarray, Tensor)) and 0 not in x.shape
    ]
    if len(set(places)) < len(places):
        checks.fail(
            "trajectory", "hold frames that do not share memory",
            f"{len(places)} arrays in {len(set(places))} buffer(s), as from a reader that refills "
            f"its own",
            "append ts.positions.copy()",
        )  # fmt: skip


def _large(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same frames in batches of about _BATCH_NUMBERS: single frames would be slow."""
    waiting: list[Tensor] = []
    size = 0
    for batch in batches:
        most = max(1, _BATCH_NUMBERS // max(1, batch.shape[1] * 3))
        for part in batch.split(most):
            if size and (size + part.numel() > _BATCH_NUMBERS or part.dtype != waiting[0].dtype):
                yield torch.cat(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += part.numel()
    if waiting:
        yield torch.cat(waiting)


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
    dm = DiffusionMap(beta=beta, alpha=alpha, n_components=n_components, **diffusion_map)
    ranks = _group.resolve(dm.group)
    points = _Points(trajectory, align, weights, reference, lag, n_delays)
    every = omega = None
    with _group.together(ranks) as said:
        require_frames_first(trajectory)
        checks.positive_int("lag", lag)
        checks.positive_int("n_delays", n_delays)
        checks.in_set("align", align, ALIGN)
        said.same["lag"] = _group.fingerprint(lag, n_delays, align)
        if frame_weights is not None and dm.landmarks is not None:
            checks.fail("frame_weights", "be None with landmarks", "an array")
        if dm.landmarks is None:
            every = torch.cat(list(points))
        if frame_weights is not None and every is not None:
            omega = _point_weights(frame_weights, len(every), (n_delays - 1) * lag)
            said.same["frame_weights"] = _group.fingerprint(omega.numpy())
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


def _fit_landmarks(dm: DiffusionMap, points: _Points, ranks: _group.Ranks | None) -> None:
    """Two readings: one to choose the landmarks, one to extend their map to all points."""
    landmarks = dm.landmarks
    rng = _group.agreed_rng(dm.random_state, ranks)
    with _group.together(ranks) as said:
        if not callable(points.trajectory) and iter(points.trajectory) is points.trajectory:
            # it can be read once
            batches: Iterable[Tensor] = list(points)
        else:
            batches = points
        rows, numbers = _sample(batches, landmarks, rng)
        said.same["trajectory"] = _group.fingerprint(rows.numpy(), numbers, points.count)
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
