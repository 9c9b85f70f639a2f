"""Loaders that are shared out over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler

from .._distributed import World
from .._memory import Memory
from .kinds import is_divisible
from .randomness import Numbers
from .workers import alike

LONG = 10**7  # a sampler's order may be that long


class RankSampler(DistributedSampler[Any]):
    """Rank r takes samples r, r + world, … of the order that one process would have had.

    The order is drawn from rank 0's random numbers, so that the ranks' batches together are the
    batches of one process with the joint batch size. Padded to equal lengths by repeating from the
    start, or cut with ``drop_last``. ``skip`` samples of the joint order are passed over.
    """

    def __init__(
        self, base: Any, dataset: Any, world: World, drop_last: bool = False, skip: int = 0
    ) -> None:
        super().__init__(dataset, world.size, world.rank, shuffle=False, drop_last=drop_last)
        self.base, self.world, self.skip = base, world, skip
        total = max(0, len(base) - skip)
        if drop_last:
            self.num_samples = total // world.size
        else:
            self.num_samples = -(-total // world.size)
        self.total_size = self.num_samples * world.size
        # this rank repeats a sample at its end
        self.padded = self.total_size > total and world.rank >= world.size - self.total_size + total

    def __iter__(self) -> Iterator[int]:
        own = Numbers.now()
        memory = Memory({"sampler": self.base}, most=LONG)
        common, state = self.world.broadcast((own, memory.state()))
        common.use()
        memory.load(state)
        order = list(self.base)
        if not self.world.is_main:
            own.use()
        rest = order[self.skip :]
        if rest and len(rest) < self.total_size:
            rest += (order * -(-self.total_size // len(order)))[: self.total_size - len(rest)]
        return iter(rest[self.world.rank : self.total_size : self.world.size])


def shard_loader(loader: Any, world: World) -> tuple[Any, bool]:
    """(the validation loader of this rank, whether batches must still be dealt out in turn)."""
    if world.size == 1 and world.context == 1:
        return loader, False
    if not is_divisible(loader):
        return loader, True
    if isinstance(loader.sampler, DistributedSampler):
        return loader, False
    sampler = RankSampler(loader.sampler, loader.dataset, world)
    return alike(
        loader,
        dataset=loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
    ), False
