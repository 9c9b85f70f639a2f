"""The tables of docs/support.md, requirements and stacks; `hatch run requirements` renews them."""

from __future__ import annotations

import json
import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SHOWN = ("torch", "shared-kernels", "numpy", "scipy", "scikit-learn", "triton")
LEGS = {
    "cpu": "CPU tests",
    "interpreter": "kernels, interpreted",
    "offline": "kernels, compiled",
    "extras": "with optional packages",
}


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


def stacks(root: Path) -> str:
    """One line for each stack that `.ci/stack` ran: what each leg said last, with its versions."""
    path = root / "benchmarks" / "results" / "stacks.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    versions = [name for name in SHOWN if name != "shared-kernels"]
    heads = ["", "Python", *versions, *LEGS.values(), "date"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for last in {row["stack"]: row for row in rows}.values():
        asked = [last["stack"], last["python"], *(last[name] for name in versions)]
        cells = dict.fromkeys(LEGS, "not run")
        for row in rows:
            if [row["stack"], row["python"], *(row[name] for name in versions)] != asked:
                continue
            for leg in cells.keys() & row.keys():
                cells[leg] = _result(row, leg, cells[leg])
        lines.append("| " + " | ".join((*asked, *cells.values(), last["date"])) + " |")
    return "\n".join(lines) + "\n"


def _result(row: dict[str, str], leg: str, before: str) -> str:
    """What a leg said, without its time; of some files of tests: behind what it said before."""
    said = row[leg].split(" in ")[0]
    if row["tests"] == "all" or leg == "offline":
        return said
    said += f" ({len(row['tests'].split())} files of tests)"
    return said if before == "not run" else f"{before}; after changes {said}"


TABLES = {"requirements": table, "stacks": stacks}


def between(page: str, name: str) -> str:
    """What stands between the two marks of a table on a page."""
    return page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    path = root / "docs" / "support.md"
    page = path.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        page = before + mark + made(root) + rest[rest.index(f"<!-- /{name} -->") :]
    path.write_text(page, encoding="utf-8")
