"""What an attention layer remembers of the tokens so far, also of rows of different lengths.

Where rows differ in length each of them ends at the last column of the cache, so that new tokens
are appended to all rows at once; the columns before a row's first token are empty.

A cache holds the columns that a later token can attend and no others. Lists of landmarks can be
made from it: the best of all tokens are among the best so far and the tokens that came since.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels.calls import replaced


class AttentionCache(NamedTuple):
    """What one attention layer remembers: the last T columns that a later token may attend.

    No more than the largest window, two blocks and the landmarks of every head: a landmark that the
    window has passed is kept in one of the first columns, other tokens are forgotten.
    """

    keys: Tensor  # (B, H_kv, T, D), with positions in them
    values: Tensor  # (B, H_kv, T, D)
    energy: Tensor  # (B, H, T) scores, frozen when their token came; -inf where there is none
    state: tuple[Any, ...] | None  # sums that the next scores go on from
    landmark_idx: Tensor  # (B, H, K) columns: the list of the block that the last token is in
    lengths: Tensor | None = None  # (B,) tokens of each row so far; None: all have ``length``
    front: Tensor | None = None  # (B, H, F) places of the tokens in the first F columns, -1: none
    total: int | None = None  # tokens so far of the longest row; None: T

    @property
    def columns(self) -> int:
        """Number of columns T."""
        return self.keys.shape[2]

    @property
    def length(self) -> int:
        """Tokens so far, of the longest row."""
        return self.columns if self.total is None else self.total

    @property
    def front_columns(self) -> int:
        """The number F of first columns that hold landmarks from before the other columns."""
        return 0 if self.front is None else self.front.shape[-1]

    def row_lengths(self) -> Tensor:
        """Tokens so far of each row, (B,), or (1,) where all rows have one length."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((1,), self.length, device=self.keys.device)

    def places(self) -> Tensor:
        """Places in their own sequence of the columns' tokens, (B or 1, H or 1, T); < 0: none."""
        T, F = self.columns, self.front_columns
        column = torch.arange(T, device=self.keys.device)
        place = column - T + self.row_lengths()[:, None, None]
        if self.front is None:
            return place
        return torch.cat((self.front, place[..., F:].expand(*self.front.shape[:2], -1)), -1)

    def first_columns(self) -> Tensor:
        """The first column that each row may attend, (B,)."""
        start = (self.columns - self.row_lengths()).clamp(min=0)
        if self.front is not None:
            start = start.masked_fill((self.front >= 0).flatten(1).any(1), 0)
        return start

    def rows(self, index: Tensor) -> AttentionCache:
        """The cache of rows ``index`` (R,) of the batch: beams, repeated or selected prompts."""
        return AttentionCache(
            keys=self.keys[index],
            values=self.values[index],
            energy=self.energy[index],
            state=None if self.state is None else tuple(s.rows(index) for s in self.state),
            landmark_idx=self.landmark_idx[index],
            lengths=None if self.lengths is None else self.lengths[index],
            front=None if self.front is None else self.front[index],
            total=self.total,
        )

    def surplus(self, needed: int, block: int) -> int:
        """How many columns may be dropped, in whole blocks, if the last ``needed`` must stay.

        Columns stay in step with the blocks of landmark lists.
        """
        _, slots = self._slots()
        return max(0, self.columns - slots - needed) // block * block

    def _slots(self) -> tuple[int, int]:
        """Query heads per key head, and the columns that their landmarks take."""
        group = self.energy.shape[1] // max(1, self.keys.shape[1])
        return group, group * self.landmark_idx.shape[-1]

    def without(self, drop: int, landmarks: Tensor) -> AttentionCache:
        """The cache without ``drop`` columns, but with the landmarks (B, H, K) among them.

        The landmarks of a dropped column move to the first columns, a slot for each head and list
        entry. They are further away than any window, so that their factor is 1 in a slot as well.
        """
        B, H, T = self.energy.shape
        (G, F), H_kv, K = self._slots(), self.keys.shape[1], landmarks.shape[-1]
        device, first = landmarks.device, drop + F  # the first column that stays as it is
        idx = landmarks.to(torch.int64)
        gone = (idx >= 0) & (idx < first)
        column = torch.where(gone, idx, 0)
        head = torch.arange(H, device=device)
        batch = torch.arange(B, device=device)[:, None, None]

        def shortened(x: Tensor) -> Tensor:
            moved = torch.where(gone[..., None], x[batch, (head // G)[:, None], column], 0)
            return torch.cat((moved.reshape(B, H_kv, F, x.shape[-1]), x[:, :, first:]), 2)

        def in_slots(x: Tensor, empty: float) -> Tensor:  # (B, H, K) -> (B, H, F)
            slots = x.new_full((B, H, G, K), empty)
            slots[:, head, head % G] = torch.where(gone, x, empty)
            return slots.reshape(B, H, F)

        energy = in_slots(self.energy.gather(-1, column), float("-inf"))
        slot = torch.arange(F, device=device).view(G, K).repeat(H_kv, 1)  # (H, K)
        idx = torch.where(gone, slot, torch.where(idx < 0, -1, idx - drop))
        return replaced(
            self,
            keys=shortened(self.keys),
            values=shortened(self.values),
            energy=torch.cat((energy, self.energy[..., first:]), -1),
            landmark_idx=idx.to(torch.int32),
            front=in_slots(self.places().expand(B, H, T).gather(-1, column), -1),
            total=self.length,
        )

    def without_padding(self) -> AttentionCache:
        """The cache whose scores are -inf before the first token of each row."""
        column = torch.arange(self.columns, device=self.energy.device)
        first = self.columns - self.row_lengths()[:, None, None]
        empty = (column < first) & (column >= self.front_columns)
        return replaced(self, energy=self.energy.masked_fill(empty, float("-inf")))


def of_padded(cache: AttentionCache, lengths: Tensor) -> AttentionCache:
    """The cache of rows whose ``lengths`` (B,) tokens stand in the first columns."""
    T = cache.columns
    token = torch.arange(T, device=lengths.device) < lengths[:, None]
    # a list of the last block is read again from the scores; a global one stays
    idx = cache.landmark_idx
    idx = torch.where(idx >= 0, idx + (T - lengths[:, None, None]), -1).to(torch.int32)
    cache = replaced(cache, landmark_idx=idx, lengths=lengths)
    return _ordered(cache, tokens_last(token)).without_padding()


def of_packed(cache: AttentionCache, cu_seqlens: Tensor) -> AttentionCache:
    """The cache of packed sequences (1, ..., T, ...), with one row for each of them."""
    place, token = _unpacking(cu_seqlens)

    def unpacked(x: Tensor) -> Tensor:  # (1, H, T, ...) -> (S, H, longest, ...)
        return x[0].transpose(0, 1)[place].transpose(1, 2)

    # a global list does not exist for packed sequences
    idx = cache.landmark_idx.new_full((token.shape[0], *cache.landmark_idx.shape[1:]), -1)
    cache = replaced(
        cache,
        keys=unpacked(cache.keys),
        values=unpacked(cache.values),
        energy=unpacked(cache.energy),
        landmark_idx=idx,
        lengths=cu_seqlens.diff().to(torch.int64),
    )
    return _ordered(cache, tokens_last(token)).without_padding()


class Continuation(NamedTuple):
    """New tokens (B, n) of rows of different lengths, moved to the last columns of each row."""

    order: Tensor | None  # (B, n) which of the given columns stands where; None: as given
    fresh: Tensor  # (B,) how many tokens come
    before: Tensor  # (B,) how many tokens there were
    positions: Tensor  # (B, n) places in their own sequence, 0 where there is no token
    valid: Tensor  # (B, n) whether there is a token

    @classmethod
    def of(cls, past: AttentionCache, n: int, mask: Tensor | None) -> Continuation:
        """n columns after ``past``, of which ``mask`` (B, n) says where tokens are."""
        column = torch.arange(n, device=past.keys.device)
        before = past.row_lengths().expand(past.keys.shape[0])
        fresh = before.new_full(before.shape, n) if mask is None else mask.sum(-1)
        positions = ((before + fresh)[:, None] - n + column).clamp(min=0)
        order = None if mask is None else tokens_last(mask)
        return cls(order, fresh, before, positions, column >= n - fresh[:, None])

    def arranged(self, x: Tensor) -> Tensor:
        """x (B, n, d) with the tokens of each row in its last columns."""
        return x if self.order is None else in_order(x, self.order, 1)

    def restored(self, x: Tensor, dim: int = 1) -> Tensor:
        """x, whose dimension ``dim`` has n columns, in the order that was given."""
        return x if self.order is None else in_order(x, self.order.argsort(-1), dim)

    def close(self, now: AttentionCache) -> AttentionCache:
        """The cache ``now``, to which the columns were appended, without holes between tokens."""
        n, F = self.positions.shape[1], now.front_columns
        T = now.columns - n
        now = replaced(now, lengths=self.before + self.fresh)
        if self.order is not None:
            column = torch.arange(T, device=now.keys.device)
            token = (column >= T - self.before[:, None]) & (column >= F)
            token = torch.cat((token, self.valid), 1)
            # slots of landmarks first, then empty columns, then tokens
            rank = token.to(torch.uint8) + 1
            rank[:, :F] = 0
            idx = now.landmark_idx
            idx = torch.where(idx >= F, idx + (n - self.fresh)[:, None, None], idx)
            energy = now.energy.masked_fill((rank == 1)[:, None], float("-inf"))
            now = replaced(now, energy=energy, landmark_idx=idx)
            now = _ordered(now, rank.argsort(dim=-1, stable=True))
        return now.without_padding()


def tokens_last(token: Tensor) -> Tensor:
    """The order (B, n) that moves the columns with a token behind the others."""
    return token.to(torch.uint8).argsort(dim=-1, stable=True)


def in_order(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x with the entries of ``dim`` in the order (B, n) of each row."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    index = order.view(shape).expand(*x.shape[:dim], order.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index)


def _ordered(cache: AttentionCache, order: Tensor) -> AttentionCache:
    keys, values, energy = (in_order(x, order, 2) for x in (cache.keys, cache.values, cache.energy))
    return replaced(cache, keys=keys, values=values, energy=energy)


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x (1, T, d) as one row per sequence (S, longest, d), and which places are tokens."""
    place, token = _unpacking(cu_seqlens)
    return x[0, place], token


def pack(x: Tensor, token: Tensor) -> Tensor:
    """The tokens of (S, n, d) in one row (1, T, d)."""
    return x[token][None]


def _unpacking(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where column j of sequence s is in the packed row, (S, longest), and whether it is there.

    A row per sequence has a size that only the values of cu_seqlens know: they are read here.
    """
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    column = torch.arange(longest, device=bounds.device)
    token = column < lengths[:, None]
    return torch.where(token, bounds[:-1, None] + column, 0), token
