"""Attention over a band and gathered landmarks: chunks of queries, one matmul per product.

A hard window is the soft one with ramp 1 at an integer width, so one path serves both. Masks touch
only the columns where a window ends or the diagonal runs.

The bits of a row depend on what the row attends and on nothing else: chunks of queries and tiles of
keys begin at multiples of their size in the row's own sequence, a matrix product always has the
shape that it has in the middle of a long sequence (rows and keys that are missing are zeros), sums
over keys go tile by tile, and each row decides from its own past whether a maximum is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels.rows import wide

from ._call import Attention, Normalized
from ._geometry import first_lists

CHUNK = 64  # queries per step, twice as many if the cache holds the scores of all heads then
TILE = 64  # keys that are summed together
MIN_ROWS = 16  # of a matrix product: with fewer rows the terms are summed in another order
REGULAR = range(2, 129)  # inner sizes whose sums have one order for any number of rows >= MIN_ROWS
CACHED = 1 << 18  # scores per step, which fit into the second-level cache
SAFE = 40.0  # no maximum is needed while |score| stays below
LOG2E = 1.0 / math.log(2.0)
EMPTY = 1 << 40  # place of an empty landmark slot: behind every query


@dataclass(frozen=True)
class _Step:
    """Positions p0..p0 + n of the sequence that begins at ``start``; of them queries r0..r1 exist.

    They see keys lo..hi (those from N_k on are zeros); keys from ``full`` to the diagonal lie in
    the window of every one; they use ``n_lists`` lists.
    """

    start: int
    p0: int
    n: int
    r0: int
    r1: int
    lo: int
    hi: int
    full: int
    first_list: int
    n_lists: int


class _Job:
    """The inputs in computing form: rows are (batch * kv head), G query heads in each."""

    def __init__(self, call: Attention) -> None:
        q, k, landmarks, bias = call.q, call.k, call.landmarks, call.bias
        cu_seqlens, self.device = call.cu_seqlens, q.device
        B, self.H, self.n_q, self.D = q.shape
        self.H_kv, self.n_k = k.shape[1:3]
        self.rows, self.G = B * self.H_kv, self.H // max(1, self.H_kv)
        self.dtype = wide(q)
        self.scale, self.ramp, self.block = call.factor, call.ramp, call.block
        self.before = self.n_k - self.n_q
        self.q = self.by_query(q)
        self.k, self.v = self.by_key(k), self.by_key(call.v)
        self.w = call.windows.to(self.dtype).reshape(self.rows, self.G, self.n_q)

        self.K = landmarks.shape[-1]
        self.regular = self.D in REGULAR and self.K <= REGULAR.stop
        n_lists = landmarks.shape[2] if landmarks.dim() == 4 else 1
        l = landmarks.reshape(self.rows, self.G, n_lists, self.K).to(torch.int64)
        row = torch.arange(self.rows, device=self.device)[:, None, None, None] * self.n_k
        self.flat_l = row + l.clamp(min=0)
        # an empty slot lies behind every query: its multiplier is 0
        self.l = torch.where(l < 0, EMPTY, l).to(self.dtype)
        self.bias = None
        if bias is not None:
            self.bias = bias.reshape(self.l.shape).to(self.dtype)
        self.steps = list(self._plan(cu_seqlens))
        low, high = self.w.aminmax() if self.w.numel() else (self.w.sum(),) * 2
        self.equal = bool(low == high)
        self.safe = None if self._bounded() else self._safe(call)
        self.bounded = self.safe is None
        self._edges: dict[tuple[int, ...], Tensor] = {}

    def by_query(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(self.rows, self.G, self.n_q, x.shape[-1])

    def by_key(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(self.rows, self.n_k, self.D)

    def _bounded(self) -> bool:
        """Whether every score is finite and so small that exp needs no maximum subtracted."""
        if self.q.numel() == 0:
            return True
        q = torch.linalg.vector_norm(self.q, dim=-1).max()
        k = torch.linalg.vector_norm(self.k, dim=-1).max()
        bound = q * k * abs(self.scale)
        if self.bias is not None and self.bias.numel():
            bound = bound + self.bias.amax().clamp(min=0)
        return bool(bound <= SAFE) and bool(self.v.isfinite().all())

    def _safe(self, call: Attention) -> Tensor:
        """The same of each row (rows, G, N_q), from nothing but the row's own past."""
        cu_seqlens = call.cu_seqlens
        norm = torch.linalg.vector_norm(self.k, dim=-1)
        bounds = [0, self.n_k] if cu_seqlens is None else cu_seqlens.tolist()
        sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        past = [part.cummax(-1).values for part in norm.split(sizes, -1)]
        largest = torch.cat(past, -1)[:, None, self.before :]
        bound: Tensor = torch.linalg.vector_norm(self.q, dim=-1) * largest * abs(self.scale)
        if self.bias is not None and self.bias.numel() and bool(self.bias.amax() > 0):
            _, lists = call.rows()
            place = torch.arange(self.before, self.n_k, device=self.device)
            top = torch.zeros_like(bound)
            for slot in range(self.K):
                seen = self.l[:, :, lists, slot] <= place
                b = self.bias[:, :, lists, slot]
                top = torch.where(seen, torch.maximum(top, b), top)
            bound = bound + top
        return bound <= SAFE

    def _plan(self, cu_seqlens: Tensor | None) -> Iterator[_Step]:
        position = torch.arange(self.before, self.n_k, dtype=torch.float64, device=self.device)
        if not self.n_q or not self.rows or not self.G:
            return
        w = self.w.double()
        # a step costs the same time for its many small calls, however few queries it has
        widest = min(float(w.max()) + self.ramp, self.n_k) + 2 * CHUNK + self.K
        few = self.regular and self.rows * self.G * 2 * CHUNK * widest <= CACHED
        self.chunk = 2 * CHUNK if few else CHUNK
        reach = (position - w.amax((0, 1)) - self.ramp).tolist()
        inside = (position - w.amin((0, 1))).tolist()
        bounds, firsts = [0, self.n_k], [-(self.before // self.block) if self.block else 0]
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            firsts = [0] * len(bounds)  # one list for all
            if self.block:
                firsts = first_lists(cu_seqlens, self.block).tolist()
        for start, stop, first in zip(bounds, bounds[1:], firsts, strict=False):
            q0, q1 = max(start, self.before) - start, stop - start
            for t, n, c, n_lists in self._spans(q0, q1):
                p0 = start + t
                r0, r1 = max(p0, self.before) - self.before, min(p0 + n, stop) - self.before
                lo = min(max(start, math.floor(min(reach[r0:r1])) + 1), p0)
                lo = start + (lo - start) // TILE * TILE
                hi = start - (-(t + n) // TILE) * TILE
                full = min(max(math.ceil(max(inside[r0:r1])), lo), hi)
                yield _Step(start, p0, n, r0, r1, lo, hi, full, first + c, n_lists)

    def _spans(self, q0: int, q1: int) -> Iterator[tuple[int, int, int, int]]:
        """Steps (first place, size, first list, lists) for places q0..q1 of a sequence.

        A step is some whole blocks, or an equal part of one block, from a multiple of its size on.
        """
        C, size = self.block or 0, self.chunk
        unit = 1
        if C:
            unit = C if C <= self.chunk else 1
            size = self.chunk // C * C if C <= self.chunk else -(-C // -(-C // self.chunk))
        p = q0
        while p < q1:
            if C > self.chunk:
                begin = p // C * C
                t = begin + (p - begin) // size * size
                n = min(size, begin + C - t)
            else:
                t, n = p // size * size, size
            end = t + n
            if self.regular and (p > t or q1 < end):  # not all of it is asked for
                t += (p - t) // unit * unit
                n = max(min(q1, end) - t, MIN_ROWS)
                n = -(-n // unit) * unit
            many = C and C <= self.chunk
            yield t, n, t // C if C else 0, n // C if many else 1
            p = end

    def groups(self, step: _Step) -> Iterator[slice]:
        size = self.G * step.n * (step.hi - step.lo + self.K)
        each = max(1, CACHED // max(1, size))
        each = -(-self.rows // -(-self.rows // each))
        for a in range(0, self.rows, each):
            yield slice(a, min(self.rows, a + each))

    def of_step(self, x: Tensor, step: _Step, g: slice, empty: float = 0.0) -> Tensor:
        """x (rows, G, N_q, ...) at the step's places, (rows, G, n, ...); ``empty`` where none."""
        x = x[g, :, step.r0 : step.r1]
        if step.r1 - step.r0 == step.n:
            return x
        front = step.r0 + self.before - step.p0
        whole = x.new_full((*x.shape[:2], step.n, *x.shape[3:]), empty)
        whole[:, :, front : front + x.shape[2]] = x
        return whole

    def existing(self, x: Tensor, step: _Step) -> Tensor:
        """Of (rows, G, n, ...) the queries that exist."""
        front = step.r0 + self.before - step.p0
        return x[:, :, front : front + step.r1 - step.r0]

    def keys(self, x: Tensor, step: _Step, g: slice) -> Tensor:
        """x (rows, N_k, D) at the step's keys, zeros behind the last one."""
        short = max(0, step.hi - self.n_k)
        x = x[g, step.lo : step.hi]
        return F.pad(x, (0, 0, 0, short)) if short else x

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        if self.regular:
            return torch.bmm(q, keys.mT)
        return torch.cat([torch.bmm(q, part.mT) for part in keys.split(TILE, 1)], -1)

    def window_edge(self, step: _Step, g: slice) -> Tensor | None:
        """m of the columns lo..full, (rows or 1, n, full - lo); None when there are none."""
        width, n = step.full - step.lo, step.n
        if width == 0:
            return None
        key = (step.p0 - step.lo, n, width)
        if self.equal and key in self._edges:
            return self._edges[key]
        # (R + w - d) / R from the distance: its digits must not depend on where a step begins
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        column = torch.arange(-key[0], width - key[0], **options)
        d = torch.arange(n, **options)[:, None] - column
        w = self.w[0, 0, :1] if self.equal else self.of_step(self.w, step, g).reshape(-1, n, 1)
        m = (w + self.ramp - d).clamp_(0, self.ramp)
        if self.ramp != 1:
            m.div_(self.ramp)  # not times 1 / R: a full window must give 1
        if self.equal:
            m = m[None]
            if len(self._edges) < 16:
                self._edges[key] = m
        return m

    def landmark_factor(self, step: _Step, g: slice) -> Tensor:
        """1 - m of the landmarks: clamp((d - w) / R, 0, 1), (rows * n_lists, n / n_lists, K)."""
        each = step.n // step.n_lists
        l = self.lists(self.l, step, g)
        if step.start:  # packed: landmarks of earlier sequences are empty slots too
            l = torch.where(l < step.start, EMPTY, l)
        l = (l - step.p0).reshape(-1, step.n_lists if self.block else 1, 1, self.K)
        place = torch.arange(step.n, dtype=self.dtype, device=self.device)
        place = place.view(step.n_lists, each, 1)
        w = self.of_step(self.w, step, g).reshape(-1, step.n_lists, each, 1)
        u = (place - l).sub_(w).clamp_(0, self.ramp).view(-1, each, self.K)
        return u if self.ramp == 1 else u.div_(self.ramp)

    def lists(self, x: Tensor, step: _Step, g: slice) -> Tensor:
        if not self.block:
            return x[g]
        first, stop = step.first_list, step.first_list + step.n_lists
        if 0 <= first and stop <= x.shape[2]:
            return x[g, :, first:stop]
        return x[g][:, :, self.list_index(step, x)]  # places without a query may have no list

    def list_index(self, step: _Step, x: Tensor) -> Tensor:
        first = step.first_list if self.block else 0
        lists = torch.arange(first, first + step.n_lists, device=self.device)
        return lists.clamp_(0, x.shape[2] - 1)

    def gather(self, x: Tensor, step: _Step, g: slice) -> Tensor:
        """x (rows, n_k, D) at the landmarks: (rows * n_lists, K, D)."""
        index = self.lists(self.flat_l, step, g).reshape(-1)
        return x.reshape(-1, self.D).index_select(0, index).view(-1, self.K, self.D)

    def gates(self, step: _Step, g: slice, u: Tensor) -> Tensor | None:
        """log g of the landmarks, (rows * n_lists, 1 or n / n_lists, K), without what is hidden."""
        if self.bias is None:
            return None
        b = self.lists(self.bias, step, g).reshape(-1, 1, self.K)
        return b if self.bounded else torch.where(u == 0, 0.0, b)

    def split(self, x: Tensor, step: _Step) -> Tensor:
        """(rows, G * n, D) by landmark list: (rows * G * n_lists, n / n_lists, D)."""
        return x.reshape(-1, step.n // step.n_lists, x.shape[-1])


def forward(call: Attention) -> tuple[Tensor, Normalized]:
    job = _Job(call)
    out = torch.empty(job.q.shape, dtype=job.dtype, device=job.device)
    tops, lse = (torch.zeros(out.shape[:-1], dtype=job.dtype, device=job.device) for _ in range(2))
    for step in job.steps:
        for g in job.groups(step):
            _forward_step(job, step, g, out, tops, lse)
    shape = call.q.shape
    out = out.view(shape).to(call.q.dtype)
    return out, Normalized(out, tops.view(shape[:-1]), lse.view(shape[:-1]))


def _forward_step(job: _Job, step: _Step, g: slice, out: Tensor, tops: Tensor, lse: Tensor) -> None:
    n, width = step.n, step.hi - step.lo
    q = (job.of_step(job.q, step, g) * job.scale).reshape(-1, job.G * n, job.D)
    values = job.keys(job.v, step, g)
    s = job.scores(q, job.keys(job.k, step, g))  # [rows, G * n, W]
    s_head = s.view(-1, n, width)  # [rows * G, n, W]
    m = job.window_edge(step, g)
    t = u = b = None
    if job.K:
        l_k, l_v = job.gather(job.k, step, g), job.gather(job.v, step, g)
        t = torch.bmm(job.split(q, step), l_k.transpose(1, 2))
        u = job.landmark_factor(step, g)
        b = job.gates(step, g, u)
    top = None
    if job.safe is not None:
        _hide(step, s_head, m, t, u)
        top = s_head.amax(-1, keepdim=True)
        if t is not None:
            gated = t if b is None else t + b
            top = torch.maximum(top, gated.view(*top.shape[:2], job.K).amax(-1, keepdim=True))
        top.masked_fill_(job.of_step(job.safe, step, g).reshape(top.shape), 0.0)
        s_head.sub_(top)
    _exp(s, top)
    s_head[..., step.p0 - step.lo :].tril_()
    if m is not None:
        s_head[..., : m.shape[-1]].mul_(m)
    # one sum per tile of keys, then one after the other: tiles in front that are zero do nothing
    z = s_head.view(-1, n, width // TILE, TILE).sum(-1).cumsum(-1)[..., -1:]
    if t is not None and u is not None:
        if top is not None:
            t.sub_(top.view(-1, t.shape[1], 1))
        if b is not None:  # a score beside which a gate has no digits is no longer there
            t.add_(b)
        _exp(t, top)
        t.mul_(u)
        z = z + t.sum(-1).view(z.shape)
    if not job.bounded:
        values = _finite(values)
    o = torch.bmm(s[..., :TILE], values[:, :TILE])
    for first in range(TILE, width, TILE):
        o.baddbmm_(s[..., first : first + TILE], values[:, first : first + TILE])
    if t is not None:
        job.split(o, step).baddbmm_(t, l_v if job.bounded else _finite(l_v))
    o = o.view(-1, n, job.D).div_(z)
    if not job.bounded:
        _spread_nan(job, step, g, s, t, o)
    out[g, :, step.r0 : step.r1] = job.existing(o.view(-1, job.G, n, job.D), step)
    if top is not None:
        tops[g, :, step.r0 : step.r1] = job.existing(top.view(-1, job.G, n), step)
    lse[g, :, step.r0 : step.r1] = job.existing(z.log2().view(-1, job.G, n), step)


def _exp(s: Tensor, top: Tensor | None) -> None:
    """exp in place. Its bits do not depend on a number's place, as those of exp2 do.

    Where a maximum was subtracted numbers may underflow, which takes exp ten times as long.
    """
    if top is None:
        s.exp_()
        return
    least = math.log(torch.finfo(s.dtype).tiny)
    gone = s < least
    s.clamp_(min=least).exp_().masked_fill_(gone, 0.0)


def _hide(step: _Step, s: Tensor, m: Tensor | None, t: Tensor | None, u: Tensor | None) -> None:
    """-inf at every score that is not attended, so that no maximum and no NaN comes from it."""
    diagonal = s[..., step.p0 - step.lo :]
    future = torch.ones(diagonal.shape[1:], dtype=torch.bool, device=s.device).triu_(1)
    diagonal.masked_fill_(future, float("-inf"))
    if m is not None:
        s[..., : m.shape[-1]].masked_fill_(m == 0, float("-inf"))
    if t is not None and u is not None:
        t.masked_fill_(u == 0, float("-inf"))


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _spread_nan(job: _Job, step: _Step, g: slice, s: Tensor, t: Tensor | None, o: Tensor) -> None:
    """NaN in the rows that attend a value that is not finite, and in no other row."""
    bad = (~job.v.isfinite().all(-1, keepdim=True)).to(job.dtype)  # [rows, N_k, 1]
    if not bool(bad.any()):
        return
    hit = torch.bmm((s > 0).to(job.dtype), job.keys(bad, step, g))
    if t is not None:
        index = job.lists(job.flat_l, step, g).reshape(-1)
        l_bad = bad.reshape(-1, 1).index_select(0, index).view(-1, job.K, 1)
        job.split(hit, step).baddbmm_((t > 0).to(job.dtype), l_bad)
    o.masked_fill_(hit.view(*o.shape[:2], 1) > 0, float("nan"))


def backward(
    call: Attention, saved: Normalized, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    job = _Job(call)
    d_o = job.by_query(d_out)
    delta = torch.linalg.vecdot(d_o, job.by_query(saved.out))
    options: dict[str, Any] = {"dtype": job.dtype, "device": job.device}
    d_q = torch.empty(job.q.shape, **options)
    d_k, d_v = (torch.zeros(job.k.shape, **options) for _ in range(2))
    d_w = torch.zeros(job.w.shape if "windows" in needs else (0,), **options)
    d_b = torch.zeros(job.l.shape if "bias" in needs else (0,), **options)
    top, lse = saved.top.view(delta.shape), saved.lse.view(delta.shape) / LOG2E
    for step in job.steps:
        for g in job.groups(step):
            _backward_step(job, step, g, d_o, delta, top, lse, d_q, d_k, d_v, d_w, d_b)
    found = {"q": d_q, "k": d_k, "v": d_v, "windows": d_w, "bias": d_b}
    return {field: found[field].view_as(x).to(x.dtype) for field, x in _fields(call, needs)}


def _fields(call: Attention, needs: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    return ((field, getattr(call, field)) for field in needs)


def _backward_step(
    job: _Job,
    step: _Step,
    g: slice,
    d_out: Tensor,
    delta: Tensor,
    tops: Tensor,
    lse: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_w: Tensor,
    d_b: Tensor,
) -> None:
    n, G, D = step.n, job.G, job.D
    cols = slice(step.lo, min(step.hi, job.n_k))
    q = (job.of_step(job.q, step, g) * job.scale).reshape(-1, G * n, D)
    d_o = job.of_step(d_out, step, g).reshape(-1, G * n, D)
    row_lse = job.of_step(lse, step, g, math.inf).reshape(-1, n, 1)  # no query: no weight
    row_delta = job.of_step(delta, step, g).reshape(-1, n, 1)
    keys, values = job.keys(job.k, step, g), job.keys(job.v, step, g)
    s = job.scores(q, keys)
    s_head = s.view(-1, n, step.hi - step.lo)
    m = job.window_edge(step, g)
    t = u = b = None
    if job.K:
        l_k, l_v = job.gather(job.k, step, g), job.gather(job.v, step, g)
        t = torch.bmm(job.split(q, step), l_k.transpose(1, 2))
        u = job.landmark_factor(step, g)
        b = job.gates(step, g, u)
    top = None
    if not job.bounded:
        _hide(step, s_head, m, t, u)
        top = job.of_step(tops, step, g).reshape(-1, n, 1)
        s_head.sub_(top)
    _exp(s_head.sub_(row_lse), top)
    s_head[..., step.p0 - step.lo :].tril_()
    d_s = torch.bmm(d_o, values.transpose(1, 2))
    d_head = d_s.view(s_head.shape)
    d_head.sub_(row_delta).mul_(s_head)  # dS / m
    if not job.bounded:
        d_head.masked_fill_(s_head == 0, 0.0)
    grad_w = None
    if m is not None:
        width = m.shape[-1]
        if d_w.numel():
            grad_w = torch.where((m > 0) & (m < 1), d_head[..., :width], 0).sum(-1)
        s_head[..., :width].mul_(m)
        d_head[..., :width].mul_(m)
    n_keys = cols.stop - cols.start
    d_v[g, cols].baddbmm_(s[..., :n_keys].transpose(1, 2), d_o)
    dq = torch.bmm(d_s, keys)
    d_k[g, cols].baddbmm_(d_s[..., :n_keys].transpose(1, 2), q)
    if t is not None and u is not None:
        q_l, d_l = job.split(q, step), job.split(d_o, step)
        if top is not None:
            t.sub_(job.split(top, step))
        if b is not None:
            t.add_(b)
        _exp(t.sub_(job.split(row_lse, step)), top)
        d_t = torch.bmm(d_l, l_v.transpose(1, 2)).sub_(job.split(row_delta, step)).mul_(t)
        if not job.bounded:
            d_t.masked_fill_(t == 0, 0.0)
        if d_w.numel():
            ramp = (u > 0) & (u < 1)
            lost = torch.where(ramp, d_t, 0).sum(-1).view(-1, n)
            grad_w = -lost if grad_w is None else grad_w - lost
        t.mul_(u)
        d_t.mul_(u)
        if d_b.numel():
            part = d_t.sum(1).view(-1, G, step.n_lists, job.K)
            d_b[g].index_add_(2, job.list_index(step, d_b), part)
        job.split(dq, step).baddbmm_(d_t, l_k)
        index = job.lists(job.flat_l, step, g).reshape(-1)
        d_v.view(-1, D).index_add_(0, index, torch.bmm(t.transpose(1, 2), d_l).view(-1, D))
        d_k.view(-1, D).index_add_(0, index, torch.bmm(d_t.transpose(1, 2), q_l).view(-1, D))
    rows = slice(step.r0, step.r1)
    torch.mul(job.existing(dq.view(-1, G, n, D), step), job.scale, out=d_q[g, :, rows])
    if grad_w is not None:
        d_w[g, :, rows] = job.existing((grad_w / job.ramp).view(-1, G, n), step)
