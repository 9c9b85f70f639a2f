"""Packages to compare with that are not installed: in a folder, unpacked or as wheels.

Some carry the name of one of ours. Such a one is imported beside ours and kept out of
``sys.modules``; what it imports only when it is called would be ours, so it is loaded whole.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

_places: list[Path] = []
_loaded: dict[str, ModuleType] = {}
_keep: list[tempfile.TemporaryDirectory] = []
missing: dict[str, str] = {}  # part of a loaded package -> why it could not be imported


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
    found = {p.stem for place in _places for p in place.glob("*.dist-info")}
    return sorted(found)


def version(name: str) -> str | None:
    """The version of the package of that name in the folders, if it is there."""
    for place in _places:
        for found in place.glob(f"{name.replace('-', '_')}-*.dist-info"):
            return found.name.removesuffix(".dist-info").split("-")[1]
    return None


def _parts(name: str) -> list[str]:
    return [m for m in sys.modules if m == name or m.startswith(f"{name}.")]


def load(name: str) -> ModuleType:
    """The package of that name from the folders, whatever `import name` would give."""
    if name in _loaded:
        return _loaded[name]
    place = next((p for p in _places if (p / name).is_dir()), None)
    if place is None:
        raise ModuleNotFoundError(f"{name} is not among the peers (--peers FOLDER)")
    ours = {part: sys.modules.pop(part) for part in _parts(name)}
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
        for each in pkgutil.walk_packages(module.__path__, f"{name}."):
            try:
                importlib.import_module(each.name)
            except Exception as error:  # e.g. a part for another device
                missing[each.name] = f"{type(error).__name__}: {error}"
    finally:
        sys.path.remove(str(place))
        for part in _parts(name):
            del sys.modules[part]
        sys.modules.update(ours)
        importlib.invalidate_caches()
    _loaded[name] = module
    return module
