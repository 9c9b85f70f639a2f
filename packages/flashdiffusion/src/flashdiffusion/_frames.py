"""Frames of a trajectory as points: read in batches, aligned, joined with their delays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks

from . import _checks, sources

# How many frames are aligned at a time.
_BATCH = 4096
# How many coordinates (frames * atoms * 3) are processed at a time.
_BATCH_NUMBERS = 2**18
# How many frames and atoms are compared to tell which axis counts frames.
_SAMPLE = 100


class Frames(NamedTuple):
    """How a trajectory's frames became points: what new frames need, besides the reference."""

    align: str | None
    weights: Any
    lag: int
    n_delays: int


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
    rotation: Tensor = u @ vh
    return x @ rotation


def _frames(name: str, frames: Any) -> Tensor:
    x = _checks.as_tensor(name, frames)
    if x.dim() != 3 or x.shape[2] != 3:
        checks.fail(name, "have shape (T, atoms, 3)", tuple(x.shape))
    _checks.finite(name, x)
    return x


def _atom_weights(weights: Any, atoms: int) -> Tensor:
    if weights is None:
        return torch.full((atoms,), 1.0 / max(1, atoms), dtype=torch.float64, device="cpu")
    w = _checks.as_tensor("weights", weights).double()
    checks.shape("weights", w, (atoms,), lambda: f"({atoms},), one per atom")
    if not bool(((w > 0) & torch.isfinite(w)).all()):
        checks.fail("weights", "be positive and finite", f"values down to {float(w.min())}")
    return w / w.sum()


class Points:
    """The points of a trajectory in batches: aligned frames, or stacks of them with delays.

    Iterating reads the frames once, keeping only a batch and the frames that delays still need.
    `target` is the reference (atoms, 3) once the first batch is read, `count` the points of the
    last complete reading.
    """

    def __init__(
        self,
        trajectory: Any,
        align: str | None,
        weights: Any,
        reference: Any,
        lag: int,
        n_delays: int,
        new: bool = False,
    ) -> None:
        # new frames of a fitted map may be fewer than a fit needs
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
                "trajectory",
                "give the same frames each time it is read",
                f"{self.count} points, then {n_points}",
            )
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
            )


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
            "trajectory",
            "be an array, an iterable of frames or a function that returns one",
            type(trajectory).__name__,
            "open a file with MDAnalysis or mdtraj",
            error=TypeError,
        )
    atoms, number = None, 0
    promised = len(trajectory) if isinstance(trajectory, Sized) else 0
    batches = iter(trajectory() if callable(trajectory) else trajectory)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            if number < promised:
                # Readers take the end of a truncated file for the end of the trajectory, and some
                # then change their length.
                checks.fail("trajectory", f"give all of its {promised} batches or frames", number)
            return
        except OSError as error:
            raise OSError(
                f"`trajectory` cannot be read after {number} batches or frames: {error}"
            ) from error
        # Readers fill one buffer with each frame in turn, so frames are copied. `positions` is
        # read, as np.asarray of a frame object is slow.
        if sources.kind_of(batch) == "mdtraj":
            # a chunk of iterload, whose molecules are made whole like those of a trajectory
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
    part = _checks.as_tensor("trajectory", trajectory[:_SAMPLE, :_SAMPLE]).double()
    varies = []
    for axis in (0, 1):
        length = part.diff(dim=axis).norm(dim=2)
        mean, spread = length.mean(1 - axis), length.std(1 - axis)
        varies.append(float((spread / mean).median()))
    # never true of nan, which points that do not move give
    if varies[0] < 0.06 and varies[1] > 0.2:
        shape = tuple(trajectory.shape)
        checks.fail(
            "trajectory",
            "have shape (T, atoms, 3)",
            f"{shape}, where distances between neighbours along the first axis are constant within "
            f"{varies[0]:.1%}, as between atoms of a molecule",
            "pass timeseries(order='fac') or a transposed array (1, 0, 2); if the first axis does "
            "count frames, pass them as list(trajectory)",
        )


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
            "trajectory",
            "hold frames that do not share memory",
            f"{len(places)} arrays in {len(set(places))} buffer(s), as from a reader that refills "
            f"its own",
            "append ts.positions.copy()",
        )


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
