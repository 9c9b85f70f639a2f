"""Decoding over pages in plain PyTorch: pages by falling bound, until the rest weighs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shared_kernels import pages, qexp
from shared_kernels.calls import recast
from shared_kernels.rows import wide

from . import _dense, _support
from ._call import Attention
from ._paged_call import PagedDecode
from ._torch import attention_forward, exponents

# Below so many keys per sequence reading all of them is faster than looking at bounds.
_SHORT = 4096
# Query rows that read together: more of them need more pages between them.
_ROWS = 32


@dataclass(frozen=True)
class _Sequence:
    """One sequence: its pages in the pool, and the queries that read them."""

    call: PagedDecode
    b: int
    length: int
    held: Tensor  # (P,) int64, its pages
    run: slice | None  # where they lie in the pool, if side by side
    s: float | Tensor  # (H,) where it differs between heads

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.call.q.shape[1] // self.call.keys.shape[0]

    def of_pages(self, pool: Tensor) -> Tensor:
        """(H_kv, P, ...), a view where the pages lie side by side."""
        return pool.index_select(1, self.held) if self.run is None else pool[:, self.run]

    def per_row(self, x: Tensor, n: int) -> Tensor:
        """What belongs to heads (H,) as (H_kv, G * n, 1)."""
        return x.view(-1, self.group, 1).expand(-1, -1, n).reshape(-1, self.group * n, 1)

    def positions(self, queries: slice) -> Tensor:
        """The positions of the queries in the sequence, which ends with the last of them."""
        first = self.length - self.call.q.shape[2]
        return torch.arange(queries.start, queries.stop, device=self.held.device) + first

    def whole(self, queries: slice, heads: slice) -> Tensor:
        """Read every key for some queries and kv heads. -> (1, H, queries, D_v)"""
        call = self.call
        end = max(0, self.length - call.q.shape[2] + queries.stop)
        k, v = (
            self.of_pages(pool[heads]).flatten(1, 2)[None, :, :end]
            for pool in (call.keys, call.values)
        )
        of_q = slice(heads.start * self.group, heads.stop * self.group)
        alpha = call.alpha
        slopes, s_aux = (None if x is None else x[of_q] for x in (call.slopes, call.s_aux))
        if alpha is not None and alpha.numel() > 1:
            alpha = alpha.reshape(-1)[of_q]
        q = call.q[self.b : self.b + 1, of_q, queries]
        per_head = {"alpha": alpha, "slopes": slopes, "s_aux": s_aux}
        part = recast(call, Attention, q=q, k=k, v=v, **per_head, is_causal=True, square=0)
        out: Tensor = attention_forward(part)[0]
        return out

    def put_whole(self, out: Tensor, queries: slice, is_dense: Tensor) -> None:
        """Write into out (B, H, n, D_v) what the heads of `is_dense` (H_kv,) give."""
        for heads in _stretches(is_dense.tolist()):
            of_q = slice(heads.start * self.group, heads.stop * self.group)
            out[self.b, of_q, queries] = self.whole(queries, heads)[0]

    def bounds(self, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H_kv, G * n, D), scaled; positions (n,); bounds of pages (H_kv, G * n, P)."""
        call, size = self.call, self.call.keys.shape[2]
        at = self.positions(queries)
        q = call.q[self.b, :, queries].to(wide(call.q)) * call.scale
        q = q.reshape(call.keys.shape[0], -1, q.shape[-1])
        upper = torch.bmm(pages.corners(q), self.of_pages(call.bounds).mT)
        first = torch.arange(len(self.held), device=q.device) * size
        self.edit(upper, at, first, first + size - 1)
        return q, at, upper

    def by_bounds(self, queries: slice) -> tuple[Tensor, int, Tensor]:
        """Read what the bounds ask for. -> o (H_kv, G * n, D_v), pages read, heads to read whole"""
        call, n = self.call, queries.stop - queries.start
        H_kv, n_pages, size, D = call.keys.shape
        q, at, upper = self.bounds(queries)
        heads = torch.arange(H_kv, device=q.device)[:, None] * n_pages
        inside = torch.arange(size, device=q.device)
        flat = call.keys.flatten(0, 1).flatten(1)

        def read(which: Tensor) -> Tensor:
            rows = (heads + self.held[which]).view(-1)
            k = flat.index_select(0, rows).view(H_kv, -1, D).to(q.dtype)
            scores = torch.bmm(q, k.mT)
            place = (which.unsqueeze(-1) * size + inside).flatten(1)
            self.edit(scores, at, place, place)
            return scores

        s = self.s if isinstance(self.s, float) else self.per_row(self.s, n)
        sink = None
        if call.s_aux is not None:
            sink = self.per_row(call.s_aux.detach().to(q.dtype), n)
        found = pages.certify(upper, s, size, read, lambda x: _solve(x, s, call.n_iter, sink))
        rows = heads + self.held[found.pages]
        o = pages.weighted(found.weights, rows, call.values.flatten(0, 1))
        return o, found.pages.shape[1], found.is_dense

    def edit(self, scores: Tensor, at: Tensor, low: Tensor, high: Tensor) -> None:
        """Cap, slopes and hidden pairs of keys, or of pages from `low` to `high`; both (keys,).

        For pages the result is a bound: that of the nearest key, or of the farthest where a slope
        is negative; hidden only where no key of the page is seen.
        """
        call, n = self.call, len(at)
        if call.softcap is not None:
            scores.div_(call.softcap).tanh_().mul_(call.softcap)
        if n == 1 and call.window is None and call.slopes is None and low is not high:
            return
        tile = scores.view(scores.shape[0], self.group, n, -1)
        near = at[:, None] - high.unsqueeze(-2)  # (n, keys) or (H_kv, n, keys)
        far = near if low is high else at[:, None] - low.unsqueeze(-2)
        if call.slopes is not None:
            slopes = call.slopes.detach().to(scores.dtype).view(-1, self.group, 1, 1)
            least, most = (
                x.clamp(min=0).to(scores.dtype).view(-1, 1, *x.shape[-2:]) for x in (near, far)
            )
            tile.sub_(torch.where(slopes >= 0, slopes * least, slopes * most))
        hidden = far < 0
        if call.window is not None:
            hidden |= near >= call.window
        tile.masked_fill_(hidden.view(-1, 1, *hidden.shape[-2:]), -torch.inf)


def _solve(
    scores: Tensor, s: float | Tensor, n_iter: int, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and tau of (heads, rows, keys) scores, with a sink (heads, rows, 1) beside them."""
    if sink is not None:
        weights, tau = _solve(torch.cat((scores, sink), -1), s, n_iter, None)
        return weights[..., :-1], tau
    top = scores.amax(-1, keepdim=True)
    if isinstance(s, float) and s == _dense.S and bool(top.isfinite().all()):
        flat = (scores - top).flatten(0, 1)
        p, total, c = _dense.solve(flat, _support.lower_bound(flat, _dense.S), n_iter)
        return p.div_(total).view(scores.shape), c.view(top.shape).add_(top).mul_(_dense.S)
    return qexp.normalize(scores, s, n_iter)


def _sequences(call: PagedDecode) -> Iterator[tuple[_Sequence, list[slice]]]:
    """The sequences that see anything, each with its queries in tiles that read together."""
    s = exponents(call.alpha, call.alpha_value, wide(call.q))
    s = s.reshape(-1) if isinstance(s, Tensor) else s
    (H_kv, _, size, _), (H, n) = call.keys.shape, call.q.shape[1:3]
    step = max(1, _ROWS // max(1, H // H_kv))
    tiles = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    for b, length in enumerate(call.lengths.tolist()):
        if length and H:
            held = call.table[b, : -(-length // size)].long()
            yield _Sequence(call, b, length, held, _run(held), s), tiles


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def paged_decode(call: PagedDecode) -> tuple[Tensor, Tensor]:
    """o (B, H, n, D_v) and how many pages were read (B, H_kv)."""
    out, n_read = (x.zero_() for x in call.fake())
    H_kv, n = call.keys.shape[0], call.q.shape[2]
    for sequence, tiles in _sequences(call):
        b, n_held = sequence.b, len(sequence.held)
        if sequence.length < _SHORT or (isinstance(sequence.s, float) and sequence.s == 0.0):
            out[b] = sequence.whole(slice(0, n), slice(0, H_kv))[0]
            n_read[b] = n_held
            continue
        for queries in tiles:
            o, read, is_dense = sequence.by_bounds(queries)
            out[b, :, queries] = o.view(*out[b, :, queries].shape)
            n_read[b] = torch.maximum(n_read[b], torch.where(is_dense, n_held, read))
            sequence.put_whole(out, queries, is_dense)
    return out, n_read


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def read_whole(call: PagedDecode, is_dense: Tensor, out: Tensor, n_read: Tensor) -> None:
    """Write what the heads of `is_dense` (B, H_kv) give when every key is read."""
    for sequence, tiles in _sequences(call):
        flags = is_dense[sequence.b]
        n_read[sequence.b].masked_fill_(flags, len(sequence.held))
        for queries in tiles:
            sequence.put_whole(out, queries, flags)


def excess(call: PagedDecode) -> Tensor:
    """By how much bounds exceed the largest score of their page, on average. -> (B, H)"""
    B, H, n, D = call.q.shape
    H_kv, _, size, _ = call.keys.shape
    found = torch.full((B, H), torch.nan, dtype=wide(call.q), device=call.q.device)
    for sequence, tiles in _sequences(call):
        total, count = torch.zeros(2, H, dtype=found.dtype, device=found.device)
        for queries in tiles:
            q, at, upper = sequence.bounds(queries)
            k = sequence.of_pages(call.keys).to(q.dtype).flatten(1, 2)
            scores = torch.bmm(q, k.mT)
            place = torch.arange(k.shape[1], device=q.device)[None]
            sequence.edit(scores, at, place, place)
            gap = upper - scores.unflatten(-1, (-1, size)).amax(-1)
            seen = gap.isfinite()
            gap = gap.masked_fill(~seen, 0.0)
            total += gap.view(H, -1).sum(-1)
            count += seen.view(H, -1).sum(-1)
        found[sequence.b] = total / count
    return found


def _run(held: Tensor) -> slice | None:
    """Where pages lie in the pool if each comes right behind the one before."""
    if not bool((held.diff() == 1).all()):
        return None
    first = int(held[0])
    return slice(first, first + len(held))


def _stretches(flags: list[bool]) -> list[slice]:
    """The stretches of True."""
    around = [False, *flags, False]
    edges = [i for i in range(len(flags) + 1) if around[i] != around[i + 1]]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
