"""Exact sparse retrieval that reads only the patterns that can matter."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, ops, pages, qexp

from . import _attention, _separation

# Queries at once: so many bounds of pages fit where they are looked at again.
_QUERIES = 64
# Power iterations at each bisection: any direction is right, a wide one is better.
_POWER_STEPS = 4
_S = {"entmax15": 0.5, "sparsemax": 1.0}


class Reading(NamedTuple):
    """One update by :meth:`PatternPages.update`: states (L, d), and pages read of each, (L,)."""

    patterns: Tensor
    pages_read: Tensor


class PatternPages:
    """Patterns in pages of neighbours, with bounds that say which pages a query must read.

    Recursive bisection at the median along the direction of largest variance puts patterns that are
    alike into one page. By Cauchy and Schwarz the mean c of a page and the distance r of its
    farthest pattern bound the scores of its patterns, beta (xi . c + |xi| r), and the threshold of
    the patterns read so far bounds the threshold from below: reading stops when the next bound is
    at most that, and what was not read has weight 0. r is enlarged by what rounding can do.

    It pays for patterns that fill few dimensions, as a smooth surface does. Where balls do not
    separate (independent random patterns in many dimensions) everything is read. Queries that are
    updated together read as many pages each as the one that needs the most, 64 at a time.

    Args:
        memory: stored patterns (N, d), floating point; kept as a copy in the order of the pages.
        page_size: the most patterns of a page.

    Attributes:
        order: (pages, slots), which pattern lies where; -1 where there is none.
        n_patterns: N.
        longest: () the length of the longest pattern, in fp32 (fp64 for fp64); 0 without one.

    Example:
        >>> memory = torch.nn.functional.normalize(torch.randn(5000, 16), dim=-1)
        >>> held = PatternPages(memory)
        >>> reading = held.update(memory[:2], beta=32.0, separation="sparsemax")
        >>> bool((reading.pages_read <= len(held.order)).all())
        True
    """

    def __init__(self, memory: Tensor, page_size: int = 64) -> None:
        checks.floating("memory", memory)
        checks.shape("memory", memory, (None, None), "(N, d)")
        checks.positive_int("page_size", page_size)
        if ops.wants_gradient(memory):
            hint = "pages keep numbers: make them under torch.no_grad(), or detach"
            checks.fail("memory", "need no gradient", "requires_grad=True", hint)
        self.n_patterns, self.d = memory.shape
        memory = memory.detach()
        lengths = torch.linalg.vector_norm(memory, dim=-1, dtype=_wide(memory.dtype))
        self.longest = lengths.amax() if self.n_patterns else lengths.sum()
        self.order = _bisected(memory, page_size)
        is_there = self.order >= 0
        if self.n_patterns:
            self.patterns = memory[self.order.clamp(min=0)]
        else:
            self.patterns = memory.new_zeros(*self.order.shape, self.d)
        self._is_empty = ~is_there.any(1)
        self._balls = _balls(self.patterns, is_there)

    def update(self, query: Tensor, beta: float = 1.0, separation: str = "entmax15") -> Reading:
        """One step xi <- M^T separation(beta M xi) of queries (L, d).

        Args:
            query: states (L, d) in the dtype of the memory.
            beta: inverse temperature.
            separation: "entmax15" or "sparsemax": softmax gives no pattern the weight 0.
        """
        checks.in_set("separation", separation, tuple(_S))
        checks.floating("query", query)
        checks.shape("query", query, (None, self.d), lambda: f"(L, d={self.d})")
        checks.same_dtype(memory=self.patterns, query=query)
        checks.same_device(memory=self.patterns, query=query)
        if ops.wants_gradient(query):
            hint = "call it under torch.no_grad(), or retrieve with certified=False"
            checks.fail("query", "need no gradient", "requires_grad=True", hint)
        made = query.new_empty(query.shape)
        n_read = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        with torch.no_grad():
            for at in range(0, len(query), _QUERIES):
                part = slice(at, at + _QUERIES)
                made[part], n_read[part] = self._update(query[part], beta, separation)
        return Reading(made, n_read)

    def _update(self, query: Tensor, beta: float, separation: str) -> tuple[Tensor, Tensor]:
        s, (n_pages, slots) = _S[separation], self.order.shape
        if self.n_patterns == 0:
            return torch.zeros_like(query), query.new_zeros(len(query), dtype=torch.int64)
        q = query.to(self._balls.dtype) * beta
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        upper = (torch.cat((q, length), -1) @ self._balls.mT).masked_fill_(
            self._is_empty, -torch.inf
        )
        flat = self.patterns.flatten(1)

        def read(which: Tensor) -> Tensor:
            k = flat.index_select(0, which.reshape(-1)).view(len(q), -1, self.d).to(q.dtype)
            scores = torch.bmm(q.unsqueeze(1), k.mT)
            hidden = self.order[which].flatten(1).unsqueeze(1) < 0
            return scores.masked_fill_(hidden, -torch.inf)

        found = pages.certify(upper.unsqueeze(1), s, slots, read, lambda x: qexp.normalize(x, s))
        made = pages.weighted(found.weights, found.pages, self.patterns)[:, 0].to(query.dtype)
        n_read = torch.full((len(q),), found.pages.shape[1], device=q.device)
        n_read.masked_fill_(found.is_dense, n_pages)
        dense = found.is_dense.nonzero().squeeze(1)
        if len(dense):
            rule = _attention.Rule(beta, _separation.resolve(separation).normalizer)
            k = self.patterns[self.order >= 0].to(q.dtype)[None, None]
            state = query[dense].to(q.dtype)[None, None]
            made[dense] = _attention.attend(state, k, k, None, rule)[0, 0].to(query.dtype)
        return made, n_read


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _balls(patterns: Tensor, is_there: Tensor) -> Tensor:
    """Mean and enlarged radius (pages, d + 1) of pages (pages, slots, d), in fp32 or fp64.

    A score errs by up to margin * |xi| |x|, a bound by as much of |xi| (|c| + r), and |x| is at
    most |c| + r: the radius grows by twice the margin of that sum.
    """
    x = patterns.to(_wide(patterns.dtype))
    weight = is_there[..., None].to(x.dtype)
    centre = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
    far = torch.linalg.vector_norm(x - centre[:, None], dim=-1).masked_fill_(~is_there, 0.0)
    radius = far.amax(1, keepdim=True)
    whole = torch.linalg.vector_norm(centre, dim=-1, keepdim=True) + radius
    by = 2 * pages.margin(x.shape[-1] + 1, x.dtype)
    return torch.cat((centre, radius + by * whole), -1)


def _bisected(memory: Tensor, page_size: int) -> Tensor:
    """(pages, slots) indices of patterns, alike ones together, absent ones (-1) behind."""
    N, d = memory.shape
    levels = max(0, math.ceil(math.log2(max(1, N) / page_size)))
    slots = max(1, -(-N // 2**levels))
    order = torch.full((2**levels * slots,), -1, dtype=torch.int64, device=memory.device)
    order[:N] = torch.arange(N, device=memory.device)
    groups = order.view(1, -1)
    for _ in range(levels):
        is_there = groups >= 0
        x = memory[groups.clamp(min=0)].to(_wide(memory.dtype))
        x.sub_(
            (x * is_there[..., None]).sum(1, keepdim=True)
            / is_there.sum(1)[:, None, None].clamp(min=1)
        )
        x.masked_fill_(~is_there[..., None], 0.0)
        axis = torch.ones(len(x), d, 1, dtype=x.dtype, device=x.device)
        for _ in range(_POWER_STEPS):  # towards the leading eigenvector of the covariance
            axis = torch.nn.functional.normalize(x.mT @ (x @ axis), dim=1)
        # a stable sort, absent ones last: what is equal stays in order
        along = (x @ axis).squeeze(2).masked_fill_(~is_there, torch.inf)
        groups = groups.gather(1, along.sort(dim=1, stable=True).indices)
        groups = groups.view(2 * groups.shape[0], -1)
    return groups
