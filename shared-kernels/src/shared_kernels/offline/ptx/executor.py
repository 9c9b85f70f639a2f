"""Run a program: decode each block into steps, and follow branches.

CTAs run in batches in lockstep. CTAs that part ways as a whole go on as two batches. Threads of one
CTA that part ways run in groups until the groups are one again: the group at the lowest place of
the text runs first, unless it is at a block that every other group still has to pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .batch import Batch
from .counters import Counters
from .errors import UnsupportedError
from .instructions import Decoder, Step
from .memory import GlobalMemory, SharedMemory
from .parser import Program, parse
from .sanitizer import Sanitizer, Shadow

Array = np.ndarray

# Lanes that run in lockstep: more spread NumPy's cost over more threads, fewer need less memory.
LANES = 8192


class _Decoded:
    """A block's steps, the guard of its branch, and which registers live."""

    def __init__(self, steps: list[Step], branch: Any, next: list[int]) -> None:
        self.steps, self.branch, self.next = steps, branch, next
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.live_in: list[int] = []
        self.live_out: set[int] = set()
        self.dies: list[int] = []


class Kernel:
    """One PTX text, ready to run.

    Args:
        text: PTX with one `.entry`.
        shared: Bytes of dynamic shared memory (Triton's ``metadata.shared``).
        fused: Round ``mul`` and the ``add`` behind it once, as ptxas may.

    Raises:
        UnsupportedError: A form, modifier or operand count that is not in the tables.
    """

    def __init__(self, text: str, shared: int = 0, fused: bool = False) -> None:
        self.program: Program = parse(text)
        self.name = self.program.name
        self.forms = frozenset(i.form for b in self.program.blocks for i in b.instructions)
        decoder = Decoder(self.program, shared, fused)
        self.shared = decoder.shared
        self.grain = decoder.grain
        self.blocks = []
        for block in self.program.blocks:
            steps, branch, reads, writes = decoder.block(block)
            decoded = _Decoded(steps, branch, block.next)
            decoded.reads, decoded.writes = reads, writes
            self.blocks.append(decoded)
        self.registers = decoder.initial()
        self._find_live()
        self.passed = self._post_dominators()

    def _post_dominators(self) -> list[set[int]]:
        """For each block, those that every way from it to the end passes, itself included."""
        n = len(self.blocks)
        passed = [set(range(n)) if block.next else {k} for k, block in enumerate(self.blocks)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(n)):
                if self.blocks[k].next:
                    new = {k} | set.intersection(*(passed[j] for j in self.blocks[k].next))
                    if new != passed[k]:
                        passed[k], changed = new, True
        return passed

    def _find_live(self) -> None:
        live: list[set[int]] = [set(b.reads) for b in self.blocks]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(len(self.blocks))):
                block = self.blocks[k]
                out: set[int] = set()
                for j in block.next:
                    out |= live[j]
                new = block.reads | (out - block.writes)
                if new != live[k]:
                    live[k], changed = new, True
        for k, block in enumerate(self.blocks):
            block.live_in = sorted(live[k])
            block.live_out = set()
            for j in block.next:
                block.live_out |= live[j]
            block.dies = sorted((live[k] | block.reads | block.writes) - block.live_out)

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: list[int | float],
        memory: GlobalMemory,
        sanitizer: Sanitizer | None = None,
        counters: Counters | None = None,
        lanes: int = LANES,
    ) -> None:
        """Run every CTA of the grid.

        Args:
            grid: Programs along x, y, z.
            threads: Threads of a CTA.
            arguments: Addresses and numbers in the order of the parameters.
            memory: Where the addresses lead.
            sanitizer: Is told of every access, and collects findings.
            counters: Is told of every block that runs and of every access.
            lanes: About how many threads run in lockstep.
        """
        declared = self.program.threads
        if declared is not None and declared != threads:
            raise UnsupportedError(
                f"{self.name} is made for {declared} threads, launched with {threads}"
            )
        parameters = self._parameters(arguments)
        total = grid[0] * grid[1] * grid[2]
        per_batch = max(1, lanes // threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, per_batch):
                ctas = np.arange(first, min(first + per_batch, total))
                shared = SharedMemory(len(ctas), self.shared)
                shadow = (
                    sanitizer.shadow(shared, threads, self.grain) if sanitizer else Shadow(0, 0, 0)
                )
                registers: list[Any] = list(self.registers)
                batch = Batch(
                    registers,
                    parameters,
                    ctas,
                    grid,
                    threads,
                    memory,
                    shared,
                    sanitizer,
                    shadow,
                    counters,
                )
                self._run(batch, counters)

    def _parameters(self, arguments: list[int | float]) -> list[Array]:
        kinds = {"f32": "f4", "f64": "f8"}
        declared = self.program.parameters
        if len(arguments) > len(declared):
            raise UnsupportedError(
                f"{self.name} takes {len(declared)} parameters, got {len(arguments)}"
            )
        # Triton's own scratch buffers come last, and are not used.
        given = [*arguments, *[0] * (len(declared) - len(arguments))]
        out = []
        for (_, kind), value in zip(declared, given, strict=True):
            if kind in kinds:
                out.append(np.array([[value]], kinds[kind]))
            else:
                size = int(kind[1:]) // 8
                bits = int(value) & ((1 << 8 * size) - 1)
                out.append(np.array([[bits]], f"u{size}"))
        return out

    def _run(self, batch: Batch, counters: Counters | None) -> None:
        waiting: list[tuple[Batch, int]] = [(batch, 0)]
        while waiting:
            S, at = waiting.pop()
            while True:
                block = self.blocks[at]
                if counters is not None:
                    counters.block(self, at, S.warps, S.is_multiplying)
                for step in block.steps:
                    step(S)
                if not block.next:
                    break
                if block.branch is None or len(block.next) == 1:
                    at = block.next[0]
                else:
                    found = self._next(S, block.branch(S), block, waiting, counters)
                    if found is None:
                        break
                    at = found
                for slot in block.dies:
                    S.R[slot] = None

    def _next(
        self,
        S: Batch,
        choice: Array,
        block: _Decoded,
        waiting: list[tuple[Batch, int]],
        counters: Counters | None,
    ) -> int | None:
        """The block where the batch goes on after a branch; None where its parts do so alone."""
        if choice.all():
            return block.next[0]
        if not choice.any():
            return block.next[1]
        if choice.all(axis=1).any() or not choice.any(axis=1).all():
            return self._part(S, choice, block, waiting, counters)
        taken = S.spread(choice)
        groups = {block.next[0]: np.flatnonzero(taken)}
        fallen = np.flatnonzero(~taken)
        groups[block.next[1]] = np.union1d(groups.get(block.next[1], fallen), fallen)
        return self._run_groups(S, groups, counters)

    def _part(
        self,
        S: Batch,
        choice: Array,
        block: _Decoded,
        waiting: list[tuple[Batch, int]],
        counters: Counters | None,
    ) -> int | None:
        """`_next` of several CTAs that do not go one way."""
        every, some = choice.all(axis=1), choice.any(axis=1)
        mixed = some & ~every
        if not mixed.any():
            for nxt, which in ((block.next[1], ~some), (block.next[0], every)):
                rows = np.flatnonzero(np.broadcast_to(which, len(S.cta)))
                waiting.append((S.only_ctas(rows, self.blocks[nxt].live_in), nxt))
            return None
        if not mixed.all() and len(S.cta) > 1:
            for which in (~mixed, mixed):
                # The same branch again, for whole CTAs and for mixed ones.
                rows = np.flatnonzero(np.broadcast_to(which, len(S.cta)))
                part = S.only_ctas(rows, sorted(block.live_out))
                found = self._next(part, choice[rows], block, waiting, counters)
                if found is not None:
                    waiting.append((part, found))
            return None
        return self._next(S, choice, block, waiting, counters)

    def _run_groups(
        self, S: Batch, groups: dict[int, Array], counters: Counters | None
    ) -> int | None:
        """Run groups of lanes until they are one; None: all have ended."""
        total = S.shape[0] * S.shape[1]

        def join(at: int, lanes: Array) -> None:
            if len(lanes):
                groups[at] = np.union1d(groups[at], lanes) if at in groups else lanes

        while groups:
            # A block that others must pass waits for them, wherever the text has it.
            ready = [b for b in groups if not any(b in self.passed[c] for c in groups if c != b)]
            at = min(ready or groups)
            lanes = groups.pop(at)
            if len(lanes) == total:
                return at
            block = self.blocks[at]
            part = S.only_lanes(lanes, block.live_in)
            if counters is not None:
                counters.block(self, at, part.warps, part.is_multiplying)
            for step in block.steps:
                step(part)
            for slot in block.writes & block.live_out:
                self._scatter(S, part, slot, lanes)
            if not block.next:
                continue
            if block.branch is None or len(block.next) == 1:
                join(block.next[0], lanes)
                continue
            taken = part.spread(block.branch(part))
            join(block.next[0], lanes[taken])
            join(block.next[1], lanes[~taken])
        return None

    @staticmethod
    def _scatter(S: Batch, part: Batch, slot: int, lanes: Array) -> None:
        value, old = part.R[slot], S.R[slot]
        if value is None:
            return
        unsigned = value.dtype if value.dtype == bool else np.dtype(f"u{value.dtype.itemsize}")
        full = np.zeros(S.shape, unsigned)
        if old is not None:
            full[:] = np.broadcast_to(old.view(unsigned), S.shape)
        full.reshape(-1)[lanes] = part.spread(value.view(unsigned))
        S.R[slot] = full
