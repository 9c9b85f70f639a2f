"""The table of requirements on docs/support.md; `hatch run requirements` renews it."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SHOWN = ("torch", "shared-kernels", "numpy", "scipy", "scikit-learn", "triton")
BEGIN, END = "<!-- requirements -->\n", "<!-- /requirements -->"


def table(root: Path) -> str:
    """One line for each distribution: Python and the ranges of what it asks for."""
    lines = ["| | Python | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for path in [root / "shared-kernels", *sorted((root / "packages").iterdir())]:
        text = (path / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        ranges = {}
        for requirement in project["dependencies"]:
            bare = requirement.partition(";")[0]
            name, limits = re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?\s*(.*)", bare.strip()).groups()
            ranges[name] = limits or "any"
        cells = [project["name"], project["requires-python"]]
        cells += [ranges.get(name, "") for name in SHOWN]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def between(page: str) -> str:
    """What stands between the two marks of a page."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    path = root / "docs" / "support.md"
    page = path.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    path.write_text(before + BEGIN + table(root) + END + after, encoding="utf-8")
