"""Where a solve stands, on disk after every sweep: a killed run goes on from its last one.

A folder holds one folder per process, with the row sums, a file per block of Krylov vectors, and a
small file per state that names the blocks it needs. Files are written beside their place and then
moved into it, so that whatever exists is whole. The last two states are kept: a process may have
been killed before its neighbours wrote theirs. All are plain tensors (torch.load, weights_only).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

from ._group import Ranks
from .eigensolver import Krylov


def _write(path: Path, thing: Any) -> None:
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        torch.save(thing, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class Checkpoint:
    """The states of one solve of one problem (known by its fingerprint) in a folder."""

    def __init__(self, folder: Any, problem: int, ranks: Ranks | None) -> None:
        self.ranks, self.problem = ranks, problem
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.top = Path(folder)
        if self.top.exists() and not self.top.is_dir():
            checks.fail("checkpoint", "be a folder", f"a file {self.top.name}")
        self.folder = self.top / f"rank-{rank}-of-{size}"
        wrong = [p.name for p in self.top.glob("rank-*-of-*") if not p.name.endswith(f"-of-{size}")]
        if wrong:
            checks.fail(
                "checkpoint", f"have been written by {size} process(es)", f"a folder {wrong[0]}",
                "start as many again, or delete it",
            )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        self._blocks: list[str] = []
        self._kept: list[Path] = []

    def _read(self, path: Path) -> Any:
        try:
            found = torch.load(path, weights_only=True)
        except Exception as error:
            # torch.load raises whatever its reader does
            # its text may advise to load without a check of what is in the file: not passed on
            raise ValueError(
                f"`checkpoint` must be readable, got {path.name}, which is no whole file of ours "
                f"({type(error).__name__}); delete the folder to start again"
            ) from None
        if isinstance(found, dict) and found.get("problem") not in (None, self.problem):
            checks.fail(
                "checkpoint", "belong to these points and parameters", "those of another fit",
                "pass another folder, or delete this one",
            )  # fmt: skip
        return found

    # ---- what is computed before the solve

    def sums(self) -> tuple[Tensor, Tensor] | None:
        """Density and row sums, if all ranks have them."""
        path = self.folder / "sums.pt"
        found = [path.exists()] if self.ranks is None else self.ranks.objects(path.exists())
        if not all(found):
            return None
        loaded = self._read(path)
        return loaded["density"], loaded["row_sums"]

    def save_sums(self, density: Tensor, row_sums: Tensor) -> None:
        things = {"problem": self.problem, "density": density, "row_sums": row_sums}
        _write(self.folder / "sums.pt", things)

    # ---- states

    def latest(self) -> dict[str, Any] | None:
        """The last state that all ranks have, with "vectors" or a Krylov "state"; or None."""
        mine = sorted(path.stem for path in self.folder.glob("state-*.pt"))
        everyones = [mine] if self.ranks is None else self.ranks.objects(mine)
        common = set(mine).intersection(*everyones)
        if not common:
            return None
        path = self.folder / f"{max(common)}.pt"
        found = self._read(path)
        self._kept = [path]
        self._blocks = list(found["blocks"])
        parts = [self._read(self.folder / name) for name in self._blocks]
        if "H" not in found:
            found["vectors"] = parts[0]
        else:
            found["state"] = Krylov(
                torch.cat(parts[:-1]) if len(parts) > 1 else parts[0][:0],
                parts[-1], found["H"], found["n_passes"], found["next_check"], found["previous"],
                found["checked"],
            )  # fmt: skip
        return found

    def save(self, stage: int, before: tuple[int, int], state: Krylov) -> None:
        """After a pass of a solve, with the passes (in half, in full precision) before it."""
        number = f"{stage}-{state.n_passes:05d}"
        if state.restarted or state.n_passes == 1:
            self._blocks = []
        if not self._blocks and len(state.basis):
            self._blocks = [f"block-{number}-basis.pt"]
            _write(self.folder / self._blocks[0], state.basis.clone())
        self._blocks.append(f"block-{number}.pt")
        _write(self.folder / self._blocks[-1], state.block.clone())
        self._commit(
            number,
            {"stage": stage, "before": before, "H": state.H.clone(), "n_passes": state.n_passes,
             "next_check": state.next_check, "previous": state.previous,
             "checked": state.checked},
        )  # fmt: skip

    def save_vectors(self, stage: int, before: tuple[int, int], vectors: Tensor) -> None:
        """Where a stage starts: what the stage before it has found."""
        self._blocks = [f"block-{stage}-00000-start.pt"]
        _write(self.folder / self._blocks[0], vectors.clone())
        self._commit(f"{stage}-00000", {"stage": stage, "before": before})

    def _commit(self, number: str, things: dict[str, Any]) -> None:
        path = self.folder / f"state-{number}.pt"
        _write(path, {"problem": self.problem, "blocks": self._blocks, **things})
        self._kept = [*self._kept[-1:], path]
        # every rank has finished the state before, or it would not have come to this one's sweep
        needed = {path.name for path in self._kept} | {"sums.pt"}
        for kept in self._kept:
            needed.update(self._read(kept)["blocks"])
        for old in self.folder.iterdir():
            if old.name not in needed:
                old.unlink()

    def done(self) -> None:
        """The fit is complete: nothing is left to resume."""
        shutil.rmtree(self.folder)
        # the last rank to finish removes the folder of all: it is not empty before, and gone after
        with contextlib.suppress(OSError):
            self.top.rmdir()
