"""How much memory a call takes on CPU, counted by the allocator, not by the operating system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes: the most held at once beyond the start, and the largest single buffer."""

    peak: int
    largest: int


def measure_memory(fn: Callable[[], Any]) -> Memory:
    """Run ``fn`` and count its CPU allocations (also those inside ops and autograd)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return Memory(peak, largest)
