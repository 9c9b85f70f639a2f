"""Ways to find a place in a loader again, but for those that draw indices."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from shared_kernels import checks

from .._distributed import World
from .._memory import Memory, keeps_state
from .kinds import is_blind, is_pipe, set_epoch
from .workers import TrackedIterable, alike

END = object()


def stepwise(items: Iterator[Any]) -> Iterator[Any]:
    """The items of an iterator without calling iter() on it: some iterators then begin anew."""
    while (item := next(items, END)) is not END:
        yield item


class Source:
    """One way of finding a place in a loader again."""

    def __init__(self, loader: Any, world: World) -> None:
        self.loader, self.world = loader, world
        self.seen = 0  # samples of all ranks in this epoch, or items where samples are unknown
        self.batches = 0  # batches that this rank took in this epoch
        self.memory = Memory({})
        self.reader: Any = loader  # what is iterated
        self.is_loader = isinstance(loader, DataLoader)

    def begin(self, epoch: int, seed: int) -> Iterator[Any]:
        """An epoch from its first batch."""
        raise NotImplementedError

    def accept(self, state: dict[str, Any]) -> None:
        """Raise if this loader cannot go on from that state."""

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        """The rest of an epoch."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """End workers that live on; those of one epoch end with its iterator."""
        if self.is_loader:
            self.reader._iterator = None

    def dealt(self, items: Iterator[Any], each: int = 1) -> Iterator[Any]:
        """This rank's items of a loader that every rank reads whole; a last group that does not
        reach all ranks is left out."""
        while len(group := list(islice(items, self.world.size))) == self.world.size:
            self.seen += each * len(group)
            self.batches += 1
            yield group[self.world.rank]


class Replayed(Source):
    """Any other loader that can be iterated anew: what was seen is read again."""

    def __init__(self, loader: Any, world: World) -> None:
        super().__init__(loader, world)
        self.tracked: TrackedIterable | None = None
        self.changed = False  # whether reading has changed the dataset inside the workers
        plain = type(loader) is DataLoader or (
            isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        )
        parts = {"loader": loader}
        if keeps_state(loader):  # the state of its parts is taken in place of its own
            parts = {name: getattr(loader, name) for name in ("dataset", "generator", "collate_fn")}
        self.memory = Memory(parts, most=10**5)
        if plain and loader.num_workers and not is_pipe(loader.dataset):
            self.tracked = TrackedIterable(loader)
            self.reader = alike(
                loader,
                dataset=self.tracked,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                collate_fn=self.tracked.collate,
                worker_init_fn=self.tracked.start,
            )

    def _samples_per_item(self) -> int:
        """Samples of one item, or 1 where that is not known."""
        return getattr(self.loader, "batch_size", None) or 1

    def _workers(self) -> tuple[int, bool]:
        if isinstance(self.loader, DataLoader):
            return self.loader.num_workers, self.loader.persistent_workers
        return 0, False

    def begin(self, epoch: int, seed: int) -> Iterator[Any]:
        return self.dealt(self._items(epoch, seed), self._samples_per_item())

    def _items(self, epoch: int, seed: int) -> Iterator[Any]:
        set_epoch(self.loader, epoch)
        if self.tracked is None:
            return stepwise(iter(self.reader))
        workers, persistent = self._workers()
        if not persistent or self.reader._iterator is None:  # type: ignore[attr-defined]
            # workers read these as they start; persistent workers count the epochs themselves
            self.tracked.epoch, self.tracked.seed = epoch, seed
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self.loader.generator)
        return self._untagged(iter(self.reader))

    def _untagged(self, items: Iterator[Any]) -> Iterator[Any]:
        for batch, changed in items:
            self.changed |= changed
            yield batch

    def accept(self, state: dict[str, Any]) -> None:
        saved, seen, each = state["source"], state["seen"], self._samples_per_item()
        workers, persistent = self._workers()
        before = saved.get("workers", workers)
        if workers != before and max(workers, before) > 1 and seen:
            raise ValueError(
                f"cannot resume exactly: {before} workers read an iterable dataset in turns, and "
                f"now num_workers is {workers}; keep it"
            )
        if each != saved.get("each", each) and (seen % each or workers > 1):
            raise ValueError(
                f"cannot resume exactly: {seen} samples of an iterable dataset were used in "
                f"batches of {saved['each']}, and batches of {each} do not end there; "
                "keep batch_size"
            )
        opaque = isinstance(self.loader, DataLoader) and self.tracked is None
        if persistent and state["epoch"] and (saved.get("changed") or opaque):
            raise ValueError(
                "cannot resume exactly: the dataset has a state of its own in persistent workers, "
                "which cannot be read from outside; use torchdata's StatefulDataLoader, or "
                "persistent_workers=False"
            )

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        seen, each = state["seen"], self._samples_per_item()
        items = self._items(epoch, seed)
        self.seen, self.batches = seen, state["source"].get("batches", 0)
        for done in range(seen // each):
            try:
                next(items)
            except StopIteration:
                raise ValueError(
                    f"`train_loader` must be the one of the checkpoint, of which {seen // each} "
                    f"batches were used: it ended after {done}"
                ) from None
        return self.dealt(items, each)

    def state(self) -> dict[str, Any]:
        workers, _ = self._workers()
        facts = {"workers": workers, "each": self._samples_per_item(), "batches": self.batches}
        return {**facts, "changed": self.changed}


class Once(Replayed):
    """An iterator: one epoch, read again from its beginning by a later run."""

    def __init__(self, loader: Any, world: World) -> None:
        super().__init__(loader, world)
        self.memory = Memory({})  # a new iterator has no state to put back

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        generator = inspect.isgenerator(self.loader)
        if generator and inspect.getgeneratorstate(self.loader) != inspect.GEN_CREATED:
            raise ValueError(
                "cannot resume exactly: `train_loader` is a generator that has been used already; "
                "give a new one"
            )
        return super().resume(epoch, seed, state)

    def ended(self) -> None:
        if self.seen:
            checks.fail(
                "train_loader",
                "yield at least one batch per step",
                f"an iterator that ended after {self.batches}",
                "an iterator cannot begin anew: give a loader, or one without end",
            )
        checks.fail("train_loader", "yield at least one batch", "none")


class Stateful(Source):
    """A loader, or an iterable dataset in this process, with state_dict and load_state_dict."""

    def __init__(self, loader: Any, world: World) -> None:
        super().__init__(loader, world)
        self.keeper = loader if keeps_state(loader) else loader.dataset
        self.split = not isinstance(getattr(loader, "sampler", None), DistributedSampler)
        self.begun = False
        # torchdata leaves out a draw of the loader's generator when it goes on in this process
        plain = isinstance(loader, DataLoader) and not loader.num_workers
        self.generators = Memory({"loader": loader}) if plain else Memory({})

    def begin(self, epoch: int, seed: int) -> Iterator[Any]:
        if self.world.size > 1 and self.split and not self.begun:
            # every rank reads the same batches: those that rank 0 would read
            self.keeper.load_state_dict(self.world.broadcast(self.keeper.state_dict()))
        self.begun = True
        set_epoch(self.loader, epoch)
        return self._shared_out(stepwise(iter(self.loader)))

    def _shared_out(self, items: Iterator[Any]) -> Iterator[Any]:
        if self.split:
            yield from self.dealt(items)
        else:
            for item in items:
                self.seen, self.batches = self.seen + 1, self.batches + 1
                yield item

    def accept(self, state: dict[str, Any]) -> None:
        blind = isinstance(self.loader, DataLoader) and is_blind(self.loader)
        lasting = blind and self.loader.num_workers and self.loader.persistent_workers
        if lasting and state["epoch"] and not _has_iterators(state["source"]["loader"]):
            raise ValueError(
                "cannot resume exactly: the iterable dataset lives on in persistent workers, and "
                "its place cannot be read from outside; give it state_dict and load_state_dict, or "
                "persistent_workers=False"
            )

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        saved = state["source"]
        if not self.split and saved["ranks"] != self.world.size:
            raise ValueError(
                f"cannot resume exactly: each of {saved['ranks']} ranks had a loader with a state "
                f"of its own, and now there are {self.world.size} ranks; keep their number"
            )
        self.begun = True
        set_epoch(self.loader, epoch)
        self.keeper.load_state_dict(saved["loader"])
        self.seen = state["seen"]
        items = iter(self.loader)
        self.generators.load(saved["generators"])
        return self._shared_out(stepwise(items))

    def state(self) -> dict[str, Any]:
        return {
            "ranks": self.world.size,
            "loader": self.keeper.state_dict(),
            "generators": self.generators.state(generators_only=True),
        }


def _has_iterators(state: Any) -> bool:
    """Whether the iterators of the dataset gave torchdata their places."""
    if not isinstance(state, dict):
        return False
    return state.get("dataset_iter_state") is not None or any(map(_has_iterators, state.values()))
