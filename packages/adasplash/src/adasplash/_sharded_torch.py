"""Attention over keys that several ranks hold: keys and values stay, queries travel.

A tile of queries first solves for its threshold over the keys of its own rank: a lower bound of the
threshold over all keys, so that what lies below it weighs nothing. Then, rank after rank, those
queries travel that a bound of the rank's blocks of keys does not rule out, with their threshold,
and the scores above it come back; each answer raises the threshold for the ranks that follow. The
weights of the scores that are left go where the keys are, and sums of values come back.

The backward pass visits only the ranks that hold weights. Memory is linear: a tile has as many
queries as leave its scores over all keys within a constant.

What travels next is under way while a rank computes, wherever it is known by then: weights, and all
of the backward pass. Which queries travel in the forward pass is not: each answer decides about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import qexp
from shared_kernels.calls import replaced
from shared_kernels.distributed import Ranks
from shared_kernels.rows import wide

from ._call import ENOUGH_STEPS, per_head_sums
from ._sharded_call import Reach, Sharded
from ._torch import exponents

# Scores of a tile of queries over the keys of all ranks, at most.
TILE_SCORES = 1 << 22
# Keys that share a bound.
BLOCK = 64


class Rows(NamedTuple):
    """Queries of any heads, sorted by head; what of them travels."""

    q: Tensor  # (m, D) in the dtype of q
    head: Tensor  # (m,) int32, b * H + h
    place: Tensor  # (m,) int32 in the whole row
    bound: Tensor  # (m,) no key with s * score at most this has a weight

    def some(self, mask: Tensor) -> Rows:
        return Rows(*(x[mask] for x in self))


class Entries(NamedTuple):
    """Scores that may have a weight: row after row, in the order of the keys."""

    counts: Tensor  # (m,) int32 of each row
    score: Tensor  # (entries,)
    key: Tensor  # (entries,) own key of each

    def row(self) -> Tensor:
        index = torch.arange(len(self.counts), device=self.counts.device)
        return index.repeat_interleave(self.counts.long())


class _Problem:
    """What a rank knows of a call: its keys, and how scores are made."""

    def __init__(self, call: Sharded, ranks: Ranks) -> None:
        self.call, self.ranks = call, ranks
        self.dtype = wide(call.q)
        self.B, self.H, self.n_q, _ = call.q.shape
        self.H_kv, self.n_k = call.k.shape[1:3]
        self.G = self.H // max(1, self.H_kv)
        s = exponents(call.alpha, call.alpha_value, self.dtype)
        if isinstance(s, Tensor):
            s = s.reshape(-1).expand(self.H)
        self.s = s
        self.k, self.v = (
            x.to(self.dtype).reshape(self.B * self.H_kv, *x.shape[2:]) for x in (call.k, call.v)
        )
        self.slopes, self.s_aux = (
            None if x is None else x.detach().to(self.dtype) for x in (call.slopes, call.s_aux)
        )
        self.rows_per_tile = max(1, TILE_SCORES // max(1, self.B * self.H * call.total))
        n = torch.tensor([self.n_q], device=call.q.device)
        most = int(ranks.gather(n).max())
        self.n_tiles = -(-most // self.rows_per_tile)

    def s_of(self, head: Tensor) -> float | Tensor:
        """s of rows: one number, or (m, 1)."""
        return self.s if isinstance(self.s, float) else self.s[head.long() % self.H][:, None]

    def tile(self, i: int) -> tuple[slice, Rows]:
        """The queries of a tile, all heads of some tokens."""
        call = self.call
        part = slice(
            min(self.n_q, i * self.rows_per_tile), min(self.n_q, (i + 1) * self.rows_per_tile)
        )
        q = call.q[:, :, part]
        device = q.device
        head = torch.arange(self.B * self.H, dtype=torch.int32, device=device)
        place = call.place_q[part].to(torch.int32)
        return part, Rows(
            q.reshape(-1, q.shape[-1]),
            head.repeat_interleave(len(place)),
            place.repeat(self.B * self.H),
            q.new_full((head.numel() * len(place),), -torch.inf, dtype=self.dtype),
        )

    def of_heads(self, head: Tensor) -> list[tuple[int, slice]]:
        """(row of k and v, rows) for each head that has rows."""
        counts = torch.bincount(head.long(), minlength=self.B * self.H).tolist()
        found, start = [], 0
        for h, n in enumerate(counts):
            if n:
                found.append(
                    (h // self.H * self.H_kv + h % self.H // self.G, slice(start, start + n))
                )
            start += n
        return found

    def products(self, rows: Rows) -> Tensor:
        """(m, n_k) products of queries and own keys, capped."""
        q = rows.q.to(self.dtype) * self.call.scale
        out = q.new_empty(len(q), self.n_k)
        for at, part in self.of_heads(rows.head):
            torch.mm(q[part], self.k[at].T, out=out[part])
        cap = self.call.softcap
        return out if cap is None else out.div_(cap).tanh_().mul_(cap)

    def scores(self, rows: Rows) -> Tensor:
        """(m, n_k) scores of own keys, -inf where a query must not look."""
        x = self.products(rows)
        place = rows.place.long()[:, None]
        if self.slopes is not None:
            distance = (place - self.call.place_k).abs_().to(self.dtype)
            x.addcmul_(self.slope_of(rows.head), distance, value=-1)
        seen = self.visible(rows, self.call.place_k, self.call.place_k)
        return x if seen is None else x.masked_fill_(~seen, -torch.inf)

    def slope_of(self, head: Tensor) -> Tensor:
        slopes = head.new_zeros(self.H, dtype=self.dtype) if self.slopes is None else self.slopes
        return slopes[head.long() % self.H][:, None]

    def visible(self, rows: Rows, first: Tensor, last: Tensor) -> Tensor | None:
        """(m, n) whether a query may see a key of those whose places are within [first, last]."""
        call, place = self.call, rows.place.long()[:, None]
        seen: Tensor | None = None

        def both(a: Tensor | None, b: Tensor) -> Tensor:
            return b if a is None else a & b

        if call.is_causal:
            seen = both(seen, first <= place)
        if call.window is not None:
            seen = both(seen, (place - last < call.window) & (first - place < call.window))
        if call.lengths is not None:
            end = call.lengths.to(place.device)[(rows.head.long() // self.H)][:, None]
            seen = both(seen, (first < end) & (place < end))
        if call.cu_seqlens is not None:
            ends = call.cu_seqlens.to(place.device, torch.int64)[1:]
            own, low, high = (
                torch.bucketize(x.contiguous(), ends, right=True) for x in (place, first, last)
            )
            seen = both(seen, (low <= own) & (own <= high))
        return seen

    def solved(self, x: Tensor, head: Tensor) -> Tensor:
        """(m,) a lower bound of the threshold over all keys, from scores of some of them."""
        sink = self.sink(head)
        x = x if sink is None else torch.cat((x, sink), 1)
        s = self.s_of(head)
        if x.shape[1] == 0:
            return x.new_full((len(x),), -torch.inf)
        _, tau = qexp.normalize(x, s, ENOUGH_STEPS)
        # rounding must not lift a bound above the threshold
        tau = tau - 2**12 * torch.finfo(self.dtype).eps * (1 + tau.abs())
        is_softmax = torch.as_tensor(s, device=x.device) == 0
        nothing = (x == -torch.inf).all(1, keepdim=True) | is_softmax
        return tau.masked_fill(nothing, -torch.inf).squeeze(1)

    def sink(self, head: Tensor) -> Tensor | None:
        return None if self.s_aux is None else self.s_aux[head.long() % self.H][:, None]

    def above(self, x: Tensor, head: Tensor, bound: Tensor) -> Entries:
        """The scores above the bound; a NaN is one."""
        s = self.s_of(head)
        keep = (x * s <= bound[:, None]).logical_not_().logical_and_(x != -torch.inf)
        row, key = keep.nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(x)).to(torch.int32)
        return Entries(count, x[row, key], key)

    def spread(self, entries: Entries, weights: Tensor) -> Tensor:
        """(m, n_k) the weights at their keys, 0 elsewhere."""
        out = weights.new_zeros(len(entries.counts), self.n_k)
        out[entries.row(), entries.key] = weights
        return out

    def values(self, W: Tensor, head: Tensor, x: Tensor) -> Tensor:
        """(m, D_x) sums of own keys' x (B * H_kv, n_k, D_x) with weights W."""
        out = W.new_zeros(len(W), x.shape[-1])
        for at, part in self.of_heads(head):
            torch.mm(W[part], x[at], out=out[part])
        return out

    def add_to_keys(self, into: Tensor, W: Tensor, head: Tensor, rows: Tensor) -> None:
        for at, part in self.of_heads(head):
            into[at].addmm_(W[part].T, rows[part])


class _Boxes(NamedTuple):
    """Bounds of blocks of keys on one rank."""

    low: Tensor  # (B * H_kv, blocks, D)
    high: Tensor
    norm: Tensor  # (B * H_kv, blocks) the longest key, for the rounding of products
    first: Tensor  # (blocks,) smallest place
    last: Tensor  # (blocks,) largest place; below `first`: no key

    @classmethod
    def of_all(cls, problem: _Problem) -> list[_Boxes]:
        """Those of every rank, gathered."""
        k, place, ranks = problem.k, problem.call.place_k, problem.ranks
        n = torch.tensor([problem.n_k], device=k.device)
        blocks = -(-int(ranks.gather(n).max()) // BLOCK)
        short = blocks * BLOCK - problem.n_k
        parts = []
        for fill, amount in ((torch.inf, "amin"), (-torch.inf, "amax")):
            padded = torch.nn.functional.pad(k, (0, 0, 0, short), value=fill)
            parts.append(getattr(padded.unflatten(1, (blocks, BLOCK)), amount)(2))
        norm = torch.nn.functional.pad(k.norm(dim=-1), (0, short)).unflatten(1, (blocks, BLOCK))
        far = torch.iinfo(torch.int64).max // 4
        low, high = (
            torch.nn.functional.pad(place, (0, short), value=fill).unflatten(0, (blocks, BLOCK))
            for fill in (far, -far)
        )
        own = (*parts, norm.amax(2), low.amin(1), high.amax(1))
        return [cls(*every) for every in zip(*(ranks.gather(x) for x in own), strict=True)]

    def above(self, problem: _Problem, rows: Rows) -> Tensor:
        """(m,) whether a key of the rank may have a weight."""
        call, q = problem.call, rows.q.to(problem.dtype) * problem.call.scale
        seen = problem.visible(rows, self.first, self.last)
        exists = (self.last >= self.first).expand(len(q), -1)
        seen = exists if seen is None else seen & exists
        x = q.new_empty(len(q), len(self.first))
        rounding = 4 * q.shape[-1] * torch.finfo(q.dtype).eps
        for at, part in problem.of_heads(rows.head):
            b_q = q[part]
            x[part] = b_q.clamp(min=0) @ self.high[at].T + b_q.clamp(max=0) @ self.low[at].T
            x[part] += rounding * b_q.norm(dim=-1, keepdim=True) * self.norm[at]
        if call.softcap is not None:
            x.div_(call.softcap).tanh_().mul_(call.softcap)
        if problem.slopes is not None:
            place = rows.place.long()[:, None]
            near = torch.maximum(self.first - place, place - self.last).clamp(min=0)
            far = torch.maximum((self.first - place).abs(), (self.last - place).abs())
            slope = problem.slope_of(rows.head)
            x -= torch.minimum(slope * near, slope * far)
        # rather a key too many than one too few: a bound that is not a number rules nothing out
        may = (x * problem.s_of(rows.head) <= rows.bound[:, None]).logical_not_()
        return (may & seen).any(1)


class _Gathered:
    """The scores of a tile from all ranks, side by side in a rectangle."""

    def __init__(self, n_rows: int, like: Tensor) -> None:
        self.n_rows = n_rows
        self.rows: list[Tensor] = []
        self.parts: list[list[Tensor]] = []
        self.like = like

    def add(self, row: Tensor, *parts: Tensor) -> None:
        self.rows.append(row)
        self.parts.append(list(parts))

    def rectangles(self, fills: tuple[float, ...]) -> list[Tensor]:
        """(rows, longest) of each part, filled up."""
        row = torch.cat(self.rows)
        order = row.argsort(stable=True)
        count = torch.bincount(row, minlength=self.n_rows)
        start = count.cumsum(0) - count
        slot = torch.empty_like(row)
        slot[order] = torch.arange(len(row), device=row.device) - start[row[order]]
        self.where = (row, slot)
        longest = int(count.max()) if len(count) else 0
        found = []
        for i, fill in enumerate(fills):
            out = self.like.new_full((self.n_rows, longest), fill)
            out[row, slot] = torch.cat([part[i] for part in self.parts])
            found.append(out)
        return found

    def back(self, x: Tensor) -> list[Tensor]:
        """Of a rectangle the entries of each rank, as they came."""
        return list(x[self.where].split([len(row) for row in self.rows]))


def attention_forward(call: Sharded) -> tuple[Tensor, Reach]:
    """o (B, H, n_q, D_v) of this rank's queries; collective."""
    ranks = Ranks.named(call.group)
    with torch.autocast(call.q.device.type, enabled=False):
        problem = _Problem(call, ranks)
        boxes = _Boxes.of_all(problem) if call.total else []
        o = torch.zeros(
            *call.q.shape[:3], call.v.shape[-1], dtype=call.q.dtype, device=call.q.device
        )
        tau = torch.zeros(call.q.shape[:3], dtype=problem.dtype, device=call.q.device)
        reach = torch.zeros((ranks.size, *tau.shape), dtype=torch.bool, device=tau.device)
        for i in range(problem.n_tiles if call.total else 0):
            part, rows = problem.tile(i)
            out, threshold, reached = _tile_forward(problem, boxes, rows)
            shape = (problem.B, problem.H, -1)
            o[:, :, part] = out.view(*shape, out.shape[-1]).to(o.dtype)
            tau[:, :, part] = threshold.view(shape)
            reach[:, :, :, part] = reached.view(ranks.size, *shape)
        if not call.save:
            tau, reach = tau.new_empty(0), reach.new_empty(ranks.size, 0)
        return o, Reach(tau, reach)


class _Ahead:
    """What is sent in each step around the ring: the first at once, the next while one is used."""

    def __init__(self, ranks: Ranks, parts: Callable[[int], list[Tensor]]) -> None:
        """parts: number of a step -> what is sent to the rank that is asked in it."""
        self.ranks, self.parts, self.steps, self.n = ranks, parts, _steps(ranks), 0
        self._start()

    def _start(self) -> None:
        if self.n < len(self.steps):
            to, source = self.steps[self.n]
            self.wait = self.ranks.start_swap(self.parts(self.n), to, source)

    def take(self) -> list[Tensor]:
        """What the rank that asks has sent in the next step."""
        got = self.wait()
        self.n += 1
        self._start()
        return got


def _steps(ranks: Ranks) -> list[tuple[int, int]]:
    """(rank to ask, rank that asks) of each step around the ring."""
    return [
        ((ranks.rank + d) % ranks.size, (ranks.rank - d) % ranks.size) for d in range(1, ranks.size)
    ]


def _tile_forward(
    problem: _Problem, boxes: list[_Boxes], rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of values, thresholds, and which ranks gave a weight, (ranks, m)."""
    ranks, m = problem.ranks, len(rows.q)
    x = problem.scores(rows)
    rows = replaced(rows, bound=problem.solved(x, rows.head))
    own = problem.above(x, rows.head, rows.bound)
    del x
    found = _Gathered(m, rows.bound)
    found.add(own.row(), own.score)
    asked, answered = [], []
    steps = _steps(ranks)
    for step, (to, source) in enumerate(steps):
        index = boxes[to].above(problem, rows).nonzero().squeeze(1)
        theirs = Rows(*ranks.swap(rows.some(index), to, source))
        x = problem.scores(theirs)
        bound = torch.maximum(theirs.bound, problem.solved(x, theirs.head))
        entries = problem.above(x, theirs.head, bound)
        count, score = ranks.swap([entries.counts, entries.score], source, to)
        row = index.repeat_interleave(count.long())
        found.add(row, score)
        asked.append((to, source, row))
        answered.append((theirs, entries))
        if step + 1 < len(steps):
            (every,) = found.rectangles((-torch.inf,))
            raised = problem.solved(every, rows.head)
            # NaN: a row that has seen one
            rows = replaced(rows, bound=torch.maximum(rows.bound, raised))
    (every,) = found.rectangles((-torch.inf,))
    p, tau = _weights(problem, every, rows.head, problem.call.n_iter)
    own_p, *others = found.back(p)
    kept_of = [(weight == 0).logical_not_() for weight in others]
    ahead = _Ahead(ranks, lambda i: [kept_of[i], others[i][kept_of[i]]])
    out = problem.values(problem.spread(own, own_p), rows.head, problem.v)
    reached = torch.zeros(ranks.size, m, dtype=torch.bool, device=out.device)
    for (to, source, row), (theirs, entries), kept in zip(asked, answered, kept_of, strict=True):
        flags, their_p = ahead.take()
        W = their_p.new_zeros(len(flags))
        W[flags] = their_p
        kept_rows = torch.zeros(len(theirs.q), dtype=torch.bool, device=W.device)
        kept_rows[entries.row()[flags]] = True
        sums = problem.values(problem.spread(entries, W), theirs.head, problem.v)
        (sums,) = ranks.swap([sums[kept_rows]], source, to)
        reached[to, row[kept]] = True
        out[reached[to]] += sums
    return out, tau, reached


def _weights(problem: _Problem, every: Tensor, head: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Weights (m, columns) of the scores of all ranks, without the sink's, and the threshold."""
    s = problem.s_of(head)
    sink = problem.sink(head)
    x = every if sink is None else torch.cat((every, sink), 1)
    if x.shape[1] == 0:
        return x, x.new_full((len(x),), -torch.inf)
    p, _ = qexp.normalize(x, s, n_iter)
    return p[:, : every.shape[1]], problem.solved(every, head)


def attention_backward(
    call: Sharded, saved: Reach, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients; collective. Those of alpha, slopes and s_aux are this rank's part."""
    ranks = Ranks.named(call.group)
    with torch.autocast(call.q.device.type, enabled=False):
        problem = _Problem(call, ranks)
        total = _Gradients(problem)
        for i in range(problem.n_tiles if call.total else 0):
            part, rows = problem.tile(i)
            rows = replaced(rows, bound=saved.tau[:, :, part].reshape(-1))
            reach = saved.reach[:, :, :, part].reshape(ranks.size, -1)
            do = d_out[:, :, part].reshape(-1, d_out.shape[-1])
            total.q[:, :, part] = _tile_backward(problem, total, rows, reach, do).view(
                problem.B, problem.H, -1, call.q.shape[-1]
            )
    found = {
        "q": total.q.to(call.q.dtype),
        "k": total.k.view(call.k.shape).to(call.k.dtype),
        "v": total.v.view(call.v.shape).to(call.v.dtype),
    }
    if call.alpha is not None and "alpha" in needs:
        found["alpha"] = per_head_sums(total.alpha, call.alpha)
    if call.slopes is not None:
        found["slopes"] = total.slopes.to(call.slopes.dtype)
    if call.s_aux is not None:
        found["s_aux"] = total.s_aux.to(call.s_aux.dtype)
    return found


class _Gradients:
    """Sums of gradients on this rank."""

    def __init__(self, problem: _Problem) -> None:
        q = problem.call.q
        self.q = torch.zeros(q.shape, dtype=problem.dtype, device=q.device)
        self.k, self.v = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
        self.alpha, self.slopes, self.s_aux = (self.q.new_zeros(problem.H) for _ in range(3))


def _tile_backward(
    problem: _Problem, total: _Gradients, rows: Rows, reach: Tensor, do: Tensor
) -> Tensor:
    """The gradient of a tile's queries (m, D); adds to those of own keys and values."""
    ranks, head = problem.ranks, rows.head
    found = _Gathered(len(rows.q), rows.bound)
    steps = _steps(ranks)
    indices = [reach[to].nonzero().squeeze(1) for to, _ in steps]
    ahead = _Ahead(ranks, lambda i: [*rows.some(indices[i]), do[indices[i]]])
    x, own, dp = _answer(problem, rows, do)
    found.add(own.row(), own.score, dp)
    asked, answered = [], []
    for (to, source), index in zip(steps, indices, strict=True):
        *theirs, their_do = ahead.take()
        of_them = Rows(*theirs)
        x, entries, dp = _answer(problem, of_them, their_do)
        count, score, dp = ranks.swap([entries.counts, entries.score, dp], source, to)
        found.add(index.repeat_interleave(count.long()), score, dp)
        asked.append((to, source, index))
        answered.append((of_them, entries, their_do))
    every, every_dp = found.rectangles((-torch.inf, 0.0))
    sink = problem.sink(head)
    if sink is not None:
        every = torch.cat((every, sink), 1)
        every_dp = torch.cat((every_dp, torch.zeros_like(sink)), 1)
    s = problem.s_of(head)
    p, _ = qexp.normalize(every, s, problem.call.n_iter)
    d_score, ds = qexp.backward_both(every_dp, p, s)
    by_head = head.long() % problem.H
    total.alpha.index_add_(0, by_head, ds.view(-1))
    if sink is not None:
        total.s_aux.index_add_(0, by_head, d_score[:, -1])
        p, d_score = p[:, :-1], d_score[:, :-1]
    own_p, *other_p = found.back(p)
    own_d, *other_d = found.back(d_score)
    ahead = _Ahead(ranks, lambda i: [other_p[i], other_d[i]])
    dq = _settle(problem, total, rows, own, do, own_p, own_d)
    for (to, source, index), (of_them, entries, their_do) in zip(asked, answered, strict=True):
        their_p, their_d = ahead.take()
        part = _settle(problem, total, of_them, entries, their_do, their_p, their_d)
        (part,) = ranks.swap([part], source, to)
        dq[index] += part
    return dq


def _answer(problem: _Problem, rows: Rows, do: Tensor) -> tuple[Tensor, Entries, Tensor]:
    """The scores of own keys above the rows' bounds, and the gradient of their weights."""
    x = problem.scores(rows)
    entries = problem.above(x, rows.head, rows.bound)
    dp = x.new_zeros(len(x), problem.n_k)
    do = do.to(problem.dtype)
    for at, part in problem.of_heads(rows.head):
        torch.mm(do[part], problem.v[at].T, out=dp[part])
    return x, entries, dp[entries.row(), entries.key]


def _settle(
    problem: _Problem,
    total: _Gradients,
    rows: Rows,
    entries: Entries,
    do: Tensor,
    p: Tensor,
    d_score: Tensor,
) -> Tensor:
    """Add to the gradients of own keys, values and slopes; that of the queries is returned."""
    call, q = problem.call, rows.q.to(problem.dtype) * problem.call.scale
    problem.add_to_keys(total.v, problem.spread(entries, p), rows.head, do.to(problem.dtype))
    if problem.slopes is not None:
        row = entries.row()
        distance = (rows.place.long()[row] - call.place_k[entries.key]).abs().to(problem.dtype)
        by_head = rows.head.long()[row] % problem.H
        total.slopes.index_add_(0, by_head, d_score * distance, alpha=-1)
    W = problem.spread(entries, d_score)
    if call.softcap is not None:
        W.mul_((problem.products(rows) / call.softcap).square_().neg_().add_(1))
    problem.add_to_keys(total.k, W, rows.head, q)
    return problem.values(W, rows.head, problem.k).mul_(call.scale)
