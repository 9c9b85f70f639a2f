"""Time a row: ours twice, the floor and the peers, interleaved in one process.

CPU: one thread, process CPU time, medians; a call under 5 ms runs once untimed before each timing,
so that no contender pays for the cache and the heap that the one before it left behind.
GPU: event times, medians; the L2 cache is emptied before each timing. Memory is measured as well.
The first call of each contender, which may compile, is timed apart, by the wall's clock.
The order changes from round to round (`orders`); rounds of over half a minute are few, each
contender once in each place. ``ours`` has two slots: its time is the median
over both, and the ratio of the two slots' medians, larger over smaller, is the row's noise.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import clock, gate
from .registry import Row

# Rounds of a slow call, and of one that takes less than SHORT_SECONDS.
SLOW_ROUNDS, FAST_ROUNDS, SHORT_SECONDS = 5, 21, 0.005
MAX_SECONDS = 30.0  # a longer round is repeated only as often as it has contenders
QUICK_SECONDS = 0.05  # the same in a quick sweep
SLOTS = ("ours", "ours again")


def orders(n: int) -> list[list[int]]:
    """Orders of n contenders in which each has each place, and each predecessor, equally often.

    A zigzag 0, n-1, 1, n-2, ... and its rotations; for odd n also their mirror images.
    Source: Williams, Australian Journal of Scientific Research A 2 (1949).
    """
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    found = [[(place + shift) % n for place in zigzag] for shift in range(n)]
    return found + [order[::-1] for order in found] if n % 2 else found


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, for each row."""
    described = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
    else:
        from shared_kernels import native  # an older commit of `--against` has none

        described["device"] = f"cpu ({platform.machine()}), one thread"
        described["processor"] = processor()
        ours = native.why_not() or native.instruction_set()
        described["instructions"] = (
            f"native {ours}, torch {torch.backends.cpu.get_cpu_capability()}"
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    described["commit"] = commit.stdout.strip() or "unknown"
    return described


def processor() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def _without_places(text: str) -> str:
    """Absolute paths shortened: where things lie on this machine is nobody's business."""

    def end(path: re.Match[str]) -> str:
        parts = path[0].split("/")
        return "…/" + "/".join(parts[-3:] if len(parts) > 4 else parts[-1:])

    return re.sub(r"(?<![\w.:/])/(?:[\w.+~-]+/)+[\w.+~-]+", end, text)


def measure(row: Row, device: torch.device, quick: bool = False) -> dict[str, Any]:
    """Median seconds of each contender, and what cannot run and why; `quick`: fewer long calls."""
    timer = clock.clock(device)
    first = {"ours": timer.first(row.ours)}
    gate.check(row)
    calls: dict[str, Callable[[], Any]] = dict.fromkeys(SLOTS, row.ours)
    if row.floor is not None:
        calls["floor"] = row.floor
    refused: dict[str, str] = {}
    for name, call in row.peers.items():
        if isinstance(call, str):
            refused[name] = _without_places(call)
            continue
        try:
            first[name] = timer.first(call)
            calls[name] = call
        except Exception as error:  # a peer's own failure is a result
            message = str(error).strip() or "no message"
            refused[name] = _without_places(f"{type(error).__name__}: {message.splitlines()[0]}")
    begin = first if row.once else {name: timer(call) for name, call in calls.items()}
    design, names = orders(len(calls)), list(calls)
    short = {name: begin.get(name, begin["ours"]) < SHORT_SECONDS for name in names}
    at_least = FAST_ROUNDS if short["ours"] else SLOW_ROUNDS
    rounds = math.ceil(at_least / len(design))  # whole designs only
    plan = design * rounds
    if row.once or sum(begin.values()) > (QUICK_SECONDS if quick else MAX_SECONDS):
        plan = design[: 1 if row.once else len(calls)]  # each once in each place
    seen: dict[str, list[float]] = {name: [] for name in names}
    for order in plan:
        for name in (names[place] for place in order):
            if short[name]:
                timer(calls[name])
            seen[name].append(timer(calls[name]))
    memory = {}
    if row.memory or timer.memory_always:
        memory = {n: timer.memory(c) for n, c in calls.items() if n not in ("floor", SLOTS[1])}
    slots = [seen.pop(name) for name in SLOTS]
    halves = [statistics.median(values) for values in slots]
    seen["ours"] = sum(slots, [])
    return {
        "case": row.case,
        "size": row.size,
        "N": row.N,
        "seconds": {name: statistics.median(values) for name, values in seen.items()},
        "first": first,
        "memory": memory,
        "noise": max(halves) / min(halves),
        "refused": refused,
        "repeats": len(plan),
        "density": row.density,
        "grows": row.grows,
        "bars": row.bars,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment(device),
    }
