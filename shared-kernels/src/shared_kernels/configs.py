"""Tile sizes, warps and stages: frozen tables whose first entry is the default.

A package's ``_triton/configs.py`` holds such tables and nothing else. An entry may be replaced by a
measured one without editing code: ``SHARED_KERNELS_CONFIGS=FILE.json`` with
``{"table name": {"sm_90/128": {"BLOCK_Q": 64, ..., "num_warps": 8, "num_stages": 2}}}``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .device import Target

ANY = "any"

# A card without rows of its own takes those of a card with as many registers and no more shared
# memory, before those of ANY.
LIKE = {
    "sm_86": "sm_120",
    "sm_89": "sm_120",
    "sm_121": "sm_120",
    "sm_100": "sm_90",
    "sm_103": "sm_90",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}


class Config:
    """One choice of tiles: ``Config(BLOCK_Q=64, BLOCK_K=64, num_warps=8, why="...")``."""

    __slots__ = ("num_stages", "num_warps", "tiles", "why")
    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int
    why: str

    def __init__(self, *, num_warps: int, num_stages: int = 2, why: str = "", **tiles: int) -> None:
        for name, value in (
            ("tiles", MappingProxyType(tiles)),
            ("num_warps", num_warps),
            ("num_stages", num_stages),
            ("why", why),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Config is frozen")

    def meta(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, tile: str) -> int:
        return self.tiles[tile]

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{k}={v}" for k, v in self.meta().items()) + ")"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.meta() == other.meta()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.meta().items())))


Entries = Mapping[tuple[str, int | str], tuple[Config, ...]]


class Table:
    """Configs by (arch, largest size served); ``size`` is the head dim, or what ``axis`` says.

    ``ANY`` as the arch serves every target, ``ANY`` as the size every larger one. The nearest size
    comes first, whichever arch it stands under; of two rows of one size the arch's own.
    """

    def __init__(
        self,
        name: str,
        entries: Entries,
        axis: str = "head dim",
    ) -> None:
        self.name, self.axis = name, axis
        self._entries = MappingProxyType(dict(entries))

    def pick(self, target: Target, size: int) -> Config:
        """The config for ``size`` on ``target``: the forced one, a measured one, or the default."""
        for table, config in reversed(_forced):
            if table is self:
                return config
        key = self._key(target.arch, size)
        measured = _measured(os.environ.get("SHARED_KERNELS_CONFIGS", ""))
        entry = measured.get(self.name, {}).get(f"{key[0]}/{key[1]}")
        if not entry:
            return self._entries[key][0]
        try:
            return Config(**entry)
        except TypeError as error:
            raise ValueError(
                f"SHARED_KERNELS_CONFIGS: the entry {key[0]}/{key[1]} of {self.name!r} must hold "
                f"tile sizes, num_warps and num_stages, got {entry}"
            ) from error

    def _key(self, arch: str, size: int) -> tuple[str, int | str]:
        for wanted in self._sizes(size):
            for name in _names(arch):
                if (name, wanted) in self._entries:
                    return name, wanted
        raise NotImplementedError(
            f"table {self.name!r} has no entry for {arch} and {self.axis} {size}"
        )

    def _sizes(self, size: int) -> list[int | str]:
        """The sizes of the table that serve ``size``, the nearest first."""
        return [*sorted({n for _, n in self._entries if isinstance(n, int) and n >= size}), ANY]

    def entries(self) -> Iterator[tuple[str, int | str, Config]]:
        for (arch, size), configs in self._entries.items():
            for config in configs:
                yield arch, size, config

    def served(self, arch: str) -> Iterator[tuple[int | str, Config]]:
        """What :meth:`pick` can reach on ``arch``: for each size the entry that comes first."""
        for wanted in dict.fromkeys(size for _, size in self._entries):
            first = next((n for n in _names(arch) if (n, wanted) in self._entries), None)
            if first is not None:
                yield from ((wanted, config) for config in self._entries[first, wanted])


def _names(arch: str) -> tuple[str, ...]:
    """Under which names a table may know ``arch``, its own first."""
    return (arch, LIKE[arch], ANY) if arch in LIKE else (arch, ANY)


_forced: list[tuple[Table, Config]] = []


@contextlib.contextmanager
def forcing(table: Table, config: Config) -> Iterator[None]:
    """Inside this context ``table.pick`` returns ``config``: for sweeps and offline compilation."""
    _forced.append((table, config))
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _measured(path: str) -> dict[str, dict[str, dict[str, Any]]]:
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            measured = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"SHARED_KERNELS_CONFIGS must name a JSON file of measured configs, got {path!r}: "
            f"{error}; unset it to use the default tables"
        ) from error
    if not isinstance(measured, dict):
        raise ValueError(
            f"SHARED_KERNELS_CONFIGS must name a file of {{table: {{arch/size: config}}}}, "
            f"got a {type(measured).__name__} in {path!r}"
        )
    return measured
