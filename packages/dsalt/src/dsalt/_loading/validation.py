"""Loaders to validate on: read many times, each time the same batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from shared_kernels import checks

from .._distributed import World
from .._memory import Memory, is_bare_iterator, keeps_state
from .randomness import Numbers
from .ranks import RankSampler, shard_loader


def _has_one(loader: Any, world: World) -> bool:
    found = False
    for _ in validation_batches(loader, world, 1):
        found = True
    return found


def check_validation(loader: Any, world: World) -> None:
    """A validation loader is read many times, and has something to read."""
    if loader is None:
        return
    if is_bare_iterator(loader):
        checks.fail(
            "val_loader",
            "be iterable many times",
            f"an iterator ({type(loader).__name__})",
            "the second validation would find nothing; give a list or a DataLoader",
            TypeError,
        )
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        # its length, if it has one, is a promise: a first batch is looked for
        empty = not keeps_state(loader) and not _has_one(loader, world)
    else:
        empty = hasattr(loader, "__len__") and len(loader) == 0
    if empty:
        checks.fail("val_loader", "yield at least one batch", "none")


def validation_batches(loader: Any, world: World, limit: int | None) -> Iterator[tuple[Any, int]]:
    """(item, rows at its end that do not count) on this rank; every rank yields equally often.

    A sample that was repeated to make the ranks' shares equal is not counted twice. Every generator
    that the loader draws from is put back afterwards: all validations see the same batches.
    """
    memory, numbers = Memory({"loader": loader}), Numbers.now()
    before = memory.state(generators_only=True)
    own, dealt = shard_loader(loader, world)
    if isinstance(own, DataLoader) and own.persistent_workers and own._iterator is not None:
        # workers that live on are not seeded again: drawn here, as the first time
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=own.generator)
    try:
        yield from _rounds(own, dealt, world, limit)
    finally:
        memory.load(before)
        numbers.use()


def _rounds(own: Any, dealt: bool, world: World, limit: int | None) -> Iterator[tuple[Any, int]]:
    if not dealt:
        sampler = getattr(own, "sampler", None)
        last = len(own) - 1 if isinstance(sampler, RankSampler) and sampler.padded else -1
        for i, item in enumerate(own):
            if limit is not None and i >= limit:
                return
            yield item, int(i == last)
        return
    group: list[Any] = []
    for i, item in enumerate(own):
        if limit is not None and i >= limit * world.size:
            break
        group.append(item)
        if len(group) == world.size:
            yield group[world.rank], 0
            group = []
    if group:
        counts = world.rank < len(group)
        yield (group[world.rank], 0) if counts else (group[0], sys.maxsize)
