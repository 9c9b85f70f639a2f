"""A README is executable: its python blocks run, its API table is the package's ``__all__``.

A block of text right below a block of python is what that block prints. Running the page compares:
words must be equal, numbers may differ as two processors or two releases of torch make them differ.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_SHOWN = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.M | re.S)
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[+-]?\d+)?")
# of a printed number: two in a hundred, or three in the last digit that is shown
_RELATIVE, _LAST = 0.02, 3
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
    outputs = _SHOWN.findall(Path(path).read_text(encoding="utf-8"))
    for (title, code), (_, shown) in zip(blocks(path), outputs, strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed) if shown else contextlib.nullcontext():
            run_block(code, namespace, title)
        if shown and (why := difference(shown, printed.getvalue())):
            raise ValueError(f"{path}, {title!r} prints something else than it shows: {why}")
    return namespace


def difference(shown: str, printed: str) -> str | None:
    """Why `printed` is not the output that a page shows; None where it is.

    Words and the number of lines must be equal, spaces need not. A number may be off by 2 % or by
    3 in its last digit; one that is shown without a point may not, if it is below 10.

    Example:
        >>> difference("loss 0.52", "loss 0.515")
        >>> difference("loss 0.52", "loss 0.61")
        "shown 'loss 0.52', printed 'loss 0.61'"
    """
    lines = [text.strip().splitlines() for text in (shown, printed)]
    if len(lines[0]) != len(lines[1]):
        return f"shown {len(lines[0])} lines, printed {len(lines[1])}: {printed.strip()!r}"
    for one, other in zip(*lines, strict=True):
        words = [" ".join(_NUMBER.sub(" # ", line).split()) for line in (one, other)]
        pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=False)
        if words[0] != words[1] or not all(_close(a, b) for a, b in pairs):
            return f"shown {one.strip()!r}, printed {other.strip()!r}"
    return None


def _close(shown: str, printed: str) -> bool:
    mantissa, _, power = shown.partition("e")
    digits = len(mantissa.partition(".")[2])
    a, b = float(shown), float(printed)
    if "." not in mantissa and not power and abs(a) < 10:
        return a == b
    last = 10.0 ** (int(power or 0) - digits)
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_LAST * last)


def renew(path: str | Path) -> None:
    """Run the blocks of a page, and write what each prints in the place of what it shows."""
    namespace: dict[str, Any] = {"__name__": "readme"}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run_block(match[1], namespace)
        block = f"```python\n{match[1]}```\n"
        return block if match[2] is None else f"{block}\n```text\n{printed.getvalue()}```"

    page = Path(path)
    page.write_text(_SHOWN.sub(run, page.read_text(encoding="utf-8")), encoding="utf-8")


def run_block(
    code: str, namespace: dict[str, Any] | None = None, title: str = "block"
) -> dict[str, Any]:
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
