"""What a benchmark row is, and where the rows come from: ``benchmarks/cases/NAME.py``.

A case module has ``rows(device, quick) -> Iterator[Row]``. Peers are optional packages: one that
is not installed, or cannot run a case, is a row entry that says why.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: what is timed, e.g. ``"diffmax/forward"``.
        size: shape and parameters, as the table shows them.
        ours: the call that is timed.
        exact: float64 answer for the gate; not timed.
        checked: the call that ``exact`` answers; ``ours`` itself unless that is too large for a
            dense reference.
        peers: name -> call, or the reason why it cannot run.
        floor: the least work this case can be (one pass, the matrix products), or None.
        density: measured share of non-zero weights, or None.
        bars: peer -> at least this many times faster than it (below 1: at most 1/x of its speed).
    """

    case: str
    size: str
    ours: Callable[[], Any]
    exact: Callable[[], Any]
    peers: dict[str, Callable[[], Any] | str] = field(default_factory=dict)
    floor: Callable[[], Any] | None = None
    density: float | None = None
    bars: dict[str, float] = field(default_factory=dict)
    checked: Callable[[], Any] | None = None


def names() -> list[str]:
    return sorted(p.stem for p in CASES.glob("*.py") if not p.stem.startswith("_"))


def rows(device: str, quick: bool, only: str = "") -> Iterator[Row]:
    """The rows whose case contains ``only``; a module's name, alone or before "/", picks it."""
    module_name = only.split("/")[0]
    for name in [module_name] if module_name in names() else names():
        module = importlib.import_module(f"benchmarks.cases.{name}")
        for row in module.rows(torch.device(device), quick):
            if only in row.case or only == name:
                yield row


def peer(module: str, make: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | str:
    """``make(module)`` if the module is installed, else why there is no such peer."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    try:
        return make(importlib.import_module(module))
    except Exception as error:  # a peer's own failure is a result, not ours to hide
        return f"{type(error).__name__}: {error}"


def tensors(result: Any) -> list[Tensor]:
    """The tensors in a result: itself, or those of a tuple."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]
