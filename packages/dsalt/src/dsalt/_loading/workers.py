"""What runs where the data is read: in a worker, or in this process."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .._memory import Memory
from .kinds import set_epoch
from .randomness import Numbers, mixed, seed_everything


class Ticket(NamedTuple):
    """What a batch needs besides its indices to be the same, whichever process reads it."""

    epoch: int
    seed: int
    state: dict[str, Any] | None  # what the dataset remembered before this batch
    earlier: bool  # whether that was in an earlier epoch


class TrackedMap(Dataset[Any]):
    """Reads one batch of a map-style dataset per index; gives (batch, what the dataset remembers).

    Each batch draws its global random numbers from a seed of its own: they depend neither on the
    number of workers, nor on whether these persist, nor on which batches were read before.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset, self.collate = loader.dataset, loader.collate_fn
        self.init, self.batched = loader.worker_init_fn, loader.batch_sampler is not None
        self.memory = Memory({"dataset": self.dataset, "collate_fn": self.collate})
        self.epoch = -1

    def start(self, worker_id: int) -> None:
        """What a worker does first: the user's ``worker_init_fn`` sees the user's own dataset."""
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        if self.init is not None:
            self.init(worker_id)
        self.memory.mark()

    def __getitem__(self, key: tuple[Ticket, Any]) -> tuple[Any, bytes | None]:
        ticket, index = key
        here = get_worker_info() is None
        if ticket.state is not None and ticket.earlier:
            self.memory.load(ticket.state)
        if ticket.epoch != self.epoch:
            self.epoch = ticket.epoch
            if not here:
                set_epoch(self.dataset, self.epoch)
        if ticket.state is not None and not ticket.earlier:
            # after set_epoch, which begins the dataset's own state anew
            self.memory.load(ticket.state)
        before = Numbers.now() if here else None  # a worker draws nothing else
        seed_everything(ticket.seed)
        try:
            whole: Any = getattr(self.dataset, "__getitems__", None)
            if not self.batched:
                data = self.dataset[index]
            elif whole:
                data = whole(index)
            else:
                data = [self.dataset[i] for i in index]
            batch = self.collate(data)
        finally:
            if before is not None:
                before.use()
        state = self.memory.state()
        return batch, pickle.dumps(state) if state else None


class TrackedIterable(IterableDataset[Any]):
    """An iterable dataset in workers that begins each epoch from a seed of its own."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset, self.collate_fn = loader.dataset, loader.collate_fn
        self.init = loader.worker_init_fn
        self.memory = Memory({"dataset": self.dataset, "collate_fn": self.collate_fn})
        self.epoch, self.seed = 0, 0

    def start(self, worker_id: int) -> None:
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        if self.init is not None:
            self.init(worker_id)
        self.memory.mark()
        self.expected, self.changed = self._seen(), False

    def _seen(self) -> bytes:
        return pickle.dumps(self.memory.state())

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        self.changed |= self._seen() != self.expected
        seed_everything(mixed(self.seed, self.epoch, worker.id))
        set_epoch(self.dataset, self.epoch)
        self.epoch += 1
        self.expected = self._seen()
        return iter(self.dataset)

    def collate(self, data: Any) -> tuple[Any, bool]:
        """(batch, whether reading has changed the dataset beyond what set_epoch does)."""
        self.changed |= self._seen() != self.expected
        return self.collate_fn(data), self.changed


def alike(loader: DataLoader[Any], **options: Any) -> DataLoader[Any]:
    """A loader with the same workers; its own generator, so that nothing else is drawn from."""
    return DataLoader(
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **options,
    )
