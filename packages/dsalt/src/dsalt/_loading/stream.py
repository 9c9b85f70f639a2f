"""Batches of training, and which way of finding a place again a loader allows."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from shared_kernels import checks

from .._distributed import World
from .._memory import is_bare_iterator, keeps_state
from .indexed import Indexed
from .kinds import is_blind, is_divisible, is_pipe, sampler_is_known
from .randomness import Numbers
from .sources import END, Once, Replayed, Source, Stateful


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
        self.source: Source = source_of(loader, world)
        self._numbers: Numbers | None = None  # of the data: now
        self._start: dict[str, Any] | None = None  # at the begin of the epoch
        self._iterator: Iterator[Any] | None = None
        self._closed: dict[str, Any] | None = None
        self._seed = 0

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        before = Numbers.now()
        if self._numbers is None:
            self._numbers, self._seed = self.world.broadcast((before, _seed_after(before)))
        self._numbers.use()
        try:
            yield
        finally:
            self._numbers = Numbers.now()
            before.use()

    def _begin(self) -> Iterator[Any]:
        if not isinstance(self.source, Stateful):
            self._start = {"rng": Numbers.now().plain(), "memory": self.source.memory.state()}
        self.source.seen = self.source.batches = 0
        return self.source.begin(self.epoch, self._seed)

    def __next__(self) -> Any:
        if self._closed is not None:
            self.load_state_dict(self._closed)
        with self._own_numbers():
            item = self._next()
            if item is END:
                if isinstance(self.source, Once):
                    self.source.ended()
                self.epoch, self._iterator = self.epoch + 1, None
                item = self._next()
        if item is END:
            hint = "each rank needs one" if self.world.size > 1 else None
            checks.fail("train_loader", "yield at least one batch", "none", hint)
        return item

    def _next(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        return next(self._iterator, END)

    def close(self) -> None:
        """End the workers; a stream that is continued finds its place as after a restart."""
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
        kind, _ = _KINDS[type(self.source)]
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
        kind, title = _KINDS[type(self.source)]
        if state["kind"] != kind:
            raise ValueError(
                f"cannot resume exactly: `train_loader` was {_TITLES[state['kind']]} and is now "
                f"{title}; give the loader that the run had"
            )
        self._seed, self._start = state["seed"], state["start"]
        self._numbers = Numbers.of((self._start or state)["rng"])
        self.source.accept(state)
        with self._own_numbers():
            if self._start is not None:
                self.source.memory.load(self._start["memory"])
            self._iterator = self.source.resume(self.epoch, self._seed, state)
        if self._start is None:
            self._numbers = Numbers.of(state["rng"])


def _seed_after(numbers: Numbers) -> int:
    """A seed that follows from the numbers, without drawing it from them."""
    copied = torch.Generator()
    copied.set_state(numbers.torch)
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=copied))


def _of_today(state: dict[str, Any], source: Source) -> dict[str, Any]:
    """The state in today's form of a checkpoint that noted the generators' states only."""
    if "kind" in state:
        return state
    start, (kind, _) = state["start"], _KINDS[type(source)]
    if start is None:
        return {**state, "kind": kind, "rng": None}
    counted = isinstance(source, Replayed) or is_divisible(source.loader)
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


def _readable(state: dict[str, Any]) -> dict[str, Any]:
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


# What a checkpoint calls each kind of source, and what a user calls it.
_KINDS: dict[type[Source], tuple[str, str]] = {
    Stateful: ("_Asked", "one with state_dict"),
    Indexed: ("_Indexed", "a map-style DataLoader"),
    Replayed: ("_Again", "an iterable"),
    Once: ("_Once", "an iterator"),
}
_TITLES = dict(_KINDS.values())


def source_of(loader: Any, world: World) -> Source:
    if isinstance(loader, DataLoader):
        iterable = isinstance(loader.dataset, IterableDataset)
        blind = is_blind(loader)
        if blind and iterable and not loader.num_workers:
            return Replayed(loader, world)
        if keeps_state(loader) and (iterable or (not blind and sampler_is_known(loader))):
            return Stateful(loader, world)
        if iterable and not loader.num_workers and keeps_state(loader.dataset):
            return Stateful(loader, world)
        if (
            not iterable
            and not is_pipe(loader.dataset)
            and (type(loader).__iter__ is DataLoader.__iter__ or keeps_state(loader))
        ):
            return Indexed(loader, world)
        return Replayed(loader, world)
    if keeps_state(loader):
        return Stateful(loader, world)
    if is_bare_iterator(loader):
        return Once(loader, world)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        checks.fail("train_loader", "be iterable", type(loader).__name__, error=TypeError)
    return Replayed(loader, world)
