"""What has to be compiled: the launches of a package with every entry of their tables."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import configs
from .targets import Row


@dataclass(frozen=True)
class Launch:
    """One way to call a launcher; see the top of this package.

    hmma_above: the size above which sm_90 may run HMMA, because tiles of M = 64 would spill.
    access: the bytes that a thread must load and store at once, of numbers of two bytes.
    """

    name: str
    run: Callable[..., object]
    table: configs.Table | None = None
    size: int | None = None
    largest: int = 256
    hmma_above: int | None = None
    access: int | None = None


@dataclass(frozen=True)
class Item:
    """One compilation: a launch with one entry of its table."""

    package: str
    launch: Launch
    size: int | None = None
    config: configs.Config | None = None

    def row(self) -> Row:
        config = "" if self.config is None else repr(self.config)[len("Config(") : -1]
        row: Row = {
            "launch": f"{self.package}: {self.launch.name}",
            "size": self.size,
            "config": config,
        }
        top = self.launch.hmma_above
        if top is not None and self.size is not None and self.size > top:
            row["hmma_allowed"] = True
        if self.launch.access is not None:
            row["access"] = self.launch.access
        return row

    def compile(self) -> None:
        with contextlib.ExitStack() as stack:
            if self.launch.table is not None and self.config is not None:
                stack.enter_context(configs.forcing(self.launch.table, self.config))
            self.launch.run(
                *([] if self.size is None or not _takes_size(self.launch) else [self.size])
            )


def _takes_size(launch: Launch) -> bool:
    return len(inspect.signature(launch.run).parameters) > 0


def plan(package: str, launches: Iterable[Launch], arch: str) -> list[Item]:
    """The compilations of a package for `arch`; ValueError if a table entry is left out."""
    items: list[Item] = []
    compiled: dict[int, tuple[configs.Table, set[tuple[int | str, configs.Config]]]] = {}
    names: set[str] = set()
    for launch in launches:
        if launch.name in names:
            raise ValueError(f"{package}: two launches are called {launch.name!r}")
        names.add(launch.name)
        if launch.table is None:
            items.append(Item(package, launch, launch.size))
            continue
        table = launch.table
        entries = list(table.served(arch))
        if not _takes_size(launch):
            if launch.size is not None:
                fitting = [s for s, _ in entries if isinstance(s, int) and s >= launch.size]
                key = min(fitting, default=configs.ANY)
                entries = [(size, config) for size, config in entries if size == key]
            elif len({size for size, _ in entries}) > 1:
                raise ValueError(
                    f"{package}: {launch.name!r} must take the size as a parameter or name its "
                    f"`size`: table {table.name!r} has several for {arch}"
                )
        done = compiled.setdefault(id(table), (table, set()))[1]
        for size, config in entries:
            done.add((size, config))
            given = size if isinstance(size, int) else launch.largest
            items.append(
                Item(package, launch, given if _takes_size(launch) else launch.size, config)
            )
    for table, done in compiled.values():
        for size, config in list(table.served(arch)):
            if (size, config) not in done:
                raise ValueError(
                    f"{package}: no launch compiles entry ({arch}, {size}) {config} "
                    f"of table {table.name!r}"
                )
    return items


def package_of(path: str | Path) -> str:
    """The package whose launches a file holds: the folder above its tests."""
    path = Path(path).resolve()
    return path.parents[1].name if path.parent.name == "tests" else path.stem


def load(path: str | Path) -> tuple[str, list[Launch]]:
    """(package, LAUNCHES) of a launches file."""
    path, package = Path(path).resolve(), package_of(path)
    spec = importlib.util.spec_from_file_location(f"launches_of_{package.replace('-', '_')}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot read {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return package, list(module.LAUNCHES)
