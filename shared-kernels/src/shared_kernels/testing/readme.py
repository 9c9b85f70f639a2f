"""A README is executable: its python blocks run, its API table is the package's ``__all__``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_NAME = re.compile(r"^\|\s*`([A-Za-z_]\w*)")


def blocks(path: str | Path) -> list[tuple[str, str]]:
    """(heading above it, code) of each ```python block."""
    text = Path(path).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        headings = re.findall(r"^#+ (.*)$", text[: match.start()], re.M)
        found.append((headings[-1] if headings else "", match.group(1)))
    return found


def run_blocks(path: str | Path) -> dict[str, Any]:
    """Run all python blocks of the file in one namespace, as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for title, code in blocks(path):
        run_block(code, namespace, title)
    return namespace


def run_block(code: str, namespace: dict[str, Any] | None = None, title: str = "block") -> dict:
    namespace = {"__name__": "readme"} if namespace is None else namespace
    exec(compile(code, f"<README: {title}>", "exec", dont_inherit=True), namespace)
    return namespace


def api_names(path: str | Path) -> set[str]:
    """Names in the first column of the tables whose header starts with "Symbol"."""
    names: set[str] = set()
    inside = False
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and line.lower().lstrip("| ").startswith("symbol"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and (match := _NAME.match(line)):
            names.add(match.group(1))
    return names
