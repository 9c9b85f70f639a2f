"""The way to find a place in a map-style loader again: its indices are drawn and passed over."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from .._distributed import World
from .._memory import Memory
from .kinds import is_divisible, set_epoch
from .randomness import mixed
from .ranks import LONG, RankSampler
from .sources import Source, stepwise
from .workers import Ticket, TrackedMap, alike


class Indexed(Source):
    """A map-style DataLoader: indices are drawn here, and read by workers of a loader of ours."""

    def __init__(self, loader: DataLoader[Any], world: World) -> None:
        super().__init__(loader, world)
        self.divisible = is_divisible(loader)
        self.local = world.size > 1 and isinstance(loader.sampler, DistributedSampler)
        parts = {"generator": loader.generator, "sampler": loader.sampler}
        if not self.divisible:
            parts["batch_sampler"] = loader.batch_sampler
        self.memory = Memory(parts, [loader.dataset], LONG)
        self.tracked = TrackedMap(loader)
        # whether the dataset and the order draw from one generator
        self.entangled = bool(self.memory.generators() & self.tracked.memory.generators())
        self.workers = max(1, loader.num_workers)
        # what the dataset remembered after the last batch of each worker, and what to put back
        self.states: dict[int, bytes] = {}
        self.carried: dict[int, tuple[int, dict[str, Any]]] = {}  # with the epoch it is of
        self.turned = False  # whether worker w goes on where another worker was
        self.queue: Iterator[tuple[Ticket, Any]] = iter(())
        self.reader = alike(
            loader,
            dataset=self.tracked,
            batch_size=None,
            sampler=_Queue(self),
            collate_fn=_unchanged,
            worker_init_fn=self.tracked.start,
        )

    @property
    def lasting(self) -> bool:
        """Whether what the dataset remembers lasts from epoch to epoch where it is read."""
        return self.loader.persistent_workers or not self.loader.num_workers

    def begin(self, epoch: int, seed: int) -> Iterator[Any]:
        if not self.lasting:
            self.states, self.carried = {}, {}
        elif self.turned:
            self.carried = {w: (epoch - 1, found) for w, found in self._plain_states().items()}
        return self._epoch(epoch, seed, self._indices(epoch, 0), 0)

    def accept(self, state: dict[str, Any]) -> None:
        for name, change in self._changes(state["source"]).items():
            if name in ("items of the dataset", "sampler") and state["seen"]:
                raise ValueError(
                    f"cannot resume exactly: {name}: {change}; give the data that the run had, or "
                    f"begin a new run from its weights"
                )

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        own = state["source"]
        self.seen, self.batches = state["seen"], own.get("batches", 0)
        indices = self._indices(epoch, self.seen)
        first = list(islice(indices, 1))
        states = own.get("states", {})
        if self.lasting or (first and self.batches):
            self._can_be_carried(states, self._changes(own))
            self.states = {worker: pickle.dumps(found) for worker, found in states.items()}
            self.turned = self.batches % self.workers != 0
            if self.loader.num_workers:
                # a worker whose turn had not come yet was as the epoch before had left it
                self.carried = {
                    w: (epoch if w < self.batches else epoch - 1, found)
                    for w, found in states.items()
                }
            elif states:
                self.tracked.memory.load(states[0])
        return self._epoch(epoch, seed, chain(first, indices), self.batches)

    def _can_be_carried(self, states: dict[int, dict[str, Any]], changed: dict[str, str]) -> None:
        for found in states.values():
            self.tracked.memory.check(found)
        for name in ("num_workers", "ranks"):
            if name in changed and states:
                owned = ", ".join(sorted({path for found in states.values() for path in found}))
                raise ValueError(
                    f"cannot resume exactly: the dataset has a state of its own where it is read "
                    f"({owned}), and {name} {changed[name]}; keep it, or let the dataset draw from "
                    f"the global generators of torch, numpy or random"
                )

    def _changes(self, own: dict[str, Any]) -> dict[str, str]:
        facts = self._facts()
        return {
            name: f"was {before} and is now {facts[name]}"
            for name, before in own.get("facts", {}).items()
            if before != facts[name]
        }

    def _facts(self) -> dict[str, Any]:
        sized = hasattr(self.loader.dataset, "__len__")
        whole = self.divisible or self.loader.batch_sampler is None
        order = self.loader.sampler if whole else self.loader.batch_sampler
        return {
            "items of the dataset": len(self.loader.dataset) if sized else -1,
            "sampler": type(order).__name__,
            "num_workers": self.loader.num_workers,
            "ranks": self.world.size,
        }

    def _plain_states(self) -> dict[int, dict[str, Any]]:
        return {worker: pickle.loads(state) for worker, state in self.states.items()}

    def state(self) -> dict[str, Any]:
        facts, states = self._facts(), self._plain_states()
        return {"batches": self.batches, "facts": facts, "states": states}

    def _epoch(
        self, epoch: int, seed: int, indices: Iterator[tuple[Any, int]], number: int
    ) -> Iterator[Any]:
        if not self.loader.num_workers:
            self.tracked.epoch = epoch
        sizes: list[int] = []

        def tickets() -> Iterator[tuple[Ticket, Any]]:
            for n, (index, size) in enumerate(indices, number):
                sizes.append(size)
                of, state = self.carried.pop(n % self.workers, (epoch, None))
                draw = mixed(seed, epoch, n, self.world.rank)
                yield Ticket(epoch, draw, state, of != epoch), index

        self.queue = tickets()
        return self._read(iter(self.reader), sizes, number)

    def _read(self, items: Iterator[Any], sizes: list[int], number: int) -> Iterator[Any]:
        for n, (batch, state) in enumerate(items, number):
            self.batches = n + 1
            self.seen += sizes[n - number]
            if state is not None:
                self.states[n % self.workers] = state
            yield batch

    def _indices(self, epoch: int, seen: int) -> Iterator[tuple[Any, int]]:
        """(indices of a batch of this rank, samples of all ranks in it) after ``seen`` samples."""
        loader = self.loader
        set_epoch(loader, epoch)
        if self.divisible:
            found = self._divided(seen)
        else:
            own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            found = self._in_turn(_after(stepwise(iter(own)), seen, self.tracked.batched))
        if not loader.persistent_workers or epoch == 0:
            # what a DataLoader seeds its workers with: drawn here too, so that the order is its own
            torch.empty((), dtype=torch.int64, device="cpu").random_(generator=loader.generator)
        # with a generator in common, the order is drawn before the dataset draws
        finite = self.entangled and hasattr(loader.sampler, "__len__")
        return iter(list(found)) if finite else found

    def _divided(self, seen: int) -> Iterator[tuple[list[int], int]]:
        loader, order, ranks = self.loader, self.loader.sampler, self.world.size
        skip = seen
        if self.local:
            skip, rest = divmod(seen, ranks)
            if rest:
                raise ValueError(
                    f"cannot resume exactly: {seen} samples were used, which {ranks} ranks with a "
                    f"DistributedSampler of their own cannot have shared equally"
                )
        elif ranks > 1:
            order, skip = RankSampler(order, loader.dataset, self.world, loader.drop_last, seen), 0
        samples: Any = islice(stepwise(iter(order)), skip, None)
        for index in BatchSampler(samples, loader.batch_size or 1, loader.drop_last):
            yield index, len(index) * ranks

    def _in_turn(self, batches: Iterator[Any]) -> Iterator[tuple[Any, int]]:
        while len(group := list(islice(batches, self.world.size))) == self.world.size:
            size = sum(map(len, group)) if self.tracked.batched else len(group)
            yield group[self.world.rank], size


class _Queue:
    """The sampler of our own loader: the tickets of the present epoch."""

    def __init__(self, source: Indexed) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return self.source.queue


def _unchanged(x: Any) -> Any:
    return x


def _after(batches: Iterator[Any], seen: int, batched: bool) -> Iterator[Any]:
    """The batches after ``seen`` samples; a batch that was seen in part is cut."""
    for index in batches:
        size = len(index) if batched else 1
        if seen >= size:
            seen -= size
        else:
            yield index[seen:] if batched and seen else index
            seen = 0
