"""Packages to compare with that are not installed: in a folder, unpacked or as wheels.

Some carry the name of one of ours. While such a one is imported or called, ``sys.modules`` holds
it and not ours; afterwards it is the other way round again.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_places: list[Path] = []
_theirs: dict[str, dict[str, ModuleType]] = {}
_keep: list[tempfile.TemporaryDirectory] = []


def use(folder: Path) -> list[str]:
    """Look into `folder` from now on; its wheels are unpacked into a temporary folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`--peers` must be a folder, got {folder}")
    _places.append(folder.resolve())
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        _keep.append(tempfile.TemporaryDirectory(prefix="peers-"))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(_keep[-1].name)
        _places.append(Path(_keep[-1].name))
    # Behind everything else: nothing of the environment, and nothing of ours, is replaced.
    sys.path.extend(str(place) for place in _places if str(place) not in sys.path)
    return sorted({p.stem for place in _places for p in place.glob("*.dist-info")})


def _take(name: str) -> dict[str, ModuleType]:
    """Take the modules of a package out of ``sys.modules``."""
    parts = [m for m in sys.modules if m == name or m.startswith(f"{name}.")]
    return {part: sys.modules.pop(part) for part in parts}


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Here `import name` gives the package of that name from the folders, not ours."""
    place = next((p for p in _places if (p / name).is_dir()), None)
    if place is None:
        raise ModuleNotFoundError(f"{name} is not among the peers (--peers FOLDER)")
    ours = _take(name)
    sys.modules.update(_theirs.get(name, {}))
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
        _theirs[name] = _take(name)
        sys.modules.update(ours)


def peer(
    name: str, make: Callable[[Any], Callable[[], Any]], part: str = ""
) -> Callable[[], Any] | str:
    """As `registry.peer`, for a package with one of our names; ``make`` gets its module `part`."""
    try:
        with inside(name):
            call = make(importlib.import_module(f"{name}.{part}" if part else name))
    except Exception as error:  # a peer's own failure is a result, not ours to hide
        missing = isinstance(error, ModuleNotFoundError) and error.name is None
        return str(error) if missing else f"{type(error).__name__}: {error}"

    def called() -> Any:
        with inside(name):
            return call()

    return called
