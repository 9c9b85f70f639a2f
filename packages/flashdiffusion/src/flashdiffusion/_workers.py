"""Work for several threads: whole tiles, or columns of tall matrices, dealt in turn.

On a CPU the items are dealt to as many Python threads as torch would use, each running its small
products on one thread: a barrier per item would cost more than the item. The deal is fixed, so two
runs with the same number of threads give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from shared_kernels.threads import one_torch_thread

# What torch had before `algebra_on_one_thread`, within it.
_workers: ContextVar[int | None] = ContextVar("workers", default=None)


@contextmanager
def algebra_on_one_thread() -> Iterator[None]:
    """Sweeps on as many threads as torch has, all that is smaller on one.

    Operators on tall or small matrices gain little from several threads, and where other programs
    want the cores too, every one of them waits for the slowest thread.
    """
    with one_torch_thread() as before:
        token = _workers.set(_workers.get() or before)
        try:
            yield
        finally:
            _workers.reset(token)


def n_workers(on: torch.device) -> int:
    if on.type != "cpu":
        return 1
    chosen = _workers.get()
    if chosen is None:
        # what torch has where no other section holds it at one
        with one_torch_thread() as chosen:
            pass
    return chosen


def deal(work: Callable[[Sequence[Any]], Any], items: list[Any], device: torch.device) -> list[Any]:
    """Run work(items[t::T]) on T workers; results in worker order."""
    T = max(1, min(n_workers(device), len(items)))
    if T == 1:
        return [work(items)]

    def start() -> None:
        torch.set_num_threads(1)

    with (
        one_torch_thread(),
        ThreadPoolExecutor(T, initializer=start) as pool,
    ):
        parts = [items[t::T] for t in range(T)]
        try:
            found = pool.map(work, parts)
        except RuntimeError:  # a process that is about to end starts no thread
            found = map(work, parts)
        return list(found)


def _column_ranges(x: Tensor) -> list[slice]:
    """One range of columns for each worker."""
    N = x.shape[1]
    width = max(1, -(-N // n_workers(x.device)))
    return [slice(start, start + width) for start in range(0, max(N, 1), width)]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for few long rows, (m, N), (n, N) -> (m, n)."""

    @torch.no_grad()
    def work(mine: Sequence[slice]) -> Tensor:
        return add_up([a[:, part] @ b[:, part].T for part in mine])

    return add_up(deal(work, _column_ranges(a), a.device))


def subtract_rows(out: Tensor, h: Tensor, basis: Tensor) -> None:
    """out -= h^T basis, in place, for (n, N), (m, n), (m, N)."""

    @torch.no_grad()
    def work(mine: Sequence[slice]) -> None:
        for part in mine:
            out[:, part].addmm_(h.T, basis[:, part], alpha=-1.0)

    deal(work, _column_ranges(out), out.device)


def add_up(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out
