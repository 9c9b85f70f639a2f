"""What a run is watched for, and what was found.

Shared memory is watched in grains, the smallest access of the kernel. Every grain knows who wrote
it last and in which epoch (a barrier begins a new one), and in which epoch each warp read it last:
two warps that meet in one epoch, one of them writing, race. A grain that an asynchronous copy will
fill belongs to nobody until the wait; one that a wgmma reads may not be written before its wait.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from .memory import GlobalMemory, SharedMemory

if TYPE_CHECKING:
    from .parser import Instruction

Array = np.ndarray

KINDS = (
    "out of bounds",
    "misaligned",
    "uninitialised",
    "race",
    "missing wait",
    "missing proxy fence",
    "divergent",
    "non-deterministic atomic",
)


# How a grain was written that no proxy fence has passed on to wgmma.
STORED, COPIED = 1, 2
UNFENCED = {
    STORED: "a wgmma reads what ordinary stores wrote",
    COPIED: "a wgmma reads what cp.async copied",
}


class Shadow:
    """What is known of the shared memory of a batch of CTAs."""

    def __init__(self, ctas: int, grains: int, warps: int) -> None:
        self.grains, self.epoch = grains, 1
        n = ctas * grains
        self.last = np.zeros(n, np.int32)  # epoch * 64 + warp + 1; negative: a copy is on its way
        self.read = np.zeros((warps, n), np.int32)  # epoch
        self.held = np.zeros(n, bool)  # a wgmma is reading it
        self.generic = np.zeros(n, np.int8)  # written since the last proxy fence: STORED or COPIED

    def rows(self, which: Array) -> Shadow:
        """What is known of those CTAs alone."""
        other = object.__new__(Shadow)
        other.grains, other.epoch = self.grains, self.epoch
        for name in ("last", "held", "generic"):
            setattr(other, name, getattr(self, name).reshape(-1, self.grains)[which].reshape(-1))
        read = self.read.reshape(len(self.read), -1, self.grains)[:, which]
        other.read = np.ascontiguousarray(read).reshape(len(self.read), -1)
        return other


class Sanitizer:
    """Collects findings: `found` counts (kind, kernel, instruction, words)."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, str, str]] = Counter()
        self.kernel = "?"
        self.forms: dict[str, set[str]] = {}  # of every kernel that ran
        self.functions: set[str] = set()  # that they were compiled from, as module:function
        self._grain = 1
        self._atomics: set[int] = set()

    def begin(
        self, kernel: str, forms: frozenset[str] = frozenset(), function: str | None = None
    ) -> None:
        """A new launch of a kernel.

        Args:
            kernel: Its name.
            forms: The forms of instructions that its text has.
            function: The Python function that it was compiled from, as ``module:function``.
        """
        self.kernel = kernel
        self.forms.setdefault(kernel, set()).update(forms)
        if function is not None:
            self.functions.add(function)
        self._atomics = set()

    def report(self, kind: str, i: Instruction, text: str) -> None:
        self.found[kind, self.kernel, str(i), text] += 1

    def kinds(self) -> set[str]:
        """The kinds of what was found."""
        return {kind for kind, *_ in self.found}

    def text(self) -> str:
        """One paragraph for each finding."""
        return "\n".join(
            f"{kind} ({count}x) in {kernel} at {where}: {text}"
            for (kind, kernel, where, text), count in self.found.items()
        )

    # ------------------------------------------------------------------------------------ shared

    def shadow(self, shared: SharedMemory, threads: int, grain: int) -> Shadow:
        self._grain = grain
        ctas = len(shared.data)
        return Shadow(ctas, shared.size // grain, -(-threads // 32))

    def barrier(self, shadow: Shadow) -> None:
        shadow.epoch += 1

    def touch(
        self, shadow: Shadow, what: str, i: Instruction, offset: Array, warp: Array, size: int
    ) -> None:
        """Flat accesses: "load", "store", "issue" (of a copy), "land", or "operand" of a wgmma."""
        if not len(offset):
            return
        grain = self._grain
        index = offset // grain
        if size > grain:
            index = (index[:, None] + np.arange(size // grain)).reshape(-1)
            warp = np.repeat(warp, size // grain)
        last, epoch = shadow.last[index], shadow.epoch
        code = (epoch * 64 + 1 + warp).astype(np.int32)
        is_write = what in ("store", "issue", "land")
        if is_write and shadow.held[index].any():
            self.report("missing wait", i, "writes what a wgmma may still be reading")
        if what == "land":
            if (last >= 0).any():
                self.report("race", i, "the destination was written between the copy and its wait")
            shadow.last[index] = code
            shadow.generic[index] = COPIED
            return
        if (last < 0).any():
            self.report("missing wait", i, f"a {what} of what an asynchronous copy has not filled")
        raced = (last // 64 == epoch) & (last != code)
        if not is_write:
            if (last == 0).any():
                self.report("uninitialised", i, "reads shared memory that nobody wrote")
            if raced.any():
                self.report("race", i, "reads what another warp wrote, with no barrier between")
            if what == "operand":
                for how, text in UNFENCED.items():
                    if (shadow.generic[index] == how).any():
                        self.report("missing proxy fence", i, text)
            shadow.read[warp, index] = epoch
            return
        if raced.any():
            self.report("race", i, "writes what another warp wrote, with no barrier between")
        readers = shadow.read[:, index] == epoch
        readers[warp, np.arange(len(warp))] = False
        if readers.any():
            self.report("race", i, "writes what another warp read, with no barrier between")
        shadow.last[index] = -code if what == "issue" else code
        if what == "store":
            shadow.generic[index] = STORED

    def hold(self, shadow: Shadow, offset: Array, is_held: bool) -> None:
        """A wgmma begins, or ends, to read these bytes."""
        shadow.held[offset // self._grain] = is_held

    def proxy_fence(self, shadow: Shadow) -> None:
        shadow.generic[:] = 0

    # ------------------------------------------------------------------------------------ global

    def global_read(self, memory: GlobalMemory, i: Instruction, address: Array, size: int) -> None:
        """Flat addresses of `size` bytes."""
        if memory.watched and len(address):
            step = min(size, 4)
            for k in range(0, size, step):
                if memory.never_written(address + k, step).any():
                    self.report("uninitialised", i, "reads global memory that nobody wrote")
                    return

    def float_atomic(self, i: Instruction, address: Array) -> None:
        """Sums of floats in an order that changes between runs differ in their bits."""
        places = address.tolist()
        distinct = set(places)
        if len(distinct) < len(places) or distinct & self._atomics:
            text = "several threads add floats to one place, in no fixed order"
            self.report("non-deterministic atomic", i, text)
        self._atomics |= distinct
