"""Attention over a band and gathered landmarks on CPU: chunks of queries, one matmul per product.

A hard window is the soft one with ramp 1 at an integer width, so one path serves both. Masks touch
only the columns where a window ends or the diagonal runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64  # queries per step, twice as many if the cache holds the scores of all heads then
CACHED = 1 << 18  # scores per step, so that they stay in the second-level cache
SAFE = 60.0  # no maximum is needed while |score * log2 e| stays below
LOG2E = 1.0 / math.log(2.0)
EMPTY = 1 << 40  # place of an empty landmark slot: behind every query


@dataclass(frozen=True)
class _Step:
    """Queries r0..r1 of the sequence that begins at ``start``: they see keys lo..hi; keys from
    ``full`` to the diagonal lie in the window of every one; they use ``n_lists`` lists."""

    start: int
    r0: int
    r1: int
    lo: int
    hi: int
    full: int
    first_list: int
    n_lists: int


class _Job:
    """The inputs in computing form: rows are (batch * kv head), G query heads in each."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Tensor,
        landmarks: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        ramp: float,
        block: int,
    ) -> None:
        B, self.H, self.n_q, self.D = q.shape
        self.H_kv, self.n_k = k.shape[1:3]
        self.rows, self.G = B * self.H_kv, self.H // self.H_kv
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scale, self.ramp, self.block = scale, ramp, block
        self.q = self.by_query(q)
        self.k, self.v = self.by_key(k), self.by_key(v)
        self.w = windows.to(self.dtype).reshape(self.rows, self.G, self.n_q)

        self.K = landmarks.shape[-1]
        n_lists = landmarks.shape[2] if landmarks.dim() == 4 else 1
        l = landmarks.reshape(self.rows, self.G, n_lists, self.K).to(torch.int64)
        row = torch.arange(self.rows)[:, None, None, None] * self.n_k
        self.flat_l = row + l.clamp(min=0)
        # an empty slot lies behind every query: its multiplier is 0
        self.l = torch.where(l < 0, EMPTY, l).to(self.dtype)
        self.bias = None
        if bias is not None:
            self.bias = bias.reshape(self.l.shape).to(self.dtype) * LOG2E
        self.steps = list(self._plan(cu_seqlens))
        low, high = self.w.aminmax() if self.w.numel() else (self.w.sum(),) * 2
        self.equal = bool(low == high)
        self.bounded = self._bounded()
        self._edges: dict[tuple[int, ...], Tensor] = {}

    def by_query(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(self.rows, self.G, self.n_q, x.shape[-1])

    def by_key(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(self.rows, self.n_k, self.D)

    def _bounded(self) -> bool:
        """Whether every score is finite and so small that exp2 needs no maximum subtracted."""
        if self.q.numel() == 0:
            return True
        q = torch.linalg.vector_norm(self.q, dim=-1).max()
        k = torch.linalg.vector_norm(self.k, dim=-1).max()
        bound = q * k * abs(self.scale) * LOG2E
        if self.bias is not None and self.bias.numel():
            bound = bound + self.bias.amax().clamp(min=0)
        return bool(bound <= SAFE) and bool(self.v.isfinite().all())

    def _plan(self, cu_seqlens: Tensor | None) -> Iterator[_Step]:
        before = self.n_k - self.n_q
        position = torch.arange(before, self.n_k, dtype=torch.float64)
        if not self.n_q or not self.rows:
            return
        w = self.w.double()
        # a step costs the same time for its many small calls, however few queries it has
        widest = min(float(w.max()) + self.ramp, self.n_k) + 2 * CHUNK + self.K
        few = self.rows * self.G * 2 * CHUNK * widest <= CACHED
        self.chunk = 2 * CHUNK if few else CHUNK
        reach = (position - w.amax((0, 1)) - self.ramp).tolist()
        inside = (position - w.amin((0, 1))).tolist()
        bounds = [0, self.n_k] if cu_seqlens is None else cu_seqlens.tolist()
        for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            first = 0
            if self.block:
                first = -(before // self.block) if cu_seqlens is None else start // self.block + s
            for p0, p1, c, n_lists in self._spans(max(start, before), start, stop):
                r0, r1 = p0 - before, p1 - before
                lo = max(start, math.floor(min(reach[r0:r1])) + 1)
                full = min(max(math.ceil(max(inside[r0:r1])), lo), p1)
                yield _Step(start, r0, r1, lo, p1, full, first + c, n_lists)

    def _spans(self, p: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut positions p..stop into steps of whole blocks, or of parts of one block."""
        C = self.block
        while p < stop:
            c, n_lists, end = 0, 1, min(stop, p + self.chunk)
            if C:
                c = (p - start) // C
                whole = min(self.chunk, stop - p) // C if (p - start) % C == 0 else 0
                end = p + whole * C if whole else min(end, start + (c + 1) * C)
                n_lists = max(1, whole)
            yield p, end, c, n_lists
            p = end

    def groups(self, step: _Step) -> Iterator[slice]:
        size = self.G * (step.r1 - step.r0) * (step.hi - step.lo + self.K)
        each = max(1, CACHED // max(1, size))
        each = -(-self.rows // -(-self.rows // each))
        for a in range(0, self.rows, each):
            yield slice(a, min(self.rows, a + each))

    def window_edge(self, step: _Step, g: slice) -> Tensor | None:
        """m of the columns lo..full, (rows or 1, n, full - lo); None when there are none."""
        width, n = step.full - step.lo, step.r1 - step.r0
        if width == 0:
            return None
        key = (step.r0 + self.n_k - self.n_q - step.lo, n, width)
        if self.equal and key in self._edges:
            return self._edges[key]
        # (R + w - d) / R, every term counted from lo so that its digits go to the fraction
        place = torch.arange(key[0], key[0] + n, dtype=self.dtype)[:, None]
        if self.equal:
            ends = self.w[0, 0, :1] + self.ramp - place
        else:
            w = self.w[g, :, step.r0 : step.r1].reshape(-1, n, 1)
            ends = w + self.ramp - place
        m = (ends + torch.arange(width, dtype=self.dtype)).clamp_(0, self.ramp)
        if self.ramp != 1:
            m.div_(self.ramp)  # not times 1 / R: a full window must give 1
        if self.equal:
            m = m[None]
            if len(self._edges) < 16:
                self._edges[key] = m
        return m

    def landmark_factor(self, step: _Step, g: slice) -> Tensor:
        """1 - m of the landmarks: clamp((d - w) / R, 0, 1), (rows * n_lists, n / n_lists, K)."""
        n = step.r1 - step.r0
        first = self.n_k - self.n_q + step.r0 - step.lo
        place = torch.arange(first, first + n, dtype=self.dtype)
        starts = place - self.w[g, :, step.r0 : step.r1]
        starts = starts.reshape(-1, n // step.n_lists, 1)
        l = self.lists(self.l, step, g).reshape(-1, 1, self.K)
        if step.start:  # packed: landmarks of earlier sequences are empty slots too
            l = torch.where(l < step.start, EMPTY, l)
        l = l - step.lo
        u = (starts - l).clamp_(0, self.ramp)
        return u if self.ramp == 1 else u.div_(self.ramp)

    def lists(self, x: Tensor, step: _Step, g: slice) -> Tensor:
        if not self.block:
            return x[g]
        return x[g, :, step.first_list : step.first_list + step.n_lists]

    def gather(self, x: Tensor, step: _Step, g: slice) -> Tensor:
        """x (rows, n_k, D) at the landmarks: (rows * n_lists, K, D)."""
        index = self.lists(self.flat_l, step, g).reshape(-1)
        return x.reshape(-1, self.D).index_select(0, index).view(-1, self.K, self.D)

    def landmark_scores(self, q: Tensor, l_k: Tensor, step: _Step, g: slice) -> Tensor:
        if self.bias is None:
            return torch.bmm(q, l_k.transpose(1, 2))
        b = self.lists(self.bias, step, g).reshape(-1, 1, self.K)
        return torch.baddbmm(b, q, l_k.transpose(1, 2))

    def split(self, x: Tensor, step: _Step) -> Tensor:
        """(rows, G * n, D) by landmark list: (rows * G * n_lists, n / n_lists, D)."""
        return x.reshape(-1, (step.r1 - step.r0) // step.n_lists, x.shape[-1])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    landmarks: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    ramp: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D) and log-sum-exp (B, H, N_q), the latter to the base 2."""
    with torch.autocast("cpu", enabled=False):
        job = _Job(q, k, v, windows, landmarks, bias, cu_seqlens, scale, ramp, block)
        return _forward(job, q)


def _forward(job: _Job, q: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(job.q.shape, dtype=job.dtype)
    lse = torch.empty(job.q.shape[:-1], dtype=job.dtype)
    for step in job.steps:
        for g in job.groups(step):
            _forward_step(job, step, g, out, lse)
    shape = q.shape
    return out.view(shape).to(q.dtype), lse.view(shape[:-1])


def _forward_step(job: _Job, step: _Step, g: slice, out: Tensor, lse: Tensor) -> None:
    n = step.r1 - step.r0
    rows = slice(step.r0, step.r1)
    q = (job.q[g, :, rows] * (job.scale * LOG2E)).reshape(-1, job.G * n, job.D)
    keys, values = job.k[g, step.lo : step.hi], job.v[g, step.lo : step.hi]
    s = torch.bmm(q, keys.transpose(1, 2))  # [rows, G * n, W]
    s_head = s.view(-1, n, step.hi - step.lo)  # [rows * G, n, W]
    m = job.window_edge(step, g)
    t = u = None
    if job.K:
        l_k, l_v = job.gather(job.k, step, g), job.gather(job.v, step, g)
        t = job.landmark_scores(job.split(q, step), l_k, step, g)
        u = job.landmark_factor(step, g)
    top = None
    if not job.bounded:
        _drop(s_head, m, t, u)
        top = s_head.amax(-1, keepdim=True)
        if t is not None:
            top = torch.maximum(top, t.view(*top.shape[:2], job.K).amax(-1, keepdim=True))
        s_head.sub_(top)
    s.exp2_()
    s_head[..., -n:].tril_()
    if m is not None:
        s_head[..., : m.shape[-1]].mul_(m)
    z = s_head.sum(-1, keepdim=True)
    if t is not None and u is not None:
        if top is not None:
            t.sub_(top.view(-1, t.shape[1], 1))
        t.exp2_().mul_(u)
        z = z + t.sum(-1).view(z.shape)
    if not job.bounded:
        values = _finite(values)
    o = torch.bmm(s, values)
    if t is not None:
        job.split(o, step).baddbmm_(t, l_v if job.bounded else _finite(l_v))
    o = o.view(-1, n, job.D).div_(z)
    if not job.bounded:
        _spread_nan(job, step, g, s, t, o)
    out[g, :, rows] = o.view(-1, job.G, n, job.D)
    z = z.log2_()
    lse[g, :, rows] = (z if top is None else z + top).view(-1, job.G, n)


def _drop(s: Tensor, m: Tensor | None, t: Tensor | None, u: Tensor | None) -> None:
    """-inf at every score that is not attended, so that no maximum and no NaN comes from it."""
    n = s.shape[1]
    s[..., -n:].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu_(1), float("-inf"))
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
    hit = torch.bmm((s > 0).to(job.dtype), bad[g, step.lo : step.hi])
    if t is not None:
        index = job.lists(job.flat_l, step, g).reshape(-1)
        l_bad = bad.reshape(-1, 1).index_select(0, index).view(-1, job.K, 1)
        job.split(hit, step).baddbmm_((t > 0).to(job.dtype), l_bad)
    o.masked_fill_(hit.view(*o.shape[:2], 1) > 0, float("nan"))


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    landmarks: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    ramp: float,
    block: int,
    with_windows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, windows and bias (the last two empty where nothing asks for them)."""
    with torch.autocast("cpu", enabled=False):
        job = _Job(q, k, v, windows, landmarks, bias, cu_seqlens, scale, ramp, block)
        d_q, d_k, d_v, d_w, d_b = _backward(job, d_out, out, lse, with_windows)
    return (
        d_q.view(q.shape).to(q.dtype),
        d_k.view(k.shape).to(k.dtype),
        d_v.view(v.shape).to(v.dtype),
        d_w.view(windows.shape).to(windows.dtype) if with_windows else d_w,
        d_b if bias is None else d_b.view(bias.shape).to(bias.dtype),
    )


def _backward(
    job: _Job, d_out: Tensor, out: Tensor, lse: Tensor, with_windows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_o = job.by_query(d_out)
    delta = torch.linalg.vecdot(d_o, job.by_query(out))
    d_q = torch.empty(job.q.shape, dtype=job.dtype)
    d_k, d_v = (torch.zeros(job.k.shape, dtype=job.dtype) for _ in range(2))
    d_w = torch.zeros(job.w.shape if with_windows else (0,), dtype=job.dtype)
    d_b = torch.zeros((0,) if job.bias is None else job.l.shape, dtype=job.dtype)
    lse = lse.view(delta.shape)
    for step in job.steps:
        for g in job.groups(step):
            _backward_step(job, step, g, d_o, delta, lse, d_q, d_k, d_v, d_w, d_b)
    # keys were multiplied with q * scale * log2 e
    return d_q, d_k.mul_(1 / LOG2E), d_v, d_w, d_b


def _backward_step(
    job: _Job,
    step: _Step,
    g: slice,
    d_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_w: Tensor,
    d_b: Tensor,
) -> None:
    n, G, D = step.r1 - step.r0, job.G, job.D
    rows, cols = slice(step.r0, step.r1), slice(step.lo, step.hi)
    q = (job.q[g, :, rows] * (job.scale * LOG2E)).reshape(-1, G * n, D)
    d_o = d_out[g, :, rows].reshape(-1, G * n, D)
    row_lse, row_delta = lse[g, :, rows].reshape(-1, n, 1), delta[g, :, rows].reshape(-1, n, 1)
    keys, values = job.k[g, cols], job.v[g, cols]
    s = torch.bmm(q, keys.transpose(1, 2))
    s_head = s.view(-1, n, step.hi - step.lo)
    m = job.window_edge(step, g)
    t = u = None
    if job.K:
        l_k, l_v = job.gather(job.k, step, g), job.gather(job.v, step, g)
        t = job.landmark_scores(job.split(q, step), l_k, step, g)
        u = job.landmark_factor(step, g)
    if not job.bounded:
        _drop(s_head, m, t, u)
    s_head.sub_(row_lse).exp2_()[..., -n:].tril_()
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
    d_v[g, cols].baddbmm_(s.transpose(1, 2), d_o)
    dq = torch.bmm(d_s, keys)
    d_k[g, cols].baddbmm_(d_s.transpose(1, 2), q)
    if t is not None and u is not None:
        q_l, d_l = job.split(q, step), job.split(d_o, step)
        t.sub_(job.split(row_lse, step)).exp2_()
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
            part = job.lists(d_b, step, g)
            part += d_t.sum(1).view(part.shape)
        job.split(dq, step).baddbmm_(d_t, l_k)
        index = job.lists(job.flat_l, step, g).reshape(-1)
        d_v.view(-1, D).index_add_(0, index, torch.bmm(t.transpose(1, 2), d_l).view(-1, D))
        d_k.view(-1, D).index_add_(0, index, torch.bmm(d_t.transpose(1, 2), q_l).view(-1, D))
    torch.mul(dq.view(-1, G, n, D), job.scale, out=d_q[g, :, rows])
    if grad_w is not None:
        d_w[g, :, rows] = (grad_w / job.ramp).view(-1, G, n)
