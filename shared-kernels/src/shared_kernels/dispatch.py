"""Which backend runs, and why: one place for the choice, the error text and the log line."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger("shared_kernels.dispatch")
_last: dict[str, str] = {}


def choose(op: str, backend: str, reasons: Mapping[str, str | None]) -> str:
    """:func:`decide`, and remember it for :func:`last` and the log."""
    chosen = decide(op, backend, reasons)
    if not torch.compiler.is_compiling():
        _last[op] = chosen
        logger.debug("%s runs on %s (asked for: %s)", op, chosen, backend)
    return chosen


def decide(op: str, backend: str, reasons: Mapping[str, str | None]) -> str:
    """Decide which backend runs ``op``.

    Args:
        op: the op's name, for messages, the log and :func:`last`.
        backend: ``"auto"`` (the first backend that can run; never ``"reference"``, which stands
            beside for comparison) or a backend's name; ``"cpu"`` is an alias of ``"torch"``.
        reasons: in order of preference, for each backend None (it can run) or why it cannot.

    Raises:
        ValueError: ``backend`` is not a name in ``reasons``.
        NotImplementedError: the backend asked for cannot run, with the reason; no other is tried.
    """
    if backend == "cpu" and "torch" in reasons:  # the older name of the same backend
        backend = "torch"
    if backend == "auto":
        for name in reasons:
            if name != "reference" and reasons[name] is None:
                return name
        listed = "; ".join(f"{name}: {reasons[name]}" for name in reasons if name != "reference")
        raise NotImplementedError(f"no backend can run {op} ({listed})")
    if backend not in reasons:
        names = ", ".join(repr(name) for name in ("auto", *reasons))
        raise ValueError(f"`backend` must be one of {names}, got {backend!r}")
    reason = reasons[backend]
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot run {op}: {reason}")
    return backend


def last(op: str) -> str | None:
    """The backend that ran ``op`` last in this process, or None if it has not run."""
    return _last.get(op)


def explain(op: str, reasons: Mapping[str, str | None]) -> str:
    """One line per backend: which would be chosen, which could run, which cannot and why."""
    lines, chosen = [f"{op}:"], False
    for name, reason in reasons.items():
        if reason is not None:
            state = f"cannot run: {reason}"
        elif chosen or name == "reference":
            state = "can run"
        else:
            state, chosen = "chosen", True
        lines.append(f"  {name}: {state}")
    return "\n".join(lines)
