"""How the CPU path cuts attention: groups of heads of one sequence, then tiles of their queries.

Positions inside a sequence are counted from its own start. Queries and keys end together, so query
i stands at key position i + offset, with offset = n_k - n_q.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores per tile: 2 MB in fp32. Fewer make the small steps of the compact path weigh more.
TILE_SCORES = 1 << 19
MAX_ROWS = 128


class Span(NamedTuple):
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Group(NamedTuple):
    """Key heads [first, last) of batch element b, with G query heads each, of one sequence."""

    b: int
    first: int
    last: int
    G: int
    rows: slice
    keys: slice

    @property
    def n_heads(self) -> int:
        return self.last - self.first

    @property
    def n_q(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def n_k(self) -> int:
        return int(self.keys.stop - self.keys.start)

    @property
    def offset(self) -> int:
        return self.n_k - self.n_q

    @property
    def heads(self) -> slice:
        return slice(self.first * self.G, self.last * self.G)

    def of_keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(heads, n_k, D) of a (B, H_kv, N_k, D) tensor."""
        return x[self.b, self.first : self.last, self.keys].to(dtype)

    def add_keys(self, x: Tensor, part: Tensor) -> None:
        x[self.b, self.first : self.last, self.keys] += part

    def _slice(self, rows: Span) -> slice:
        return slice(self.rows.start + rows.start, self.rows.start + rows.stop)

    def of_rows(self, x: Tensor, rows: Span, dtype: torch.dtype) -> Tensor:
        """(heads, G * rows, D) of a (B, H, N_q, D) or (B, H, N_q) tensor."""
        part = x[self.b, self.heads, self._slice(rows)]
        return part.reshape(self.n_heads, self.G * rows.size, -1).to(dtype)

    def put_rows(self, x: Tensor, rows: Span, part: Tensor) -> None:
        place = x[self.b, self.heads, self._slice(rows)]
        place.copy_(part.reshape(place.shape))

    def _pairs(self, rows: Span, keys: Span) -> tuple[int, slice, slice, slice]:
        start = self.keys.start
        return self.b, self.heads, self._slice(rows), slice(start + keys.start, start + keys.stop)

    def pairs(self, x: Tensor, rows: Span, keys: Span) -> Tensor:
        """(heads, G, rows, keys) of a (B, H, N_q, N_k) view."""
        part: Tensor = x[self._pairs(rows, keys)].unflatten(0, (self.n_heads, self.G))
        return part

    def add_pairs(self, x: Tensor, rows: Span, keys: Span, part: Tensor) -> None:
        """Add (heads, G * rows, keys) to x, summed over the dimensions in which x has size 1."""
        part = part.view(1, self.n_heads * self.G, rows.size, keys.size)
        b, *where = self._pairs(rows, keys)
        where = [slice(b, b + 1), *where]
        for dim in range(4):
            if x.shape[dim] == 1:
                part = part.sum(dim, keepdim=True)
                where[dim] = slice(0, 1)
        x[tuple(where)] += part

    def head_index(self, H: int, device: torch.device) -> Tensor:
        """Which of the H heads each of this group's query heads is."""
        return torch.arange(self.heads.start, self.heads.stop, device=device) % H


def one_batch(x: Tensor) -> Tensor:
    """Batch elements as further heads, when nothing tells them apart."""
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def groups(
    shape: tuple[int, int, int, int, int], lengths: list[tuple[int, slice, slice]]
) -> Iterator[Group]:
    """Split (B, H_kv, G, N_q, N_k) into groups whose tiles hold about TILE_SCORES scores."""
    _, H_kv, G, _, _ = shape
    for b, rows, keys in lengths:
        n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
        if n_q == 0 or n_k == 0 or H_kv == 0 or G == 0:
            continue
        per_head = G * min(n_q, MAX_ROWS) * n_k
        step = max(1, TILE_SCORES // per_head)
        for first in range(0, H_kv, step):
            yield Group(b, first, min(first + step, H_kv), G, rows, keys)


def row_tiles(
    group: Group, is_causal: bool, window: int | None, at_most: int = MAX_ROWS
) -> Iterator[tuple[Span, Span]]:
    """Tiles of queries, each with the span of keys that any of them may see."""
    n_rows = TILE_SCORES // (group.n_heads * group.G * group.n_k)
    n_rows = min(max(n_rows, 64 // group.G, 1), MAX_ROWS)
    n_rows = min(n_rows, max(1, (1 << 23) // (group.G * group.n_k)))
    if at_most < MAX_ROWS:  # whole tiles of this height
        n_rows = at_most
    for start in range(0, group.n_q, n_rows):
        rows = Span(start, min(start + n_rows, group.n_q))
        low, high = 0, group.n_k
        if is_causal:
            high = min(high, rows.stop + group.offset)
        if window is not None:
            low = max(low, rows.start + group.offset - window + 1)
            high = min(high, rows.stop - 1 + group.offset + window)
        if high > low:
            yield rows, Span(low, high)


def signed_distance(rows: Span, keys: Span, offset: int, device: torch.device) -> Tensor:
    """(rows, keys): position of the query minus position of the key."""
    queries = torch.arange(rows.start + offset, rows.stop + offset, device=device)
    return queries[:, None] - torch.arange(keys.start, keys.stop, device=device)


def hidden_pairs(
    rows: Span,
    keys: Span,
    offset: int,
    is_causal: bool,
    window: int | None,
    device: torch.device,
) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a tile at its edges, and the pairs (rows, columns) hidden there."""
    ahead = 0 if is_causal else None if window is None else window - 1
    if ahead is not None:  # the first query sees no key past its position + ahead
        start = max(keys.start, rows.start + offset + ahead + 1)
        if start < keys.stop:
            edge = Span(start, keys.stop)
            columns = slice(start - keys.start, None)
            yield columns, signed_distance(rows, edge, offset, device) < -ahead
    if window is not None:  # the last query sees no key before its position - window + 1
        stop = min(keys.stop, rows.stop - 1 + offset - window + 1)
        if stop > keys.start:
            edge = Span(keys.start, stop)
            yield slice(0, stop - keys.start), signed_distance(rows, edge, offset, device) >= window


def below_top(scores: Tensor) -> Tensor:
    """Scores less the largest of their row, in place; as they are where a row sees nothing.

    Thresholds and sums of weights are found, kept and used in these units: fp32 has no digits left
    for them beside a score of 1e8.
    """
    top = scores.amax(-1, keepdim=True)
    return scores.sub_(top.masked_fill_(top == -torch.inf, 0.0))
