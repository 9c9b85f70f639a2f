"""Trajectories of MDAnalysis and mdtraj as `slow_manifold` reads them: in one unit, by batches.

`Source` hides whose frames they are. It can be read again and again, keeps one batch at a time,
and knows how many frames are promised, so that a file that was cut is noticed. The extras are
`flashdiffusion[mdanalysis]` and `flashdiffusion[mdtraj]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from shared_kernels import checks

# The units of length, in nm.
UNITS = {"nm": 1.0, "angstrom": 0.1}
_CHUNK = 256
# Neighbours in a chain belong to one molecule if their distance is less than this share of the box.
_MAX_DISTANCE = 0.25


class Source:
    """Frames (b, atoms, 3) of a trajectory, in `unit`: an iterable that can be read again.

    Args:
        trajectory: an MDAnalysis Universe or AtomGroup (none that it updates: the atoms of each
            frame must be the same), an mdtraj Trajectory, or with `top` the names of files that
            mdtraj reads by `iterload` (several are taken as one trajectory).
        selection: of atoms, in the library's own language; None is all (of an AtomGroup).
        start, stop, step: of frames, like a slice, but not negative.
        unit: of the frames that come out: "nm" or "angstrom". MDAnalysis has angstrom, mdtraj nm.
        unwrap: None refuses molecules that the periodic box has cut; True makes them whole (the
            library's unwrap, which needs bonds), each by itself. Both refuse two molecules of
            which one appears on another side of the box from one frame to the next: nothing says
            where it belongs. False takes positions as they are.
        progress: show a bar.
        top: topology for files.
        chunk: frames of a batch.

    Attributes:
        n_frames: that will be read; None where the source does not know.
        n_atoms: of the selection.
    """

    def __init__(
        self,
        trajectory: Any,
        *,
        selection: str | None = None,
        start: int | None = None,
        stop: int | None = None,
        step: int | None = None,
        unit: str = "nm",
        unwrap: bool | None = None,
        progress: bool = False,
        top: Any = None,
        chunk: int = _CHUNK,
    ) -> None:
        checks.in_set("unit", unit, tuple(UNITS))
        if unwrap not in (None, True, False):
            checks.fail("unwrap", "be None, True or False", repr(unwrap))
        for name, value, least in (("start", start, 0), ("stop", stop, 1), ("step", step, 1)):
            number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and not (number and value >= least):
                checks.fail(name, f"be None or an int of at least {least}", repr(value))
        checks.positive_int("chunk", chunk)
        self.unit, self.unwrap, self.progress, self.chunk = unit, unwrap, progress, chunk
        self.slice = (int(start or 0), stop, int(step or 1))
        kind = "mdtraj_files" if top is not None else kind_of(trajectory)
        if kind is None:
            checks.fail(
                "trajectory",
                "be a Universe, an AtomGroup, an mdtraj Trajectory or files with top=",
                type(trajectory).__name__,
                error=TypeError,
            )
        self._reader: Any = _READERS[kind](trajectory, selection, unwrap, top)
        self.n_atoms, self.topology_pairs = self._reader.n_atoms, self._reader.pairs
        if self.n_atoms == 0:
            checks.fail("selection", "match at least one atom", repr(selection))
        total = self._reader.n_frames
        self.n_frames = None if total is None else len(range(*slice(*self.slice).indices(total)))
        if self.n_frames == 0:
            checks.fail("start", f"leave at least one of {total} frames", self.slice)

    def __iter__(self) -> Iterator[np.ndarray]:
        factor = self._reader.nm / UNITS[self.unit]
        n, near, last = 0, None, None
        bar: Any = None
        if self.progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=self.n_frames, desc="frames", unit="frame")
        try:
            for xyz, cells in self._reader.batches(*self.slice, self.chunk):
                if self.unwrap is None and cells is not None:
                    if near is None:
                        near = self._near(xyz[0], cells[0])
                    self._require_whole(xyz, cells, near, n)
                if self.unwrap is not False and cells is not None:
                    last = self._require_together(xyz, cells, last, n)
                n += len(xyz)
                if bar is not None:
                    bar.update(len(xyz))
                # a copy: readers refill their buffers
                yield np.array(xyz, dtype=xyz.dtype) * xyz.dtype.type(factor)
        finally:
            if bar is not None:
                bar.close()
        if self.n_frames is not None and n != self.n_frames:
            checks.fail(
                "trajectory",
                f"give all of its {self.n_frames} frames",
                f"{n}",
                "the file was cut; pass stop= to take what is there",
            )

    def _near(self, frame: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """(p, 2) pairs that belong together: bonds, or else neighbours in a chain."""
        pairs: np.ndarray
        pairs, bonded = self.topology_pairs
        if bonded or not len(pairs):
            return pairs
        difference = frame[pairs[:, 0]].astype(np.float64) - frame[pairs[:, 1]]
        fractional = difference @ np.linalg.inv(cell)
        difference = (fractional - np.round(fractional)) @ cell
        shortest = np.linalg.norm(cell, axis=1).min()
        near: np.ndarray = pairs[np.linalg.norm(difference, axis=1) < _MAX_DISTANCE * shortest]
        return near

    def _require_whole(self, xyz: np.ndarray, cells: np.ndarray, near: np.ndarray, n: int) -> None:
        if not len(near):
            return
        difference = xyz[:, near[:, 0]].astype(np.float64) - xyz[:, near[:, 1]]
        fractional = np.einsum("tpk,tkl->tpl", difference, np.linalg.inv(cells))
        cut = (np.abs(fractional) > 0.5).any((1, 2))
        if cut.any():
            first = int(np.argmax(cut))
            start, _, step = self.slice
            checks.fail(
                "trajectory",
                "have whole molecules",
                f"one that the periodic box has cut in frame {start + (n + first) * step}",
                "pass unwrap=True (needs bonds), unwrap it before, or unwrap=False to take the "
                "positions as they are",
            )

    def _require_together(
        self, xyz: np.ndarray, cells: np.ndarray, last: np.ndarray | None, n: int
    ) -> np.ndarray:
        """`last` is where the molecules lay in the frame before, as is what is returned."""
        of = self._reader.molecules
        order, sizes = np.argsort(of, kind="stable"), np.unique(of, return_counts=True)[1]
        starts = np.cumsum(sizes) - sizes
        centres = np.add.reduceat(xyz[:, order].astype(np.float64), starts, 1) / sizes[:, None]
        # in parts of the box, from the first molecule
        places = np.einsum("tmk,tkl->tml", centres - centres[:, :1], np.linalg.inv(cells))
        steps = np.diff(places, axis=0, prepend=places[:1] if last is None else last[None])
        far = (np.abs(steps) > 0.5).any((1, 2))
        if far.any():
            first = int(np.argmax(far))
            start, _, step = self.slice
            checks.fail(
                "trajectory",
                "have molecules that stay side by side",
                f"one on another side of the periodic box in frame {start + (n + first) * step}",
                "select one molecule, put the box's jumps back before (MDAnalysis' NoJump, "
                "mdtraj's image_molecules), or pass unwrap=False to take the positions as they are",
            )
        end: np.ndarray = places[-1]
        return end


def kind_of(trajectory: Any) -> str | None:
    """Whose object it is, without importing either library."""
    home = type(trajectory).__module__.split(".")[0]
    if home == "MDAnalysis" and (
        hasattr(trajectory, "atoms") and hasattr(trajectory, "select_atoms")
    ):
        return "mdanalysis"
    if home == "mdtraj" and hasattr(trajectory, "xyz") and hasattr(trajectory, "topology"):
        return "mdtraj"
    return None


def opened(trajectory: Any, options: dict[str, Any]) -> Any:
    """What `slow_manifold` reads: a Source of other libraries' objects, all else as it is."""
    if kind_of(trajectory) is not None:
        return Source(trajectory, **options)
    defaults = {"unit": "nm", "progress": False}
    for name, value in options.items():
        if value != defaults.get(name):
            checks.fail(
                name,
                "be left out for arrays and iterables",
                repr(value),
                "it is for MDAnalysis' and mdtraj's objects: slice the array, or pass a Source",
            )
    return trajectory


def _chain_pairs(groups: np.ndarray) -> np.ndarray:
    """(i, i + 1) within runs of one chain."""
    first = np.flatnonzero(groups[1:] == groups[:-1])
    return np.stack((first, first + 1), 1)


def _among(bonds: np.ndarray, chosen: np.ndarray, N: int) -> np.ndarray:
    """Bonds between chosen atoms, as places in the selection."""
    place = np.full(N, -1)
    place[chosen] = np.arange(len(chosen))
    bonds = place[bonds.reshape(-1, 2)]
    return bonds[(bonds >= 0).all(1)]


class _MDAnalysis:
    nm = 0.1

    def __init__(self, trajectory: Any, selection: str | None, unwrap: Any, top: Any) -> None:
        if hasattr(trajectory, "is_uptodate"):
            checks.fail(
                "trajectory",
                "be a group of the same atoms in each frame",
                type(trajectory).__name__,
                "pass its .atoms: those of the present frame",
            )
        atoms = trajectory.atoms
        self.atoms = atoms if selection is None else trajectory.select_atoms(selection)
        self.universe, self.n_atoms = atoms.universe, len(self.atoms)
        self.n_frames, self.whole = len(self.universe.trajectory), bool(unwrap)
        if self.whole and not hasattr(self.atoms, "bonds"):
            checks.fail("unwrap", "be None or False without bonds", True, "u.atoms.guess_bonds()")
        if self.whole:
            # along all bonds of a molecule, whichever of its atoms are chosen
            every = self.universe.atoms
            self.unwrapped = every[np.isin(every.fragindices, self.atoms.fragindices)]
            self.places = np.searchsorted(self.unwrapped.indices, self.atoms.indices)
        bonds = np.empty((0, 2), dtype=np.int64)
        if hasattr(self.atoms, "bonds") and len(self.universe.bonds):
            bonds = _among(
                self.universe.bonds.indices, self.atoms.indices, len(self.universe.atoms)
            )
        groups = self.atoms.segindices
        self.pairs = (bonds, True) if len(bonds) else (_chain_pairs(groups), False)
        self.molecules = self.atoms.fragindices if hasattr(self.atoms, "bonds") else groups

    def batches(self, start: int, stop: int | None, step: int, chunk: int) -> Iterator[Any]:
        from MDAnalysis.lib.mdamath import triclinic_vectors

        frames: list[np.ndarray] = []
        cells: list[np.ndarray] = []
        periodic = True
        for ts in self.universe.trajectory[start:stop:step]:
            positions = (
                self.unwrapped.unwrap(compound="fragments", inplace=False)[self.places]
                if self.whole
                else self.atoms.positions
            )
            frames.append(np.array(positions))
            box = ts.dimensions
            periodic = periodic and box is not None and bool(np.all(box[:3] > 0))
            if periodic:
                cells.append(np.asarray(triclinic_vectors(box), dtype=np.float64))
            if len(frames) == chunk:
                yield np.stack(frames), np.stack(cells) if periodic else None
                frames, cells = [], []
        if frames:
            yield np.stack(frames), np.stack(cells) if periodic else None


class _Mdtraj:
    nm = 1.0

    def __init__(self, trajectory: Any, selection: str | None, unwrap: Any, top: Any) -> None:
        self.trajectory = trajectory
        self._choose(trajectory.topology, selection, unwrap)
        self.n_frames: int | None = trajectory.n_frames

    def _choose(self, topology: Any, selection: str | None, unwrap: Any) -> None:
        self.whole = bool(unwrap)
        if self.whole and topology.n_bonds == 0:
            checks.fail("unwrap", "be None or False without bonds", True)
        self.atoms = (
            np.arange(topology.n_atoms) if selection is None else topology.select(selection)
        )
        self.n_atoms = len(self.atoms)
        every = np.array([[a.index, b.index] for a, b in topology.bonds], dtype=np.int64)
        every = every.reshape(-1, 2)
        bonds = _among(every, self.atoms, topology.n_atoms)
        chains = np.array([atom.residue.chain.index for atom in topology.atoms])[self.atoms]
        self.pairs = (bonds, True) if len(bonds) else (_chain_pairs(chains), False)
        N = topology.n_atoms
        graph = sparse.coo_array((np.ones(len(every)), (every[:, 0], every[:, 1])), shape=(N, N))
        parts = sparse.csgraph.connected_components(graph, directed=False)[1][self.atoms]
        self.molecules = parts if len(every) else chains

    def _frames(self, part: Any) -> tuple[np.ndarray, np.ndarray | None]:
        if self.whole and part.unitcell_vectors is not None:
            part = part.make_molecules_whole(inplace=False)
        cells = part.unitcell_vectors
        return part.xyz[:, self.atoms], None if cells is None else cells.astype(np.float64)

    def batches(self, start: int, stop: int | None, step: int, chunk: int) -> Iterator[Any]:
        stop = self.trajectory.n_frames if stop is None else min(stop, self.trajectory.n_frames)
        for first in range(start, stop, chunk * step):
            yield self._frames(self.trajectory[first : min(first + chunk * step, stop) : step])


class _MdtrajFiles(_Mdtraj):
    def __init__(self, trajectory: Any, selection: str | None, unwrap: Any, top: Any) -> None:
        import mdtraj

        self.files = [trajectory] if isinstance(trajectory, str) else [str(f) for f in trajectory]
        self.top = top if hasattr(top, "n_bonds") else mdtraj.load_topology(str(top))
        self._choose(self.top, selection, unwrap)
        self.n_frames = 0
        for name in self.files:
            with mdtraj.open(name) as file:
                try:
                    self.n_frames += len(file)
                except (TypeError, NotImplementedError):
                    # a format that does not know how long it is
                    self.n_frames = None
                    break

    def batches(self, start: int, stop: int | None, step: int, chunk: int) -> Iterator[Any]:
        import mdtraj

        passed = 0
        for name in self.files:
            for part in mdtraj.iterload(name, top=self.top, chunk=chunk):
                first = max(0, start - passed)
                if first == 0:
                    first = (start - passed) % step
                last = part.n_frames if stop is None else min(part.n_frames, stop - passed)
                passed += part.n_frames
                if last > first:
                    yield self._frames(part[first:last:step])
                if stop is not None and passed >= stop:
                    return


_READERS: dict[str, Any] = {
    "mdanalysis": _MDAnalysis,
    "mdtraj": _Mdtraj,
    "mdtraj_files": _MdtrajFiles,
}
