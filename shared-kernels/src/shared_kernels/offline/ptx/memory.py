"""Global memory as the tensors of a launch, and shared memory as one row of bytes for each CTA."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .errors import FaultError

Array = np.ndarray

# Where a CTA's shared memory starts: not 0, and aligned for every swizzle.
SHARED_START = 1024
# What memory holds that nobody wrote: NaN in every floating type, four bytes of an odd pattern.
POISON = 0xFFA57FA5
# Buffers lie this far apart, so that no wild access meets a neighbour.
_APART = 1 << 40


class GlobalMemory:
    """The storages of a launch's tensors at addresses of their own; the rest is out of bounds."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self.storages: list[Array] = []
        self._views: dict[tuple[int, int], Array] = {}
        self.spans: list[list[int]] = []  # [first byte, behind the last, storage], sorted
        self.watched: set[int] = set()  # storages that came from torch.empty

    def address(self, tensor: torch.Tensor, is_poisoned: bool = False) -> int:
        """The address to pass; the bytes from the tensor's first to its last may be touched."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._numbers:
            self._numbers[start] = len(self.storages)
            self.storages.append(bytes_of(tensor))
        number = self._numbers[start]
        if is_poisoned:
            self.watched.add(number)
        first = int(tensor.storage_offset()) * tensor.element_size()
        address = (number + 1) * _APART + first
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self._allow(address, address + int(last + 1) * tensor.element_size(), number)
        return address

    def _allow(self, first: int, end: int, number: int) -> None:
        merged: list[list[int]] = []
        for span in sorted([*self.spans, [first, end, number]]):
            if merged and merged[-1][2] == span[2] and span[0] <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], span[1])
            else:
                merged.append(span)
        self.spans = merged
        self._firsts = np.array([s[0] for s in merged], np.int64)
        self._ends = np.array([s[1] for s in merged], np.int64)
        self._storages = np.array([s[2] for s in merged], np.int64)

    def view(self, number: int, size: int) -> Array:
        """A storage as unsigned integers of `size` bytes."""
        found = self._views.get((number, size))
        if found is None:
            data = self.storages[number]
            found = data[: len(data) // size * size].view(f"u{size}")
            self._views[number, size] = found
        return found

    def locate(self, address: Array, size: int) -> tuple[Array | None, Array, Array]:
        """(lanes out of bounds or None, number of the storage, byte in it) of flat addresses."""
        if not self.spans:
            everything = np.ones(address.shape, bool)
            return everything, np.zeros(address.shape, np.int64), address
        which = np.searchsorted(self._firsts, address, side="right") - 1
        inside = np.maximum(which, 0)
        bad = (which < 0) | (address + size > self._ends[inside])
        number = self._storages[inside]
        return (bad if bad.any() else None), number, address - (number + 1) * _APART

    def place(self, address: int) -> str:
        """Words for an address: its byte in the nearest buffer."""
        if not self.spans:
            return "the launch has no buffer"
        near = min(self.spans, key=lambda s: max(s[0] - address, address - s[1], 0))
        return f"byte {address - near[0]} of a buffer of {near[1] - near[0]} bytes"

    def load(self, address: Array, size: int, count: int) -> tuple[list[Array], Array | None]:
        """`count` words of `size` bytes each at flat addresses; and the lanes out of bounds."""
        bad, numbers, offset = self.locate(address, size * count)
        if bad is not None:
            numbers, offset = np.where(bad, -1, numbers), np.where(bad, 0, offset)
        out = [np.zeros(address.shape, f"u{size}") for _ in range(count)]
        first = int(numbers[0]) if len(numbers) else -1
        if first >= 0 and (numbers == first).all():
            view, index = self.view(first, size), offset // size
            return [view[index + j] for j in range(count)], bad
        for number in np.unique(numbers):
            if number >= 0:
                lanes = numbers == number
                view, index = self.view(int(number), size), offset[lanes] // size
                for j in range(count):
                    out[j][lanes] = view[index + j]
        return out, bad

    def store(self, address: Array, values: list[Array], size: int) -> Array | None:
        """Write flat values; returns the lanes out of bounds, which write nothing."""
        bad, numbers, offset = self.locate(address, size * len(values))
        if bad is not None:
            numbers = np.where(bad, -1, numbers)
        for number in np.unique(numbers):
            if number >= 0:
                lanes = numbers == number
                view, index = self.view(int(number), size), offset[lanes] // size
                for j, value in enumerate(values):
                    view[index + j] = value[lanes]
        return bad

    def never_written(self, address: Array, size: int) -> Array:
        """Which flat addresses lie in a word of torch.empty that still has the poison."""
        bad, numbers, offset = self.locate(address, size)
        out = np.zeros(address.shape, bool)
        for number in self.watched.intersection(np.unique(numbers).tolist()):
            lanes = (numbers == number) if bad is None else (numbers == number) & ~bad
            view = self.view(number, 4)
            words = offset[lanes] // 4
            known = words < len(view)
            out[lanes] = known & (view[np.where(known, words, 0)] == np.uint32(POISON))
        return out


class SharedMemory:
    """(CTAs, bytes) of shared memory; a byte is named by CTA * size + offset."""

    def __init__(self, ctas: int, size: int) -> None:
        self.used = size
        self.size = size + -size % 128
        self.data = np.full((ctas, self.size // 4), POISON, np.uint32).view(np.uint8)

    def rows(self, which: Array) -> SharedMemory:
        """Those CTAs alone."""
        other = object.__new__(SharedMemory)
        other.used, other.size, other.data = self.used, self.size, self.data[which]
        return other

    def offset(self, address: Array, row: Array, size: int, name: str) -> Array:
        """The bytes that shared addresses name, checked for bounds and alignment."""
        where = address.astype(np.int64) - SHARED_START
        if where.size and (int(where.min()) < 0 or int(where.max()) + size > self.used):
            raise FaultError(f"out of bounds: {name} leaves the {self.used} bytes of shared memory")
        if (where & (size - 1)).any():
            raise FaultError(f"misaligned: {name} at an address that {size} does not divide")
        return where + row * self.size

    def view(self, size: int) -> Array:
        return self.data.reshape(-1).view(f"u{size}")


def bytes_of(tensor: torch.Tensor) -> Array:
    """The whole storage of a CPU tensor, as bytes that belong to the tensor."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return np.zeros(0, np.uint8)
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.ctypeslib.as_array(raw)


def poisoned(tensor: torch.Tensor) -> None:
    """Fill a tensor's storage with the poison."""
    data = bytes_of(tensor)
    data[: len(data) // 4 * 4].view(np.uint32)[:] = POISON
