"""What launches cost, counted: instructions by class, bank conflicts, sectors of global memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .parser import Instruction

Array = np.ndarray

_CLASSES = {
    "tensor": ("mma", "wgmma"),
    "special function": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos"),
    "shuffle": ("shfl", "redux", "vote"),
    "matrix load or store": ("ldmatrix", "stmatrix"),
    "barrier": ("bar", "barrier", "mbarrier"),
    "branch": ("bra", "ret", "exit"),
    "asynchronous copy": ("cp",),
    "move": ("mov", "cvt", "selp"),
}
_OF_OPCODE = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}


def class_of(i: Instruction) -> str:
    """The class that an instruction is counted in."""
    if i.opcode in _OF_OPCODE:
        return _OF_OPCODE[i.opcode]
    if i.opcode in ("ld", "st", "atom", "red"):
        return f"{i.opcode}.{i.modifiers[0].split(':')[0]}"
    last = i.modifiers[-1] if i.modifiers else ""
    return last if last.startswith(("f", "bf")) else "integer"


# An address is the number of its buffer and a byte; a sector has 32 bytes.
_BUFFER, _SECTOR = 40, 5


def _issued_beside(instructions: list[Instruction], is_multiplying: bool) -> int:
    """Instructions other than moves and wgmma's own between a wgmma and the wait for all."""
    n = 0
    for i in instructions:
        if i.opcode == "wgmma":
            if i.modifiers[0] == "mma_async":
                is_multiplying = True
            elif i.modifiers[0] == "wait_group" and i.operands[0] == "0":
                is_multiplying = False
        elif is_multiplying and i.opcode != "mov":
            n += 1
    return n


class Counters:
    """Sums over the launches that were given this object.

    ``shared`` maps an instruction to [accesses, wavefronts]: as many wavefronts as accesses is free
    of bank conflicts. ``sectors`` maps one to [warps, 32-byte sectors, sectors that would do].
    ``first_touched`` is the bytes of global memory that launches touched, each launch for itself;
    ``beside_products`` the instructions of warps that were issued while a wgmma was on its way.
    """

    def __init__(self) -> None:
        self.blocks: Counter[tuple[Any, int]] = Counter()
        self.first_touched, self.beside_products = 0, 0
        self._touched: dict[int, Array] = {}  # buffer -> which of its sectors were touched
        self._beside: dict[tuple[Any, int, bool], int] = {}
        self.shared: dict[tuple[str, Instruction], list[int]] = defaultdict(lambda: [0, 0])
        self.sectors: dict[tuple[str, Instruction], list[int]] = defaultdict(lambda: [0, 0, 0])

    def begin(self) -> None:
        """A new launch: nothing is touched yet."""
        self._touched = {}

    def block(self, kernel: Any, at: int, warps: int, is_multiplying: bool = False) -> None:
        """Warps run a block; whether a wgmma is on its way when they enter it."""
        self.blocks[kernel, at] += warps
        key = (kernel, at, is_multiplying)
        if key not in self._beside:
            instructions = kernel.program.blocks[at].instructions
            self._beside[key] = _issued_beside(instructions, is_multiplying)
        self.beside_products += warps * self._beside[key]

    def forms(self) -> dict[str, Counter[str]]:
        """Kernel -> instructions that warps executed, by form."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for (kernel, at), warps in self.blocks.items():
            for i in kernel.program.blocks[at].instructions:
                out[kernel.name][i.form] += warps
        return out

    def instructions(self) -> dict[str, Counter[str]]:
        """Kernel -> instructions that warps executed, by class."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for (kernel, at), warps in self.blocks.items():
            for i in kernel.program.blocks[at].instructions:
                out[kernel.name][class_of(i)] += warps
        return out

    def shared_access(
        self, kernel: str, i: Instruction, offset: Array, mask: Array, size: int
    ) -> None:
        """Wavefronts: the most words of one bank that a part of a warp asks for.

        Up to 4 bytes per lane a warp is served at once, 8 by halves, 16 by quarters.
        """
        served = 32 * 4 // max(4, size)  # lanes at once
        if offset.size % served:
            return
        words = (offset // 4).reshape(-1, served)
        active = mask.reshape(-1, served)
        words, active = words[active.any(1)], active[active.any(1)]
        if not len(words):
            return
        some = np.take_along_axis(words, active.argmax(1)[:, None], 1)
        words = np.sort(np.where(active, words, some), axis=1)
        new = np.ones(words.shape, bool)
        new[:, 1:] = words[:, 1:] != words[:, :-1]
        wide = max(1, size // 4)
        bank = words // wide % served + np.arange(len(words))[:, None] * served
        per_bank = np.bincount(bank[new], minlength=len(words) * served).reshape(-1, served)
        entry = self.shared[kernel, i]
        entry[0] += len(words)
        entry[1] += int(per_bank.max(1).sum())

    def global_access(
        self, kernel: str, i: Instruction, address: Array, mask: Array, size: int
    ) -> None:
        """Sectors that the warps' accesses touch, and the fewest that could hold the bytes."""
        if address.size % 32:
            return
        sectors, active = (address // 32).reshape(-1, 32), mask.reshape(-1, 32)
        keep = active.any(1)
        sectors, active = sectors[keep], active[keep]
        places = address.reshape(-1, 32)[keep]
        if not len(sectors):
            return

        def distinct(x: Array) -> Array:
            some = np.take_along_axis(x, active.argmax(1)[:, None], 1)
            x = np.sort(np.where(active, x, some), axis=1)
            return 1 + (x[:, 1:] != x[:, :-1]).sum(1)

        self._touch(sectors[active])
        entry = self.sectors[kernel, i]
        entry[0] += len(sectors)
        entry[1] += int(distinct(sectors).sum())
        entry[2] += int((-(-distinct(places) * size // 32)).sum())

    def _touch(self, sectors: Array) -> None:
        """Count the bytes of sectors that this launch has not touched before."""
        place = _BUFFER - _SECTOR
        for number in np.unique(sectors >> place).tolist():
            at = sectors[sectors >> place == number] & ((1 << place) - 1)
            known = self._touched.get(number, np.zeros(0, bool))
            if len(known) <= int(at.max()):
                known = np.concatenate([known, np.zeros(2 * int(at.max()) + 1 - len(known), bool)])
                self._touched[number] = known
            new = np.unique(at[~known[at]])
            known[new] = True
            self.first_touched += 32 * len(new)
