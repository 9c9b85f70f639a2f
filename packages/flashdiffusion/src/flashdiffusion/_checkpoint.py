"""The state of a solve on disk, written after every sweep: a killed run goes on from its last one.

A folder holds one folder per process, with the row sums, a file per block of Krylov vectors, and a
small file per state that names the blocks it needs. A file is written under another name and then
renamed, so that every file that has its name is complete. The last two states are kept, because a
process may have been killed before the others wrote theirs. All files are plain tensors
(torch.load, weights_only).
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
from shared_kernels.distributed import Ranks, agreement

from .eigensolver import Krylov


class Unsaved:
    """A solve that keeps nothing on disk; `Checkpoint` does the same and keeps it."""

    def sums(self) -> tuple[Tensor, Tensor] | None:
        """Density and row sums, if all ranks have them."""
        return None

    def save_sums(self, density: Tensor, row_sums: Tensor) -> None: ...

    def latest(self) -> dict[str, Any] | None:
        """The last state that all ranks have, with "vectors" or a Krylov "state"; or None."""
        return None

    def save(self, stage: int, before: tuple[int, int], krylov: Krylov) -> None:
        """After a pass of a stage, with the passes (in half, in full precision) before it."""

    def save_vectors(self, stage: int, before: tuple[int, int], vectors: Tensor) -> None:
        """The start of a stage: the vectors that the stage before it has found."""

    def done(self) -> None:
        """The fit is complete: nothing is left to resume."""


class Checkpoint(Unsaved):
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
                "checkpoint",
                f"have been written by {size} process(es)",
                f"a folder {wrong[0]}",
                "start as many again, or delete it",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._blocks: list[str] = []
        self._kept: list[Path] = []

    def _read(self, path: Path) -> Any:
        try:
            found = torch.load(path, weights_only=True)
        except Exception as error:
            # torch.load raises whatever its reader raises. Its text may advise to load without a
            # check of what is in the file, so it is not passed on.
            raise ValueError(
                f"`checkpoint` must be readable, got {path.name}, which is no whole file of ours "
                f"({type(error).__name__}); delete the folder to start again"
            ) from None
        if isinstance(found, dict) and found.get("problem") not in (None, self.problem):
            checks.fail(
                "checkpoint",
                "belong to these points and parameters",
                "those of another fit",
                "pass another folder, or delete this one",
            )
        return found

    def _of_all_ranks(self, mine: Any) -> list[Any]:
        return [mine] if self.ranks is None else self.ranks.objects(mine)

    def sums(self) -> tuple[Tensor, Tensor] | None:
        path = self.folder / "sums.pt"
        if not all(self._of_all_ranks(path.exists())):
            return None
        with agreement(self.ranks):
            loaded = self._read(path)
        return loaded["density"], loaded["row_sums"]

    def save_sums(self, density: Tensor, row_sums: Tensor) -> None:
        things = {"problem": self.problem, "density": density, "row_sums": row_sums}
        _write(self.folder / "sums.pt", things)

    def latest(self) -> dict[str, Any] | None:
        mine = sorted(path.stem for path in self.folder.glob("state-*.pt"))
        common = set(mine).intersection(*self._of_all_ranks(mine))
        if not common:
            return None
        path = self.folder / f"{max(common)}.pt"
        with agreement(self.ranks):
            found: dict[str, Any] = self._read(path)
            self._kept = [path]
            self._blocks = list(found["blocks"])
            *basis, last = (self._read(self.folder / name) for name in self._blocks)
        if "state" in found:
            found["state"]["basis"] = torch.cat(basis) if basis else last[:0]
            found["state"]["block"] = last
        else:
            found["vectors"] = last
        return found

    def save(self, stage: int, before: tuple[int, int], krylov: Krylov) -> None:
        state = krylov.state()
        number = f"{stage}-{krylov.n_passes:05d}"
        basis, block = state.pop("basis"), state.pop("block")
        if krylov.restarted or krylov.n_passes == 1:
            self._blocks = []
        if not self._blocks and len(basis):
            self._blocks = [f"block-{number}-basis.pt"]
            _write(self.folder / self._blocks[0], basis.clone())
        self._blocks.append(f"block-{number}.pt")
        _write(self.folder / self._blocks[-1], block.clone())
        state["H"] = state["H"].clone()
        self._commit(number, {"stage": stage, "before": before, "state": state})

    def save_vectors(self, stage: int, before: tuple[int, int], vectors: Tensor) -> None:
        self._blocks = [f"block-{stage}-00000-start.pt"]
        _write(self.folder / self._blocks[0], vectors.clone())
        self._commit(f"{stage}-00000", {"stage": stage, "before": before})

    def _commit(self, number: str, things: dict[str, Any]) -> None:
        path = self.folder / f"state-{number}.pt"
        _write(path, {"problem": self.problem, "blocks": self._blocks, **things})
        # every rank has finished the state before, or it would not have come to this one's sweep
        self._kept = [*self._kept[-1:], path]
        needed = {path.name for path in self._kept} | {"sums.pt"}
        for kept in self._kept:
            needed.update(self._read(kept)["blocks"])
        for old in self.folder.iterdir():
            if old.name not in needed:
                old.unlink()

    def done(self) -> None:
        shutil.rmtree(self.folder)
        # The last rank to finish removes the common folder; before that it is not empty, and a
        # rank that comes too late finds it gone.
        with contextlib.suppress(OSError):
            self.top.rmdir()


def _write(path: Path, thing: Any) -> None:
    aside = path.with_suffix(".part")
    with open(aside, "wb") as file:
        torch.save(thing, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
