"""What a benchmark row is, and where the rows come from: ``benchmarks/cases/NAME.py``.

A case module has ``rows(device, quick) -> Iterator[Row]``. With ``DEVICES = ("cuda",)`` it is left
out elsewhere, with ``QUICK = False`` of a quick sweep, unless it is asked for by its name. Peers
are optional packages: one that is not installed, or cannot run a case, is an entry that says why.
"""

from __future__ import annotations

import importlib
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
        density: measured share of non-zero weights (paged: of pages read), or None.
        bars: peer -> at least this many times faster than it (below 1: at most 1/x of its speed).
        N: the length that a fit or a picture shows this row at, or None.
        grows: the claimed exponents of time and of memory against N; None where nothing is claimed.
        memory: measure memory on CPU too (on a GPU it always is).
        once: time every contender once, for peers that take very long.
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
    N: int | None = None
    grows: tuple[float | None, float | None] | None = None
    memory: bool = False
    once: bool = False


def names() -> list[str]:
    return sorted(p.stem for p in CASES.glob("*.py") if not p.stem.startswith("_"))


def modules(device: str, quick: bool, only: str = "") -> Iterator[str]:
    """The modules that a sweep visits; ``only`` picks one by its name, alone or before "/"."""
    asked = only.split("/")[0]
    if asked in names():
        yield asked
        return
    where = torch.device(device).type
    for name in names():
        module = importlib.import_module(f"benchmarks.cases.{name}")
        if where in getattr(module, "DEVICES", (where,)):
            if not quick or getattr(module, "QUICK", True):
                yield name


def rows_of(name: str, device: str, quick: bool, only: str = "") -> Iterator[Row]:
    """The rows of one module whose case contains ``only``, or all if ``only`` is its name."""
    module = importlib.import_module(f"benchmarks.cases.{name}")
    for row in module.rows(torch.device(device), quick):
        if only in row.case or only == name:
            yield row


def rows(device: str, quick: bool, only: str = "") -> Iterator[Row]:
    """The rows of every module that a sweep visits."""
    for name in modules(device, quick, only):
        yield from rows_of(name, device, quick, only)


def peer(module: str, make: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | str:
    """``make(module)`` if the module is there, else why there is no such peer."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.split(".")[0]
        return f"{name} is not installed" if error.name in (module, name) else str(error)
    except Exception as error:  # a peer's own failure is a result, not ours to hide
        return f"cannot be imported: {type(error).__name__}: {error}"
    try:
        return make(found)
    except Exception as error:  # the same
        return f"{type(error).__name__}: {error}"


def tensors(result: Any) -> list[Tensor]:
    """The tensors in a result: itself, or those of a tuple."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]
