"""Sequences that are split over ranks: what a chunk of tokens needs of the chunks before it.

Rank r holds the tokens [start, stop). Of those before it needs a halo, the last h keys, values and
scores (h: the widest window, at least a block of landmarks), the K best-scored tokens of each head
before them, and the sums that z-scores go on with. None of it grows with the length.

A chunk's attention is then the operator's over the columns [K best | halo | own tokens], with the
own tokens as its last queries.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared_kernels import checks, distributed, packed

from . import _landmarks
from ._choice import select_landmarks
from ._landmarks import PrefixState
from ._precision import double


class Chunk:
    """The tokens of this rank among those of a sequence, or of sequences packed into one row.

    Attributes:
        ranks: this process among those that share the sequence.
        starts: (size + 1) first token of each rank's chunk, and the number of all tokens.
        bounds: first token of each packed sequence, and the number of all tokens.
        start, stop: the tokens of this rank.
    """

    def __init__(self, ranks: distributed.Ranks, starts: list[int], bounds: list[int]) -> None:
        self.ranks, self.starts, self.bounds = ranks, starts, bounds
        self.start, self.stop = starts[ranks.rank : ranks.rank + 2]

    @classmethod
    def of(cls, group: Any, x: Tensor, cu_seqlens: Tensor | None = None) -> Chunk:
        """The chunk that x (B, n, ..) is; collective, and refused on all ranks or on none.

        ``group`` is a ProcessGroup, one dimension of a DeviceMesh, or a chunk that was made before.
        """
        if isinstance(group, Chunk):
            if x.shape[1] != group.stop - group.start:
                needs = f"hold this rank's {group.stop - group.start} tokens"
                checks.fail("x", needs, x.shape[1])
            return group
        ranks = distributed.required(group)
        with distributed.agreement(ranks) as agreed:
            if x.shape[1] == 0:
                checks.fail(
                    "x", "hold at least one token on each rank", 0, f"rank {ranks.rank} has none"
                )
            agreed.equal["the batch size"] = x.shape[0]
            bounds = None if cu_seqlens is None else cu_seqlens.tolist()
            agreed.equal["cu_seqlens"] = distributed.fingerprint(bounds)
            agreed.from_all = x.shape[1]
        starts = [0]
        for n in agreed.from_all:
            starts.append(starts[-1] + n)
        if cu_seqlens is not None:
            packed.check(cu_seqlens, starts[-1], B=x.shape[0])
        # a sequence without tokens begins where the next one does
        whole = sorted({0, starts[-1], *(bounds or ())})
        return cls(ranks, starts, whole)

    @property
    def total(self) -> int:
        return self.starts[-1]

    def sequence(self, token: int) -> int:
        """First token of the sequence that a token belongs to."""
        return self.bounds[bisect_right(self.bounds, token) - 1]

    def owner(self, token: int) -> int:
        """The rank that holds a token."""
        return bisect_right(self.starts, token) - 1

    def carried(self, rank: int) -> int:
        """First token of the sequence that goes on into a rank's chunk; its start: none does."""
        start = self.starts[rank]
        return start if rank == 0 else self.sequence(start)

    def halo(self, rank: int, reach: int) -> int:
        """How many of the last tokens before its chunk a rank receives."""
        return min(reach, self.starts[rank] - self.carried(rank))

    def cut(self, rank: int, block: int) -> int:
        """The tokens that the landmarks of a rank's first block are chosen from end here."""
        begin = self.carried(rank)
        return begin + (self.starts[rank] - begin) // block * block

    def places(self, device: torch.device) -> Tensor:
        """(n,) the place of each own token in its sequence."""
        token = torch.arange(self.start, self.stop, device=device)
        bounds = torch.tensor(self.bounds, device=device)
        return token - bounds[torch.searchsorted(bounds, token, right=True) - 1]

    def own_bounds(self, before: int) -> list[int]:
        """Bounds of the sequences in ``before`` columns of the carried one, then the own tokens."""
        inside = [b - self.start + before for b in self.bounds if self.start < b < self.stop]
        return [0, *inside, before + self.stop - self.start]


# --- the running statistics of scores ------------------------------------------------------------


class _Sums(torch.autograd.Function):
    """Sums over the earlier tokens of the carried sequence, and their squares, of x minus a shift.

    x (.., n) -> shift (.., 1), without a gradient, total and squares (.., 1). Every rank gathers
    the sums of each rank's last sequence, and in the backward pass their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        ranks = chunk.ranks
        begin = chunk.sequence(chunk.stop - 1)
        first = max(begin, chunk.start) - chunk.start
        shifts = ranks.gather(x[..., first])
        shift = shifts[chunk.owner(begin)]
        y = x[..., first:] - shift[..., None]
        sums = ranks.gather(torch.stack((y.sum(-1), y.square().sum(-1))))
        since = chunk.owner(chunk.carried(ranks.rank))
        total, squares = sums[since : ranks.rank].sum(0)
        ctx.chunk, ctx.first = chunk, first
        ctx.save_for_backward(y)
        ctx.mark_non_differentiable(carried := shifts[since][..., None].clone())
        return carried, total[..., None], squares[..., None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, d_total: Tensor, d_squares: Tensor) -> tuple[Tensor, None]:
        (y,), chunk, ranks = ctx.saved_tensors, ctx.chunk, ctx.chunk.ranks
        given = ranks.gather(torch.stack((d_total, d_squares)))
        d = torch.zeros_like(given[0])
        for later in range(ranks.rank + 1, ranks.size):
            if chunk.owner(chunk.carried(later)) <= ranks.rank:
                d = d + given[later]
        return F.pad(d[0] + 2 * y * d[1], (ctx.first, 0)), None


def scores(x: Tensor, values: Tensor, alpha: Tensor, chunk: Chunk) -> Tensor:
    """The causal scores (B, H, n) of own tokens, as :func:`_landmarks.mixed_scores` has them."""
    value_norm, input_norm = _landmarks.norms(x, values, alpha.numel())
    both = torch.cat((value_norm, input_norm[:, None]), 1)
    shift, total, squares = _Sums.apply(double(both), chunk)
    seen = chunk.start - chunk.carried(chunk.ranks.rank)
    state = PrefixState(seen, shift, total, squares)
    bounds = torch.tensor(chunk.own_bounds(0), device=both.device)
    z, _ = _landmarks.z_prefix(both, state, bounds)
    a = alpha.to(z.dtype)[:, None]
    return a * z[:, :-1] + (1 - a) * z[:, -1:]


# --- keys, values and scores of earlier tokens ---------------------------------------------------


class Best(NamedTuple):
    """The K best tokens of each head in rising order."""

    kv: Tensor  # (B, H, K, 2 D) key and value
    score: Tensor  # (B, H, K)
    token: Tensor  # (B, H, K) int64, -1: empty


class _Earlier(torch.autograd.Function):
    """kv (B, H_kv, n, 2D), score (B, H, n) -> halo kv, halo score, best kv, best score, tokens.

    Halos come from the ranks that hold them. The best tokens pass from rank to rank: each takes
    those of before, joins its own up to the next rank's cut, and sends K on. The backward pass
    goes the same ways in the other direction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        score: Tensor,
        chunk: Chunk,
        reach: int,
        K: int,
        block: int,
        sinks: int,
    ) -> tuple[Tensor, ...]:
        B, H, n = score.shape
        ranks, rank = chunk.ranks, chunk.ranks.rank
        send, receive = _halo_plan(chunk, reach)
        L = chunk.halo(rank, reach)
        halo_kv = kv.new_empty(B, kv.shape[1], L, kv.shape[-1])
        halo_score = score.new_empty(B, H, L)
        _exchange(ranks, kv, halo_kv, send, receive)
        _exchange(ranks, score, halo_score, send, receive)
        best = Best(
            kv.new_zeros(B, H, K, kv.shape[-1]),
            score.new_zeros(B, H, K),
            torch.full((B, H, K), -1, device=kv.device),
        )
        if rank > 0:
            for x in best:
                ranks.pass_on({}, {rank - 1: x})
        source = best.token.new_zeros(0)
        if rank + 1 < ranks.size:
            later, source = _joined(best, (halo_kv, halo_score), (kv, score), chunk, block, sinks)
            for x in later:
                ranks.pass_on({rank + 1: x}, {})
        ctx.given = (chunk, send, receive, kv.shape, score.shape)
        ctx.save_for_backward(source)
        ctx.mark_non_differentiable(best.token)
        return (halo_kv, halo_score, *best)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_halo_kv: Tensor, d_halo: Tensor, d_best_kv: Tensor, d_best: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        chunk, send, receive, kv_shape, score_shape = ctx.given
        (source,), ranks, rank = ctx.saved_tensors, chunk.ranks, chunk.ranks.rank
        d_kv, d_score = d_halo_kv.new_zeros(kv_shape), d_halo.new_zeros(score_shape)
        d_halo_kv, d_halo = d_halo_kv.contiguous().clone(), d_halo.contiguous().clone()
        d_best_kv, d_best = d_best_kv.contiguous().clone(), d_best.contiguous().clone()
        if rank + 1 < ranks.size:
            later_kv, later = torch.empty_like(d_best_kv), torch.empty_like(d_best)
            ranks.pass_on({}, {rank + 1: later_kv})
            ranks.pass_on({}, {rank + 1: later})
            at = 0
            parts = ((d_best_kv, d_best), (d_halo_kv, d_halo), (d_kv, d_score))
            for part_kv, part in parts:
                _add(part_kv, later_kv, source - at)
                _add(part, later, source - at)
                at += part.shape[2]
        if rank > 0:
            ranks.pass_on({rank - 1: d_best_kv}, {})
            ranks.pass_on({rank - 1: d_best}, {})
        for d, d_of_halo in ((d_kv, d_halo_kv), (d_score, d_halo)):
            _return(ranks, d, d_of_halo, send, receive)
        return d_kv, d_score, None, None, None, None, None


def _add(into: Tensor, d: Tensor, place: Tensor) -> None:
    """Add d (B, H, K, ..) to the places (B, H, K) of into (B, H or H_kv, n, ..) that exist."""
    B, H_into, n = into.shape[:3]
    if n == 0 or place.shape[-1] == 0:
        return
    inside = (place >= 0) & (place < n)
    index = place.clamp(0, n - 1)
    if d.dim() == 4:
        inside, index = inside[..., None], index[..., None].expand(d.shape)
    rows = (B, H_into, -1, *d.shape[3:])
    d = torch.where(inside, d, 0)
    into.scatter_add_(2, index.reshape(rows), d.reshape(rows))


_Plan = dict[int, slice]


def _halo_plan(chunk: Chunk, reach: int) -> tuple[_Plan, _Plan]:
    """rank -> the own tokens that it receives; rank -> the part of the own halo that it sends."""
    send: _Plan = {}
    receive: _Plan = {}
    for to in range(chunk.ranks.size):
        end = chunk.starts[to]
        begin = end - chunk.halo(to, reach)
        for source in range(to):
            low = max(begin, chunk.starts[source])
            high = min(end, chunk.starts[source + 1])
            if low < high and source == chunk.ranks.rank:
                send[to] = slice(low - chunk.start, high - chunk.start)
            if low < high and to == chunk.ranks.rank:
                receive[source] = slice(low - begin, high - begin)
    return send, receive


def _exchange(
    ranks: distributed.Ranks, x: Tensor, halo: Tensor, send: _Plan, receive: _Plan
) -> None:
    """Fill the halo (.., L, ..) with the tokens of other ranks, and send them the own ones."""
    parts = {
        source: torch.empty_like(halo[:, :, part].contiguous()) for source, part in receive.items()
    }
    ranks.pass_on({to: x[:, :, part].contiguous() for to, part in send.items()}, parts)
    for source, part in receive.items():
        halo[:, :, part] = parts[source]


def _return(
    ranks: distributed.Ranks, d: Tensor, d_halo: Tensor, send: _Plan, receive: _Plan
) -> None:
    """Add to d what the halos of other ranks have of it, and send them what the own halo has."""
    parts = {to: torch.empty_like(d[:, :, part]).contiguous() for to, part in send.items()}
    ranks.pass_on({at: d_halo[:, :, part].contiguous() for at, part in receive.items()}, parts)
    for to, part in send.items():
        d[:, :, part] += parts[to]


def _joined(
    best: Best,
    halo: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    chunk: Chunk,
    block: int,
    sinks: int,
) -> tuple[Best, Tensor]:
    """The best tokens before the next rank's cut, and each one's place in [best | halo | own]."""
    B, H, K = best.token.shape
    rank, L = chunk.ranks.rank, halo[1].shape[-1]
    begin, end = chunk.carried(rank + 1), chunk.cut(rank + 1, block)
    token = torch.arange(chunk.start - L, chunk.stop, device=best.token.device)
    token = torch.cat((best.token, token.expand(B, H, -1)), -1)
    # of the carried sequence `best` holds the tokens before this rank's cut
    since = max(begin, chunk.cut(rank, block)) if begin == chunk.carried(rank) else begin
    allowed = (token >= since) & (token < end)
    allowed[..., :K] = (best.token >= begin) & (best.token >= 0)
    score = torch.cat((best.score, halo[1], own[1]), -1)
    compared = _landmarks.compared(score, token - begin, sinks)
    compared = compared.masked_fill(~allowed, float("-inf"))
    picked = _landmarks.select_global(compared, K, allowed).to(torch.int64)
    inside = picked >= 0
    at = picked.clamp(min=0)
    G = H // own[0].shape[1]
    kv = own[0].new_zeros(*best.kv.shape)
    if K:
        first, last = best.kv, torch.cat((halo[0], own[0]), 2)
        wide = at[..., None].expand(kv.shape)
        of_best = first.gather(2, wide.clamp(max=K - 1))
        rows = (B, last.shape[1], G * K, kv.shape[-1])
        of_rest = last.gather(2, (wide - K).clamp(min=0).reshape(rows)).reshape(kv.shape)
        kv = torch.where((wide < K), of_best, of_rest)
        kv = torch.where(inside[..., None], kv, 0)
    later = Best(
        kv,
        torch.where(inside, score.gather(-1, at), 0),
        torch.where(inside, token.gather(-1, at), -1),
    )
    return later, picked


class Columns(NamedTuple):
    """Keys, values and scores of [best | filling | halo | own], and the lists over them."""

    k: Tensor  # (B, H_kv, columns, D)
    v: Tensor
    scores: Tensor  # (B, H, columns)
    idx: Tensor  # (B, H, lists, K) int32, landmarks as columns
    cu_seqlens: Tensor | None


def columns(
    k: Tensor, v: Tensor, score: Tensor, chunk: Chunk, reach: float, K: int, block: int, sinks: int
) -> Columns:
    """What the own tokens attend to; ``reach`` is how far a window can look back."""
    B, H_kv, n, D = k.shape
    H, rank = score.shape[1], chunk.ranks.rank
    far = max(math.ceil(reach), block)
    halo_kv, halo_score, best_kv, best_score, token = _Earlier.apply(
        torch.cat((k, v), -1), score, chunk, far, K, block, sinks
    )
    before = chunk.start - chunk.carried(rank)
    L = halo_kv.shape[2]
    # columns of the best tokens are needed where the sequence reaches beyond the halo; what fills
    # them up makes blocks of columns end where blocks of the sequence end
    best_columns = H // H_kv * K if before > L else 0
    filling = (before - L - best_columns) % block if before > L else 0
    C = best_columns + filling
    kv = [halo_kv, torch.cat((k, v), -1)]
    of_score = [halo_score, score]
    if before > L:
        kv.insert(0, F.pad(best_kv.reshape(B, H_kv, best_columns, 2 * D), (0, 0, 0, filling)))
        # a column holds the token of one head: others have no score there
        spread = best_score.new_zeros(B, H, C)
        spread = spread.scatter(-1, _best_columns(token, H_kv), best_score)
        of_score.insert(0, spread)
    every = torch.cat(kv, 2)
    all_scores = torch.cat(of_score, -1)
    chosen = _eligible(all_scores, token, chunk, C, L, H_kv, block, sinks)
    bounds = None
    if len(chunk.bounds) > 2:
        bounds = torch.tensor(chunk.own_bounds(C + L), dtype=torch.int32, device=k.device)
    idx = select_landmarks(chosen, K, landmark_block=block, cu_seqlens=bounds)
    if bounds is None:  # the operator takes the lists of its queries only
        idx = idx[:, :, (C + L) // block :]
    return Columns(every[..., :D], every[..., D:], all_scores, idx, bounds)


def _best_columns(token: Tensor, H_kv: int) -> Tensor:
    """(B, H, K) the column of each head's best tokens."""
    H, K = token.shape[1:]
    group = torch.arange(H, device=token.device) % (H // H_kv)
    return (group[:, None] * K + torch.arange(K, device=token.device)).expand(token.shape)


def _eligible(
    score: Tensor, token: Tensor, chunk: Chunk, C: int, L: int, H_kv: int, block: int, sinks: int
) -> Tensor:
    """(B, H, columns) what landmarks are chosen by: -inf where a column is not one to choose."""
    rank = chunk.ranks.rank
    begin, cut = chunk.carried(rank), chunk.cut(rank, block)
    device = score.device
    at = torch.arange(chunk.start - L, chunk.stop, device=device)
    bounds = torch.tensor(chunk.bounds, device=device)
    place = at - bounds[torch.searchsorted(bounds, at, right=True) - 1]
    place = F.pad(place, (C, 0), value=-1).expand(score.shape).clone()
    allowed = F.pad(at >= cut, (C, 0)).expand(score.shape).clone()
    if token.shape[-1]:
        # the best tokens: in the halo where they are there, else in columns of their own
        where = token - (chunk.start - L) + C
        outside = where < C
        if C:
            where = torch.where(outside, _best_columns(token, H_kv), where)
        exists = token >= 0
        where = torch.where(exists, where, score.shape[-1])
        allowed = F.pad(allowed, (0, 1)).scatter(-1, where, True)[..., :-1]
        place = F.pad(place, (0, 1)).scatter(-1, where, token - begin)[..., :-1]
    return _landmarks.compared(score, place, sinks).masked_fill(~allowed, float("-inf"))
