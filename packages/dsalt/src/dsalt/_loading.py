"""Endless iteration over a loader that is resumed exactly, and loaders shared out over ranks."""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    get_worker_info,
)

from shared_kernels import checks

from ._checkpoint import rng_state, set_rng_state
from ._distributed import World
from ._memory import Memory, is_bare_iterator, keeps_state

__all__: list[str] = []

_CPU = torch.device("cpu")
_END = object()
_LONG = 10**7  # a sampler's order may be that long


# --- random numbers ------------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """The states of the global generators of torch on the CPU, python and numpy."""

    torch: torch.Tensor
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> _Numbers:
        numpy = np.random.get_state(legacy=True)
        return cls(torch.get_rng_state(), random.getstate(), numpy)

    def use(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def plain(self) -> dict[str, Any]:
        """As a checkpoint holds them."""
        before = _Numbers.now()
        self.use()
        state = rng_state(_CPU)
        before.use()
        return state

    @classmethod
    def of(cls, plain: dict[str, Any]) -> _Numbers:
        before = cls.now()
        set_rng_state(plain, _CPU)
        found = cls.now()
        before.use()
        return found


def _mixed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _seed(seed: int) -> None:
    """The global generators of the CPU; those of accelerators belong to the model."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _set_epoch(x: Any, epoch: int) -> None:
    """Tell the epoch to an object, and to the samplers and datasets inside it, that want it."""
    todo, seen = [x], set()
    while todo:
        item = todo.pop()
        if item is None or id(item) in seen or isinstance(item, (torch.Tensor, type)):
            continue
        seen.add(id(item))
        told = getattr(item, "set_epoch", None)
        if callable(told):
            told(epoch)
        for name in ("sampler", "batch_sampler", "dataset", "data_source", "base"):
            todo.append(getattr(item, "__dict__", {}).get(name))
        several = getattr(item, "__dict__", {}).get("datasets")
        todo.extend(several if isinstance(several, (list, tuple)) else [])


# --- what runs where the data is read (a worker, or this process) --------------------------------


class _Ticket(NamedTuple):
    """What a batch needs besides its indices to be the same whoever reads it."""

    epoch: int
    seed: int
    state: dict[str, Any] | None  # what the dataset remembered before this batch
    earlier: bool  # that was in an earlier epoch


class _TrackedMap(Dataset):
    """Reads one batch of a map-style dataset per index; gives (batch, what the dataset remembers).

    Each batch draws its global random numbers from a seed of its own: they depend neither on the
    number of workers, nor on whether these persist, nor on which batches were read before.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.dataset, self.collate = loader.dataset, loader.collate_fn
        self.init, self.batched = loader.worker_init_fn, loader.batch_sampler is not None
        self.memory = Memory({"dataset": self.dataset, "collate_fn": self.collate})
        self.epoch = -1

    def start(self, worker_id: int) -> None:
        """A worker's first act: the user's function sees the user's dataset."""
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        if self.init is not None:
            self.init(worker_id)
        self.memory.mark()

    def __getitem__(self, key: tuple[_Ticket, Any]) -> tuple[Any, bytes | None]:
        ticket, index = key
        here = get_worker_info() is None
        if ticket.state is not None and ticket.earlier:
            self.memory.load(ticket.state)
        if ticket.epoch != self.epoch:
            self.epoch = ticket.epoch
            if not here:
                _set_epoch(self.dataset, self.epoch)
        if ticket.state is not None and not ticket.earlier:
            self.memory.load(ticket.state)  # what set_epoch began anew has gone on since
        before = _Numbers.now() if here else None  # a worker has nothing else to draw
        _seed(ticket.seed)
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


class _TrackedIterable(IterableDataset):
    """An iterable dataset in workers that begins each epoch from a seed of its own."""

    def __init__(self, loader: DataLoader) -> None:
        self.dataset, self.collate_fn = loader.dataset, loader.collate_fn
        self.init = loader.worker_init_fn
        self.memory = Memory({"dataset": self.dataset, "collate_fn": self.collate_fn})
        self.epoch, self.seed = 0, 0

    def start(self, worker_id: int) -> None:
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        if self.init is not None:
            self.init(worker_id)
        self.memory.mark()
        self.expected, self.own = self._seen(), False

    def _seen(self) -> bytes:
        return pickle.dumps(self.memory.state())

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        self.own |= self._seen() != self.expected
        _seed(_mixed(self.seed, self.epoch, worker.id))
        _set_epoch(self.dataset, self.epoch)
        self.epoch += 1
        self.expected = self._seen()
        return iter(self.dataset)

    def collate(self, data: Any) -> tuple[Any, bool]:
        """(batch, whether reading has changed the dataset beyond what set_epoch does)."""
        self.own |= self._seen() != self.expected
        return self.collate_fn(data), self.own


def _alike(loader: DataLoader, **options: Any) -> DataLoader:
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


# --- ranks ---------------------------------------------------------------------------------------


class RankSampler(DistributedSampler):
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
        own = _Numbers.now()
        memory = Memory({"sampler": self.base}, most=_LONG)
        common, state = self.world.broadcast((own, memory.state()))
        common.use()
        memory.load(state)
        order = list(self.base)
        if self.world.rank != 0:
            own.use()
        rest = order[self.skip :]
        if rest and len(rest) < self.total_size:
            rest += (order * -(-self.total_size // len(order)))[: self.total_size - len(rest)]
        return iter(rest[self.world.rank : self.total_size : self.world.size])


def _is_divisible(loader: Any) -> bool:
    """A map-style loader whose batches are torch's own: ranks share out its samples."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
    )


def shard_loader(loader: Any, world: World) -> tuple[Any, bool]:
    """(the validation loader of this rank, whether batches must still be dealt out in turn)."""
    if world.size == 1:
        return loader, False
    if not _is_divisible(loader):
        return loader, True
    if isinstance(loader.sampler, DistributedSampler):
        return loader, False
    sampler = RankSampler(loader.sampler, loader.dataset, world)
    return _alike(
        loader,
        dataset=loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
    ), False


# --- streams -------------------------------------------------------------------------------------


class BatchStream:
    """Endless iteration over a loader that can be stopped and continued exactly.

    The loader draws from random numbers of its own, a copy of the global ones at the first batch,
    so that what the model draws in between does not disturb it. How a place is found again:

    - a loader with ``state_dict`` and ``load_state_dict`` (torchdata's StatefulDataLoader) is
      asked for its state;
    - of a map-style DataLoader the sampler's state at the begin of the epoch is kept and the
      indices of what was seen are passed over: nothing is read;
    - anything else begins its epoch from the same state, and what was seen is read again;
    - an iterator that cannot begin anew is one epoch without end.

    Where none of them is exact, ``load_state_dict`` raises and says why.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self.loader, self.world = loader, world
        self.epoch = 0
        self.source: _Source = _source_of(loader, world)
        self._numbers: _Numbers | None = None  # of the data: now
        self._start: dict[str, Any] | None = None  # at the begin of the epoch
        self._iterator: Iterator[Any] | None = None
        self._closed: dict[str, Any] | None = None
        self._seed = 0

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        before = _Numbers.now()
        if self._numbers is None:
            self._numbers, self._seed = self.world.broadcast((before, _seed_after(before)))
        self._numbers.use()
        try:
            yield
        finally:
            self._numbers = _Numbers.now()
            before.use()

    def _begin(self) -> Iterator[Any]:
        if not isinstance(self.source, _Asked):
            self._start = {"rng": _Numbers.now().plain(), "memory": self.source.memory.state()}
        self.source.seen = self.source.batches = 0
        return self.source.begin(self.epoch, self._seed)

    def __next__(self) -> Any:
        if self._closed is not None:
            self.load_state_dict(self._closed)
        with self._own_numbers():
            item = self._next()
            if item is _END:
                if isinstance(self.source, _Once):
                    self.source.ended()
                self.epoch, self._iterator = self.epoch + 1, None
                item = self._next()
        if item is _END:
            hint = "each rank needs one" if self.world.size > 1 else None
            checks.fail("train_loader", "yield at least one batch", "none", hint)
        return item

    def _next(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        return next(self._iterator, _END)

    def close(self) -> None:
        """End the workers; if the stream goes on, it finds its place as after a restart."""
        if self._iterator is not None and isinstance(self.loader, DataLoader):
            self._closed, self._iterator = self.state_dict(), None
            self.source.close()

    def __del__(self) -> None:
        self._iterator = None
        if hasattr(self, "source"):
            self.source.close()

    def state_dict(self) -> dict[str, Any]:
        if self._closed is not None:
            return self._closed
        kind = type(self.source).__name__
        if self._numbers is None:  # nothing was drawn yet
            return {"kind": kind, "epoch": 0, "rng": None}
        state = {
            "kind": kind,
            "epoch": self.epoch,
            "seen": self.source.seen,
            "seed": self._seed,
            "source": self.source.state(),
            "rng": self._numbers.plain(),
            "start": self._start,
        }
        return _readable(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._iterator, self._closed, self.epoch = None, None, state["epoch"]
        state = _of_today(state, self.source)
        if state["rng"] is None:
            return
        if state["kind"] != type(self.source).__name__:
            raise ValueError(
                f"cannot resume exactly: `train_loader` was {_KINDS[state['kind']]} and is now "
                f"{_KINDS[type(self.source).__name__]}; give the loader that the run had"
            )
        self._seed, self._start = state["seed"], state["start"]
        self._numbers = _Numbers.of((self._start or state)["rng"])
        self.source.accept(state)
        with self._own_numbers():
            if self._start is not None:
                self.source.memory.load(self._start["memory"])
            self._iterator = self.source.resume(self.epoch, self._seed, state)
        if self._start is None:
            self._numbers = _Numbers.of(state["rng"])


def _seed_after(numbers: _Numbers) -> int:
    """A seed that follows from the numbers, without drawing it from them."""
    copied = torch.Generator()
    copied.set_state(numbers.torch)
    return int(torch.empty((), dtype=torch.int64).random_(generator=copied))


def _of_today(state: dict[str, Any], source: _Source) -> dict[str, Any]:
    """The state of a checkpoint that version 0.1.0 wrote before it noted more than generators."""
    if "kind" in state:
        return state
    start, kind = state["start"], type(source).__name__
    if start is None:
        return {**state, "kind": kind, "rng": None}
    counted = isinstance(source, _Again) or _is_divisible(source.loader)
    if not counted and state["seen"]:
        raise ValueError(
            "cannot resume exactly: the checkpoint is of an earlier version, which did not count "
            "the samples of this kind of loader; begin a new run from its weights"
        )
    paths = source.memory.state(generators_only=True)
    memory = {
        path: ["torch", bytes(saved.numpy().tobytes())]
        for path, saved in zip(paths, start["generators"], strict=False)
    }
    begun = {"rng": start["rng"], "memory": memory}
    return {**state, "kind": kind, "rng": start["rng"], "start": begun, "seed": 0, "source": {}}


def _stepwise(items: Iterator[Any]) -> Iterator[Any]:
    """An iterator that is stepped only: to some, iter() means that they begin anew."""
    while (item := next(items, _END)) is not _END:
        yield item


class _Source:
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


class _Indexed(_Source):
    """A map-style DataLoader: indices are drawn here, and read by workers of a loader of ours."""

    def __init__(self, loader: DataLoader, world: World) -> None:
        super().__init__(loader, world)
        self.divisible = _is_divisible(loader)
        self.local = world.size > 1 and isinstance(loader.sampler, DistributedSampler)
        parts = {"generator": loader.generator, "sampler": loader.sampler}
        if not self.divisible:
            parts["batch_sampler"] = loader.batch_sampler
        self.memory = Memory(parts, [loader.dataset], _LONG)
        self.tracked = _TrackedMap(loader)
        # the dataset draws from a generator that the order is drawn from too
        self.entangled = bool(self.memory.generators() & self.tracked.memory.generators())
        self.workers = max(1, loader.num_workers)
        # what the dataset remembered after the last batch of each worker, and what to put back
        self.states: dict[int, bytes] = {}
        self.carried: dict[int, tuple[int, dict[str, Any]]] = {}  # with the epoch it is of
        self.turned = False  # worker w goes on where another one was
        self.queue: Iterator[tuple[_Ticket, Any]] = iter(())
        self.reader = _alike(
            loader,
            dataset=self.tracked,
            batch_size=None,
            sampler=_Queue(self),
            collate_fn=_unchanged,
            worker_init_fn=self.tracked.start,
        )

    # a worker that lives on keeps what its dataset remembers; this process does so too
    @property
    def lasting(self) -> bool:
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

        def tickets() -> Iterator[tuple[_Ticket, Any]]:
            for n, (index, size) in enumerate(indices, number):
                sizes.append(size)
                of, state = self.carried.pop(n % self.workers, (epoch, None))
                draw = _mixed(seed, epoch, n, self.world.rank)
                yield _Ticket(epoch, draw, state, of != epoch), index

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
        _set_epoch(loader, epoch)
        if self.divisible:
            found = self._divided(seen)
        else:
            own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            found = self._in_turn(_after(_stepwise(iter(own)), seen, self.tracked.batched))
        if not loader.persistent_workers or epoch == 0:
            # what a DataLoader seeds its workers with: drawn here too, so that the order is its own
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
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
        samples: Any = islice(_stepwise(iter(order)), skip, None)
        for index in BatchSampler(samples, loader.batch_size or 1, loader.drop_last):
            yield index, len(index) * ranks

    def _in_turn(self, batches: Iterator[Any]) -> Iterator[tuple[Any, int]]:
        while len(group := list(islice(batches, self.world.size))) == self.world.size:
            size = sum(map(len, group)) if self.tracked.batched else len(group)
            yield group[self.world.rank], size


class _Queue:
    """The sampler of the loader of ours: the tickets of the present epoch."""

    def __init__(self, source: _Indexed) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return self.source.queue


def _unchanged(x: Any) -> Any:
    return x


def _after(batches: Iterator[Any], seen: int, batched: bool) -> Iterator[Any]:
    """What follows after that many samples; a batch that was seen in part is cut."""
    for index in batches:
        size = len(index) if batched else 1
        if seen >= size:
            seen -= size
        else:
            yield index[seen:] if batched and seen else index
            seen = 0


class _Again(_Source):
    """Anything else that can be iterated anew: what was seen is read again."""

    def __init__(self, loader: Any, world: World) -> None:
        super().__init__(loader, world)
        self.tracked: _TrackedIterable | None = None
        self.own = False  # the dataset has changed inside the workers
        plain = type(loader) is DataLoader or (
            isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        )
        parts = {"loader": loader}
        if keeps_state(loader):  # its state is not asked for: the parts' own are
            parts = {name: getattr(loader, name) for name in ("dataset", "generator", "collate_fn")}
        self.memory = Memory(parts, most=10**5)
        if plain and loader.num_workers and not _is_pipe(loader.dataset):
            self.tracked = _TrackedIterable(loader)
            self.reader = _alike(
                loader,
                dataset=self.tracked,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                collate_fn=self.tracked.collate,
                worker_init_fn=self.tracked.start,
            )

    def _each(self) -> int:
        """Samples of one item, or 1 where that is not known."""
        return getattr(self.loader, "batch_size", None) or 1

    def _workers(self) -> tuple[int, bool]:
        if isinstance(self.loader, DataLoader):
            return self.loader.num_workers, self.loader.persistent_workers
        return 0, False

    def begin(self, epoch: int, seed: int) -> Iterator[Any]:
        return self.dealt(self._items(epoch, seed), self._each())

    def _items(self, epoch: int, seed: int) -> Iterator[Any]:
        _set_epoch(self.loader, epoch)
        if self.tracked is None:
            return _stepwise(iter(self.reader))
        workers, persistent = self._workers()
        if not persistent or self.reader._iterator is None:  # type: ignore[attr-defined]
            # read by the workers as they start; persistent ones count on by themselves
            self.tracked.epoch, self.tracked.seed = epoch, seed
        torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
        return self._untagged(iter(self.reader))

    def _untagged(self, items: Iterator[Any]) -> Iterator[Any]:
        for batch, changed in items:
            self.own |= changed
            yield batch

    def accept(self, state: dict[str, Any]) -> None:
        own, seen, each = state["source"], state["seen"], self._each()
        workers, persistent = self._workers()
        before = own.get("workers", workers)
        if workers != before and max(workers, before) > 1 and seen:
            raise ValueError(
                f"cannot resume exactly: {before} workers read an iterable dataset in turns, and "
                f"now num_workers is {workers}; keep it"
            )
        if each != own.get("each", each) and (seen % each or workers > 1):
            raise ValueError(
                f"cannot resume exactly: {seen} samples of an iterable dataset were used in "
                f"batches of {own['each']}, and batches of {each} do not end there; keep batch_size"
            )
        opaque = isinstance(self.loader, DataLoader) and self.tracked is None
        if persistent and state["epoch"] and (own.get("changed") or opaque):
            raise ValueError(
                "cannot resume exactly: the dataset has a state of its own in persistent workers, "
                "which cannot be read from outside; use torchdata's StatefulDataLoader, or "
                "persistent_workers=False"
            )

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        seen, each = state["seen"], self._each()
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
        facts = {"workers": workers, "each": self._each(), "batches": self.batches}
        return {**facts, "changed": self.own}


class _Once(_Again):
    """An iterator: one epoch, read again from its beginning by a later run."""

    def __init__(self, loader: Any, world: World) -> None:
        super().__init__(loader, world)
        self.memory = Memory({})  # a new iterator has nothing to be put back

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
                "train_loader", "yield at least one batch per step",
                f"an iterator that ended after {self.batches}",
                "an iterator cannot begin anew: give a loader, or one without end",
            )  # fmt: skip
        checks.fail("train_loader", "yield at least one batch", "none")


class _Asked(_Source):
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
            # every rank reads the same batches: they must be rank 0's
            self.keeper.load_state_dict(self.world.broadcast(self.keeper.state_dict()))
        self.begun = True
        _set_epoch(self.loader, epoch)
        return self._shared_out(_stepwise(iter(self.loader)))

    def _shared_out(self, items: Iterator[Any]) -> Iterator[Any]:
        if self.split:
            yield from self.dealt(items)
        else:
            for item in items:
                self.seen, self.batches = self.seen + 1, self.batches + 1
                yield item

    def accept(self, state: dict[str, Any]) -> None:
        blind = isinstance(self.loader, DataLoader) and _is_blind(self.loader)
        lasting = blind and self.loader.num_workers and self.loader.persistent_workers
        if lasting and state["epoch"] and not _has_iterators(state["source"]["loader"]):
            raise ValueError(
                "cannot resume exactly: the iterable dataset lives on in persistent workers, and "
                "its place cannot be read from outside; give it state_dict and load_state_dict, or "
                "persistent_workers=False"
            )

    def resume(self, epoch: int, seed: int, state: dict[str, Any]) -> Iterator[Any]:
        own = state["source"]
        if not self.split and own["ranks"] != self.world.size:
            raise ValueError(
                f"cannot resume exactly: each of {own['ranks']} ranks had a loader with a state of "
                f"its own, and now there are {self.world.size} ranks; keep their number"
            )
        self.begun = True
        _set_epoch(self.loader, epoch)
        self.keeper.load_state_dict(own["loader"])
        self.seen = state["seen"]
        items = iter(self.loader)
        self.generators.load(own["generators"])
        return self._shared_out(_stepwise(items))

    def state(self) -> dict[str, Any]:
        return {
            "ranks": self.world.size,
            "loader": self.keeper.state_dict(),
            "generators": self.generators.state(generators_only=True),
        }


def _readable(state: Any) -> Any:
    """A loader's state, if a checkpoint can hold it; else an error that names the matter."""
    box = io.BytesIO()
    try:
        torch.save(state, box)
        box.seek(0)
        torch.load(box, weights_only=True)
    except (pickle.PickleError, RuntimeError, AttributeError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"the state_dict of `train_loader` must hold numbers, texts, tensors, lists and dicts "
            f"only, so that a checkpoint can be read without running code: {why}"
        ) from error
    return state


_KINDS = {
    "_Asked": "one with state_dict",
    "_Indexed": "a map-style DataLoader",
    "_Again": "an iterable",
    "_Once": "an iterator",
}


def _is_pipe(dataset: Any) -> bool:
    """torch's data pipes, which a DataLoader treats apart."""
    return type(dataset).__module__.startswith("torch.utils.data.datapipes") or any(
        cls.__name__ in ("IterDataPipe", "MapDataPipe") for cls in type(dataset).__mro__
    )


def _source_of(loader: Any, world: World) -> _Source:
    if isinstance(loader, DataLoader):
        iterable = isinstance(loader.dataset, IterableDataset)
        blind = _is_blind(loader)
        if blind and iterable and not loader.num_workers:
            return _Again(loader, world)
        if keeps_state(loader) and (iterable or (not blind and _sampler_is_known(loader))):
            return _Asked(loader, world)
        if iterable and not loader.num_workers and keeps_state(loader.dataset):
            return _Asked(loader, world)
        if (
            not iterable
            and not _is_pipe(loader.dataset)
            and (type(loader).__iter__ is DataLoader.__iter__ or keeps_state(loader))
        ):
            return _Indexed(loader, world)
        return _Again(loader, world)
    if keeps_state(loader):
        return _Asked(loader, world)
    if is_bare_iterator(loader):
        return _Once(loader, world)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        checks.fail("train_loader", "be iterable", type(loader).__name__, error=TypeError)
    return _Again(loader, world)


def _is_blind(loader: DataLoader) -> bool:
    """torchdata's loader of a dataset without state_dict, whose generators it does not see."""
    return type(loader).__module__.startswith("torchdata.") and not keeps_state(loader.dataset)


def _has_iterators(state: Any) -> bool:
    """Whether the iterators of the dataset gave torchdata their places."""
    if not isinstance(state, dict):
        return False
    return state.get("dataset_iter_state") is not None or any(map(_has_iterators, state.values()))


def _sampler_is_known(loader: Any) -> bool:
    """Whether a loader with a state of its own knows that of its sampler too.

    torchdata passes over the indices of any other sampler, drawn anew: exact only without chance.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while type(sampler).__name__ == "BatchSampler" and not keeps_state(sampler):
        sampler = sampler.sampler
    ours = (torch.utils.data.SequentialSampler, DistributedSampler)
    known: Callable[[Any], bool] = lambda s: keeps_state(s) or isinstance(s, ours)  # noqa: E731
    return known(sampler) or type(sampler).__module__.startswith("torchdata.")


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
            "val_loader", "be iterable many times", f"an iterator ({type(loader).__name__})",
            "the second validation would find nothing; give a list or a DataLoader",
            TypeError,
        )  # fmt: skip
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
    memory, numbers = Memory({"loader": loader}), _Numbers.now()
    before = memory.state(generators_only=True)
    own, dealt = shard_loader(loader, world)
    if isinstance(own, DataLoader) and own.persistent_workers and own._iterator is not None:
        # workers that live on are not seeded again: drawn here, as the first time
        torch.empty((), dtype=torch.int64).random_(generator=own.generator)
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
