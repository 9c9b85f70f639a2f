"""The distributions of this repository, as their pyproject.toml files describe them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Project:
    """One distribution: where it lives and which siblings it names (extras included)."""

    name: str
    path: str
    siblings: frozenset[str]

    @property
    def module(self) -> str:
        """The name to import."""
        return self.name.replace("-", "_")


def requirement_name(requirement: str) -> str:
    """`shared-kernels[testing]>=0.1` → `shared-kernels`."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


def metadata(path: Path) -> dict:
    """The parsed pyproject.toml of one project folder."""
    return tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))


def projects(root: Path = ROOT) -> list[Project]:
    """Every distribution under `root`: shared-kernels first, then the packages by name."""
    folders = [root / "shared-kernels", *sorted((root / "packages").iterdir())]
    tables = {
        folder: metadata(folder)["project"]
        for folder in folders
        if (folder / "pyproject.toml").is_file()
    }
    names = {table["name"] for table in tables.values()}
    found = []
    for folder, table in tables.items():
        extras = table.get("optional-dependencies", {}).values()
        requirements = [*table.get("dependencies", []), *(r for extra in extras for r in extra)]
        wanted = {requirement_name(requirement) for requirement in requirements}
        siblings = frozenset((wanted & names) - {table["name"]})
        found.append(Project(table["name"], folder.relative_to(root).as_posix(), siblings))
    return found


def select(names: list[str], root: Path = ROOT) -> list[Project]:
    """The projects called `names`, or all of them; an unknown name is an error that lists them."""
    every = projects(root)
    unknown = sorted(set(names) - {project.name for project in every})
    if unknown:
        known = ", ".join(project.name for project in every)
        raise SystemExit(f"no such distribution: {', '.join(unknown)}; there are {known}")
    return [project for project in every if not names or project.name in names]
