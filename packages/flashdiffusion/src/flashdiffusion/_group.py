"""Several processes on one problem: who takes which tiles and rows, and how their sums meet.

Points and results are on every rank, unless the points are split (`Own`, `_ring`). A sweep's tile
pairs are dealt in turn (rank, rank + size, ..) and the partial sums meet in one all_reduce; of a
Krylov basis each rank keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.distributed import Ranks, agreement, fingerprint


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


def read(X: Any) -> Any:
    """An array as it is; of a function that returns batches of rows, all rows together."""
    if not callable(X):
        return X
    batches = [np.asarray(batch) for batch in X()]
    if not batches:
        checks.fail("X", "return at least one batch of rows", "none")
    found = np.empty((sum(map(len, batches)), *batches[0].shape[1:]), dtype=batches[0].dtype)
    start = 0
    while batches:
        batch = batches.pop(0)
        if batch.shape[1:] != found.shape[1:] or batch.dtype != found.dtype:
            checks.fail(
                "X",
                f"return batches (b, {found.shape[1:]}) of {found.dtype}",
                f"{batch.shape} of {batch.dtype}",
            )
        found[start : start + len(batch)] = batch
        start += len(batch)
    return found


def agreed_rng(random_state: Any, ranks: Ranks | None) -> np.random.RandomState:
    """The generator of rank 0, also where random_state is None."""
    from sklearn.utils import check_random_state

    with agreement(ranks) as agreed:
        agreed.from_first["rng"] = check_random_state(random_state)
    rng: np.random.RandomState = agreed.from_first["rng"]
    return rng


class Rows:
    """The rows of the vectors of length N that this process has: all of them."""

    ranks: Ranks | None = None

    def __init__(self, N: int) -> None:
        self.N, self.start, self.stop = N, 0, N

    def mine(self, x: Tensor) -> Tensor:
        """What a product gives, (N, ...) -> this process' rows."""
        return x[self.start : self.stop]

    def whole(self, x: Tensor) -> Tensor:
        """This process' rows -> what a product takes, (N, ...)."""
        return x

    def collect(self, x: Tensor) -> Tensor:
        """This process' rows -> (N, ...)."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """A sum over rows from its parts."""
        return x

    def each(self, x: Tensor) -> Tensor:
        """What each process has, one after the other: (processes, ...)."""
        return x[None]

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same bits in every process."""
        return tensors

    def qr(self, x: Tensor, *also: Tensor) -> tuple[Tensor, ...]:
        """Q R = x for tall x of which each process has its rows; R is whole. And `first(*also)`."""
        return *torch.linalg.qr(x), *also

    def agreed(self) -> AbstractContextManager[Any]:
        """A block without collectives that looks at own rows: what one process raises all do."""
        return nullcontext()

    def normals(self, rng: np.random.RandomState, n: int) -> Tensor:
        """This process' rows of (N, n) normal numbers, float64."""
        return torch.from_numpy(rng.standard_normal((self.N, n)))


class _Split(Rows):
    """Some of the rows, others on other ranks."""

    ranks: Ranks

    def total(self, x: Tensor) -> Tensor:
        return self.ranks.total(x)

    def each(self, x: Tensor) -> Tensor:
        return self.ranks.gather(x)

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


class Shard(_Split):
    """Consecutive rows, the same number on each rank but the last ones; products are whole."""

    def __init__(self, ranks: Ranks, N: int) -> None:
        self.ranks, self.N = ranks, N
        self.width = -(-N // ranks.size)
        self.start = min(N, ranks.rank * self.width)
        self.stop = min(N, self.start + self.width)

    def whole(self, x: Tensor) -> Tensor:
        if len(x) < self.width:
            x = torch.cat((x, x.new_zeros((self.width - len(x), *x.shape[1:]))))
        return self.ranks.gather(x).flatten(0, 1)[: self.N]


class Own(_Split):
    """The rows of the points that this process was given; products take and give those alone."""

    # of the normal numbers of other ranks, so many are held at once
    _PIECE = 2**16

    def __init__(self, ranks: Ranks, lengths: list[int]) -> None:
        self.ranks, self.lengths, self.N = ranks, lengths, sum(lengths)
        self.start = sum(lengths[: ranks.rank])
        self.stop = self.start + lengths[ranks.rank]

    def mine(self, x: Tensor) -> Tensor:
        return x

    def collect(self, x: Tensor) -> Tensor:
        width = max(self.lengths)
        x = torch.cat((x, x.new_zeros((width - len(x), *x.shape[1:]))))
        every = self.ranks.gather(x)
        return torch.cat([rows[:n] for rows, n in zip(every, self.lengths, strict=True)])

    def at(self, x: Tensor, numbers: np.ndarray) -> Tensor:
        """The rows with these numbers among all: the same on every rank."""
        place = torch.from_numpy(numbers).to(x.device)
        here = (place >= self.start) & (place < self.stop)
        found = x.new_zeros((len(numbers), *x.shape[1:]))
        found[here] = x[place[here] - self.start]
        return self.ranks.total(found)

    def agreed(self) -> AbstractContextManager[Any]:
        return agreement(self.ranks)

    def normals(self, rng: np.random.RandomState, n: int) -> Tensor:
        # the numbers that one process would draw for all rows, of which the own ones are kept
        found = []
        for begin in range(0, self.N, self._PIECE):
            piece = rng.standard_normal((min(self._PIECE, self.N - begin), n))
            found.append(piece[max(0, self.start - begin) : max(0, self.stop - begin)].copy())
        return torch.from_numpy(np.concatenate(found))


def rows_of(ranks: Ranks | None, N: int) -> Rows:
    return Rows(N) if ranks is None else Shard(ranks, N)
