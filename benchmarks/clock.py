"""What times one call: process CPU time, or a GPU's events behind an emptied L2 cache."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from shared_kernels.testing import measure_memory

FLUSH = 256 << 20  # bytes; more than the L2 cache of any GPU
# glibc returns outputs of a few MB to the system at each free, and the page faults of the next
# call would be timed. It reads these variables when a process starts.
MALLOC = {
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}


def keep_freed_memory(module: str) -> None:
    """Start this program again, as `python -m module`, with MALLOC set, unless it is already."""
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in MALLOC.items()):
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})


def without_library(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with the native library of shared-kernels switched off."""

    def run() -> Any:
        os.environ["SHARED_KERNELS_NATIVE"] = "0"
        try:
            return call()
        finally:
            del os.environ["SHARED_KERNELS_NATIVE"]

    return run


class CpuClock:
    """Process CPU time: what other programs do is not counted."""

    memory_always = False  # counting allocations takes longer than most calls

    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    def first(self, call: Callable[[], Any]) -> float:
        """Wall seconds, compilation and imports included."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def memory(self, call: Callable[[], Any]) -> int:
        """The most bytes that torch held at once, beyond what it held before."""
        return measure_memory(call).peak


class GpuClock:
    """Event times. Every timing begins with the same cache: that of a large tensor of zeros."""

    memory_always = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) / 1e3

    def first(self, call: Callable[[], Any]) -> float:
        """Wall seconds until the GPU has finished, compilation included."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def memory(self, call: Callable[[], Any]) -> int:
        """The most bytes that torch held at once, beyond what it held before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def clock(device: torch.device) -> CpuClock | GpuClock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()
