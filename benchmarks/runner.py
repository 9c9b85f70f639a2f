"""Time a row: ours, ours again, the floor and the peers, interleaved in one process.

CPU: one thread, process CPU time, medians; a call under 5 ms runs once untimed before each timing,
so that no contender pays for the cache and the heap that the one before it left behind.
GPU: event times with the L2 cache flushed in between.
``ours`` is timed twice; the ratio of the two is the noise of the row.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from . import gate
from .registry import Row

LONG, SHORT_SECONDS = 5, 0.005  # repeats of a slow call; a call below this is repeated 21 times
MANY = 21


def _cpu_time(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _gpu_time(call: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, for each row."""
    described = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
    else:
        described["device"] = f"cpu ({platform.machine()}), one thread"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    described["commit"] = commit.stdout.strip() or "unknown"
    return described


def measure(row: Row, device: torch.device) -> dict[str, Any]:
    """Median seconds of each contender, and what cannot run and why."""
    gate.check(row)
    calls: dict[str, Callable[[], Any]] = {"ours": row.ours, "ours again": row.ours}
    if row.floor is not None:
        calls["floor"] = row.floor
    refused: dict[str, str] = {}
    for name, call in row.peers.items():
        if isinstance(call, str):
            refused[name] = call
            continue
        try:
            call()
            calls[name] = call
        except Exception as error:  # a peer's own failure is a result
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if device.type == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        timed = {n: (lambda c=c: _gpu_time(c, flush)) for n, c in calls.items()}
    else:
        timed = {n: (lambda c=c: _cpu_time(c)) for n, c in calls.items()}
    first = {name: call() for name, call in timed.items()}
    repeats = MANY if first["ours"] < SHORT_SECONDS else LONG
    seen: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, call in timed.items():
            if repeats == MANY:
                call()
            seen[name].append(call())
    medians = {name: statistics.median(values) for name, values in seen.items()}
    return {
        "case": row.case,
        "size": row.size,
        "seconds": medians,
        "refused": refused,
        "repeats": repeats,
        "density": row.density,
        "bars": row.bars,
        **environment(device),
    }
