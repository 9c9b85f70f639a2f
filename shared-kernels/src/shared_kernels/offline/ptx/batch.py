"""Some CTAs in lockstep: what their lanes hold, share and wait for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FaultError, UnsupportedError
from .memory import GlobalMemory, SharedMemory

if TYPE_CHECKING:
    from .counters import Counters
    from .parser import Instruction
    from .sanitizer import Sanitizer, Shadow

Array = np.ndarray


class InFlight:
    """An accumulator of a wgmma that nobody has waited for; touching it is a fault."""

    def __init__(self, value: Array, instruction: Instruction) -> None:
        self.value, self.instruction = value, instruction

    @property
    def dtype(self) -> np.dtype:
        raise FaultError(
            f"missing wait: an accumulator is used before wgmma.wait_group, of {self.instruction}"
        )

    @property
    def shape(self) -> tuple[int, int]:
        raise FaultError(
            f"missing wait: threads part before wgmma.wait_group, of {self.instruction}"
        )

    def rows(self, which: Array) -> InFlight:
        return InFlight(self.value[which], self.instruction)


@dataclass(frozen=True, eq=False)
class Copy:
    """One cp.async of every lane, on its way to shared memory."""

    instruction: Instruction
    size: int
    destination: Array
    source: Array
    mask: Array
    taken: Array  # bytes; the rest is filled with zeros

    def rows(self, which: Array) -> Copy:
        """The copy of those CTAs alone."""
        names = ("destination", "source", "mask", "taken")
        return replace(self, **{name: getattr(self, name)[which] for name in names})


class Batch:
    """Registers of shape (CTAs or 1, threads or 1), shared memory, and what is on its way.

    ``lanes`` is None where every thread of every CTA runs; else the flat numbers
    CTA * threads + thread of those that do, and registers have the shape (1, lanes).
    """

    def __init__(
        self,
        registers: list[Any],
        parameters: list[Array],
        ctas: Array,
        grid: tuple[int, int, int],
        threads: int,
        memory: GlobalMemory,
        shared: SharedMemory,
        sanitizer: Sanitizer | None,
        shadow: Shadow,
        counters: Counters | None,
    ) -> None:
        self.R, self.parameters = registers, parameters
        self.cta, self.grid, self.threads = ctas[:, None].astype(np.int64), grid, threads
        self.memory, self.shared = memory, shared
        self.sanitizer, self.shadow, self.counters = sanitizer, shadow, counters
        self.lanes: Array | None = None
        self.row = np.arange(len(ctas), dtype=np.int64)[:, None]
        self.tid = np.arange(threads, dtype=np.uint32)[None]
        self.open_copies: list[Copy] = []
        self.copy_groups: list[list[Copy]] = []
        self.open_products: list[tuple[list[int], list[Array]]] = []  # (registers, bytes they read)
        self.product_groups: list[list[tuple[list[int], list[Array]]]] = []

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.cta), self.threads) if self.lanes is None else (1, len(self.lanes))

    @property
    def warps(self) -> int:
        if self.lanes is None:
            return len(self.cta) * -(-self.threads // 32)
        return len(np.unique(self.lanes // 32))

    @property
    def is_multiplying(self) -> bool:
        """Whether a wgmma is on its way."""
        return bool(self.open_products or self.product_groups)

    def special(self, name: str) -> Array:
        """%tid.x and its like."""
        base, _, axis = name.partition(".")
        k = "xyz".index(axis) if axis else 0
        x, y, _ = self.grid
        if base == "%tid":
            return self.tid if k == 0 else np.zeros((1, 1), np.uint32)
        if base == "%ctaid":
            parts = (self.cta % x, self.cta // x % y, self.cta // (x * y))
            return parts[k].astype(np.uint32)
        if base == "%laneid":
            return self.tid & np.uint32(31)
        if base == "%warpid":
            return self.tid >> np.uint32(5)
        sizes = {"%ntid": (self.threads, 1, 1), "%nctaid": self.grid}
        if base not in sizes:
            raise UnsupportedError(f"the special register {name}")
        return np.array([[sizes[base][k]]], np.uint32)

    # ------------------------------------------------------------------- fewer CTAs, fewer lanes

    def _like(self) -> Batch:
        other = object.__new__(Batch)
        other.__dict__.update(self.__dict__)
        return other

    def only_ctas(self, which: Array, live: list[int]) -> Batch:
        """Some of the CTAs, for good."""
        other = self._like()
        other.R = [None] * len(self.R)
        for slot in live:
            x = self.R[slot]
            if isinstance(x, InFlight):
                other.R[slot] = x.rows(which)
            elif x is not None:
                other.R[slot] = x[which] if x.shape[0] > 1 else x
        other.cta = self.cta[which]
        other.row = np.arange(len(which), dtype=np.int64)[:, None]
        other.shared = self.shared.rows(which)
        other.open_copies = [c.rows(which) for c in self.open_copies]
        other.copy_groups = [[c.rows(which) for c in group] for group in self.copy_groups]

        def moved(places: list[Array]) -> list[Array]:
            size = self.shared.size
            new = np.full(len(self.cta), -1, np.int64)
            new[which] = np.arange(len(which))
            kept = (new[p // size] * size + p % size for p in places)
            return [k[k >= 0] for k in kept]

        other.open_products = [(s, moved(p)) for s, p in self.open_products]
        other.product_groups = [[(s, moved(p)) for s, p in group] for group in self.product_groups]
        if self.sanitizer is not None:
            other.shadow = self.shadow.rows(which)
        return other

    def only_lanes(self, which: Array, live: list[int]) -> Batch:
        """Some lanes of this whole batch; they share its memories."""
        other = self._like()
        other.lanes = which

        def flat(x: Array) -> Array:
            whole = np.broadcast_to(x, (len(self.cta), self.threads))
            return whole.reshape(-1)[which][None]

        other.row, other.tid, other.cta = flat(self.row), flat(self.tid), flat(self.cta)
        other.R = [None] * len(self.R)
        for slot in live:
            x = self.R[slot]
            if x is not None:
                other.R[slot] = x if x.shape == (1, 1) else flat(x)
        return other

    # ------------------------------------------------------------------------------------- lanes

    def spread(self, x: Array) -> Array:
        """x for every lane, flat."""
        return np.broadcast_to(x, self.shape).reshape(-1)

    def by_warps(self, x: Array, name: str) -> Array:
        """(warps, 32) of x; only where whole warps run."""
        shape = self.shape
        if self.lanes is not None:
            whole = shape[1] % 32 == 0
            if (
                not whole
                or (np.diff(self.lanes.reshape(-1, 32)) != 1).any()
                or (self.lanes[::32] % 32).any()
            ):
                raise FaultError(f"divergent: {name} where the threads of a warp have parted")
        elif self.threads % 32:
            raise UnsupportedError(f"{name} with {self.threads} threads")
        return np.broadcast_to(x, shape).reshape(-1, 32)

    def from_warps(self, x: Array) -> Array:
        return np.ascontiguousarray(x).reshape(self.shape)

    def whole(self, name: str) -> None:
        """A fault where threads of a CTA have parted."""
        if self.lanes is not None:
            raise FaultError(f"divergent: {name} where threads of a CTA have parted")
