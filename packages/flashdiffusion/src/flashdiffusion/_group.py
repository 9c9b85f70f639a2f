"""Several processes on one problem: who takes which tiles and rows, and how their sums meet.

Points and results are on every rank. A sweep's tile pairs are dealt in turn (rank, rank + size, ..)
and the partial sums meet in one all_reduce; of a Krylov basis each rank keeps its own rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shared_kernels import checks

# Sums of up to so many numbers, those of all ranks together, are taken from a gather: an all_reduce
# goes around twice, and between steps of a solve the time is in the messages.
_GATHER_UP_TO = 2**15


class Ranks:
    """This process among those of a torch.distributed group; every method is collective."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: another rank has died or left this computation; "
                f"its own error says why ({error})"
            ) from error

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        x = x.contiguous()
        if x.numel() * self.size > _GATHER_UP_TO:
            self._call(dist.all_reduce, x, dist.ReduceOp.SUM)
            return x
        out, *others = self.gather(x)
        for part in others:
            out = out + part
        return out

    def first(self, x: Tensor) -> Tensor:
        """Rank 0's values: machines of two kinds may round a small factorisation in two ways."""
        x = x.contiguous()
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        self._call(dist.broadcast, x, source)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of equal shapes from all ranks -> (size, n, ...)."""
        out = x.new_empty((self.size, *x.shape))
        self._call(dist.all_gather, list(out.unbind(0)), x.contiguous())
        return out

    def objects(self, thing: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, out, thing)
        return out


def resolve(group: Any) -> Ranks | None:
    """None, "world" or a ProcessGroup -> Ranks, or None for a process alone."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        checks.fail(
            "group", "be None without torch.distributed", repr(group),
            "start the processes with torchrun and call torch.distributed.init_process_group",
        )  # fmt: skip
    if isinstance(group, str):
        checks.in_set("group", group, ("world",))
        return Ranks(None)
    if not isinstance(group, dist.ProcessGroup):
        got = type(group).__name__
        checks.fail("group", "be None, 'world' or a ProcessGroup", got, error=TypeError)
    if dist.get_rank(group) < 0:
        checks.fail("group", "contain this process", f"rank {dist.get_rank()} outside of it")
    return Ranks(group)


@dataclass
class Agreement:
    """What a rank tells the others at the end of an `agreement` block.

    equal: name -> fingerprint; refused unless equal on every rank.
    from_first: name -> anything; after the block, what rank 0 put there.
    """

    equal: dict[str, int] = field(default_factory=dict)
    from_first: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None


@contextmanager
def agreement(ranks: Ranks | None) -> Iterator[Agreement]:
    """A block without collectives in it: where one rank raises an error, all ranks raise one."""
    mine = Agreement()
    if ranks is None:
        yield mine
        return
    try:
        yield mine
    except Exception as error:
        ranks.objects(Agreement(refusal=f"{type(error).__name__}: {error}"))
        raise
    every = ranks.objects(mine)
    for rank, theirs in enumerate(every):
        if theirs.refusal is not None:
            raise ValueError(f"rank {rank} has refused its input: {theirs.refusal}")
    for name in mine.equal:
        others = [rank for rank, it in enumerate(every) if it.equal[name] != every[0].equal[name]]
        if others:
            checks.fail(name, "be the same on every rank", f"others than rank 0's on {others}")
    if ranks.rank > 0:
        mine.from_first = every[0].from_first


def same_batches(batches: Iterable[np.ndarray], ranks: Ranks | None) -> Iterator[np.ndarray]:
    """Each batch once all ranks have read it, and have read the same."""
    waiting = iter(batches)
    while True:
        with agreement(ranks) as agreed:
            batch = next(waiting, None)
            agreed.equal["X"] = 0 if batch is None or ranks is None else fingerprint(batch)
        if batch is None:
            return
        yield batch


def agreed_rng(random_state: Any, ranks: Ranks | None) -> np.random.RandomState:
    """The generator of rank 0, also where random_state is None."""
    from sklearn.utils import check_random_state

    with agreement(ranks) as agreed:
        agreed.from_first["rng"] = check_random_state(random_state)
    return agreed.from_first["rng"]


def fingerprint(*things: Any) -> int:
    """A checksum of arrays and of what prints the same for the same value."""
    value = 0
    for thing in things:
        if isinstance(thing, np.ndarray):
            value = zlib.crc32(f"{thing.shape} {thing.dtype}".encode(), value)
            value = zlib.crc32(np.ascontiguousarray(thing).data, value)
        else:
            value = zlib.crc32(repr(_by_value(thing)).encode(), value)
    return value


def _by_value(thing: Any) -> Any:
    """2, 2.0 and np.float64(2.0) are one value, a list is a tuple, a mapping its sorted items."""
    if isinstance(thing, Mapping):
        return tuple(sorted((str(k), _by_value(v)) for k, v in thing.items()))
    if isinstance(thing, (list, tuple)):
        return tuple(_by_value(t) for t in thing)
    if isinstance(thing, (bool, np.bool_)):
        return bool(thing)
    if isinstance(thing, (int, float, np.number)):
        return float(thing)
    if isinstance(thing, np.ndarray):
        return fingerprint(thing)
    return thing


class Rows:
    """The rows of the vectors of length N that this process keeps: all of them."""

    def __init__(self, N: int) -> None:
        self.N, self.start, self.stop = N, 0, N

    def mine(self, x: Tensor) -> Tensor:
        """(N, ...) -> this process' rows."""
        return x[self.start : self.stop]

    def whole(self, x: Tensor) -> Tensor:
        """This process' rows -> (N, ...)."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """A sum over rows from its parts."""
        return x

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same bits in every process."""
        return tensors

    def qr(self, x: Tensor, *also: Tensor) -> tuple[Tensor, ...]:
        """Q R = x for tall x of which each process has its rows; R is whole. And `first(*also)`."""
        return *torch.linalg.qr(x), *also


class Shard(Rows):
    """Consecutive rows, the same number on each rank but the last ones."""

    def __init__(self, ranks: Ranks, N: int) -> None:
        self.ranks, self.N = ranks, N
        self.width = -(-N // ranks.size)
        self.start = min(N, ranks.rank * self.width)
        self.stop = min(N, self.start + self.width)

    def whole(self, x: Tensor) -> Tensor:
        if len(x) < self.width:
            x = torch.cat((x, x.new_zeros((self.width - len(x), *x.shape[1:]))))
        return self.ranks.gather(x).flatten(0, 1)[: self.N]

    def total(self, x: Tensor) -> Tensor:
        return self.ranks.total(x)

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # in one message
        packed = self.ranks.first(torch.cat([t.flatten() for t in tensors]))
        parts = packed.split([t.numel() for t in tensors])
        return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))

    def qr(self, x: Tensor, *also: Tensor) -> tuple[Tensor, ...]:
        # factors of the parts, then of the factors stacked (Demmel et al. 2012)
        n, b = x.shape
        q, r = torch.linalg.qr(x)
        padded = x.new_zeros(b, b)
        padded[: len(r)] = r
        # [size * b, b]
        stacked = self.ranks.gather(padded).flatten(0, 1)
        outer, r, *agreed = self.first(*torch.linalg.qr(stacked), *also)
        own = outer[self.ranks.rank * b :][: min(n, b)]
        return q @ own, r, *agreed


def rows_of(ranks: Ranks | None, N: int) -> Rows:
    return Rows(N) if ranks is None else Shard(ranks, N)
