"""Several processes of one group on this machine: what a function gives on each of them."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from .tolerances import tolerance

# What ranks may differ by from one process: sums in another order.
BOUNDS = {
    torch.float64: tolerance(torch.float64) / 10,
    torch.float32: tolerance(torch.float32) / 2,
}
needs_ranks = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]


def on_ranks(
    size: int, work: Callable[..., Any], *args: Any, timeout: float = 240.0, patience: float = 60.0
) -> list[Any]:
    """What work(rank, *args) returns on each rank of a gloo group of forked processes.

    Args:
        size: how many processes.
        work: returns what `torch.load` reads without running code: tensors, numbers, containers.
        timeout: seconds that a process may take.
        patience: seconds that a rank waits for another one, the timeout of the group.

    Raises:
        RuntimeError: a process failed, or took longer; all are ended then.
    """
    with tempfile.TemporaryDirectory() as folder:

        def run(rank: int) -> None:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=patience),
            )
            torch.save(work(rank, *args), f"{folder}/{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()

        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        if any(code != 0 for code in codes):
            raise RuntimeError(f"exit codes of the ranks: {codes} (None: killed after {timeout} s)")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def refused(calls: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """The words with which each call is refused; "not refused" where it runs."""
    words = {}
    for name, call in calls.items():
        try:
            call()
            words[name] = "not refused"
        except (ValueError, TypeError, RuntimeError) as error:  # NotImplementedError is the last
            words[name] = str(error)
    return words
