"""Several processes on one problem: who takes which tiles and rows, and how their sums meet.

Points and results are on every rank. A sweep's tile pairs are dealt in turn (rank, rank + size, ..)
and the partial sums meet in one all_reduce; of a Krylov basis each rank keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def agreed_rng(random_state: Any, ranks: Ranks | None) -> np.random.RandomState:
    """The generator of rank 0, also where random_state is None."""
    from sklearn.utils import check_random_state

    with agreement(ranks) as agreed:
        agreed.from_first["rng"] = check_random_state(random_state)
    return agreed.from_first["rng"]


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
