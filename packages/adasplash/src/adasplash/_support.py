"""The compact CPU path: only the keys that carry weight, as a ragged list that the backward reuses.

The threshold of any subset of the keys is a lower bound of the threshold of all. The maxima of
strided groups of keys are such a subset: whatever lies below their threshold has weight exactly 0.
The rest is gathered, solved and kept as (key, weight) per query. A tile with too many candidates
takes the dense path instead, so that the list stays O(N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels import qexp

# Dense from this share of candidates on (a backward pass gains more from the list than a forward
# pass), and below this number of keys.
MAX_SHARE, MAX_SHARE_FORWARD = 0.4, 0.2
MIN_KEYS = 256
_GROUP = 8


class Support(NamedTuple):
    """The rows of a tile: ``size`` entries each, one row after the other."""

    key: Tensor  # (entries,) int64, which row of the flattened (heads * n_k) keys
    p: Tensor  # (entries,) weights
    size: Tensor  # (rows,) int64

    @property
    def start(self) -> Tensor:
        return self.size.cumsum(0) - self.size

    def rows(self) -> Tensor:
        """(entries,) the row of each entry."""
        index = torch.arange(self.size.numel(), device=self.size.device)
        return index.repeat_interleave(self.size, output_size=self.key.numel())

    def padded(self, x: Tensor) -> Tensor:
        """(entries,) as (rows, longest), zeros behind."""
        longest = int(self.size.max())
        slot = torch.arange(x.numel(), device=x.device)
        first = torch.arange(self.size.numel(), device=x.device) * longest
        slot += (first - self.start).repeat_interleave(self.size, output_size=x.numel())
        out = x.new_zeros(self.size.numel() * longest).index_copy_(0, slot, x)
        return out.view(-1, longest)

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """sum over the entries of a row of weight * x[key]. x (heads, n_k, D) -> (rows, D)"""
        return F.embedding_bag(
            self.key, x.flatten(0, 1), self.start, mode="sum", per_sample_weights=weight
        )


class Bounds(NamedTuple):
    """What the maxima of groups of keys say of each row of scores."""

    flat: Tensor  # (rows, padded keys) scores
    top: Tensor  # (rows, 1) the largest score
    maxima: Tensor  # (rows, groups) of groups of keys, above `top`
    bound: Tensor  # (rows, 1) a lower bound of tau / s, above `top`


def bounds(scores: Tensor, s: float | Tensor) -> Bounds | None:
    """Bounds of the rows of (heads, rows, keys) scores; None if a largest score is not finite."""
    heads, n, m = scores.shape
    if m % _GROUP:
        scores = F.pad(scores, (0, _GROUP - m % _GROUP), value=-torch.inf)
    flat = scores.view(heads * n, -1)
    maxima = flat.unflatten(1, (_GROUP, -1)).amax(1)
    top = maxima.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):  # a NaN, or a query that sees nothing
        return None
    maxima.sub_(top)
    bound = lower_bound(maxima, s if isinstance(s, float) else s.reshape(-1, 1))
    return Bounds(flat, top, maxima, bound)


def solve(
    scores: Tensor,
    found: Bounds,
    s: float | Tensor,
    n_iter: int,
    first_key: int,
    n_k: int,
    max_share: float,
) -> tuple[Support, Tensor] | None:
    """Support and tau of the rows of (heads, rows, keys) scores; None if they are too dense.

    tau is that of scores less their largest, which has digits left for it however large they are.
    Key j of head h becomes row h * n_k + first_key + j of the flattened keys.
    """
    n = scores.shape[1]
    flat, top, maxima, bound = found
    width = maxima.shape[1]
    s_rows = s if isinstance(s, float) else s.reshape(-1, 1)
    hit = (maxima > bound).view(-1).nonzero().squeeze(1)
    if hit.numel() * _GROUP > max_share * flat.numel():
        return None
    row = torch.div(hit, width, rounding_mode="floor")
    # Column j of the maxima stands for keys j, j + width, ...
    steps = torch.arange(_GROUP, device=scores.device) * width
    place = ((hit + row * (flat.shape[1] - width)).unsqueeze(1) + steps).view(-1)
    value = flat.view(-1).index_select(0, place).view(-1, _GROUP)
    value.sub_(top.view(-1).index_select(0, row).unsqueeze(1))
    kept = (value > bound.view(-1).index_select(0, row).unsqueeze(1)).view(-1).nonzero().squeeze(1)
    row = row.index_select(0, torch.div(kept, _GROUP, rounding_mode="floor"))
    place, value = place.index_select(0, kept), value.view(-1).index_select(0, kept)
    count = torch.bincount(row, minlength=flat.shape[0])
    longest = int(count.max())
    if longest == 0 or longest * count.numel() > flat.numel() // 2:
        return None
    entry = torch.arange(row.numel(), device=row.device)
    slot = entry + (row * longest - (count.cumsum(0) - count).index_select(0, row))
    padded = flat.new_full((count.numel() * longest,), -torch.inf).index_copy_(0, slot, value)
    p, tau = qexp.normalize(padded.view(-1, longest), s_rows, n_iter)
    head = torch.div(row, n, rounding_mode="floor")
    key = place - row * flat.shape[1] + (head * n_k + first_key)
    return Support(key, p.view(-1).index_select(0, slot), count), tau


def lower_bound(x: Tensor, s: float | Tensor) -> Tensor:
    """A lower bound of tau / s for rows that contain x, with one rounding of slack. -> (rows, 1)

    For s >= 1/2 by the square instead of the power 1/s: a smaller exponent makes F smaller, too.
    """
    if (s if isinstance(s, float) else float(s.min())) < 0.5:
        _, tau = qexp.normalize(x, s, 4, divide=False)
        return (tau - 1e-5 * (1 + tau.abs())) / s
    top = x.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    v = (x - top).mul_(s)
    tau = torch.full_like(top, -1.0)
    u = torch.empty_like(v)
    for _ in range(3):
        torch.sub(v, tau, out=u).clamp_(min=0)
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        total = u.sum(-1, keepdim=True)
        tau = tau + (norm * norm - norm) / total.masked_fill_(total == 0, 1.0)
    return top + (tau - 1e-5) / s - 1e-6 * top.abs()


def backward(
    support: Support,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    s: float | Tensor,
    g_k: Tensor,
    g_v: Tensor,
    need_alpha: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dq, (if needed) ds, and d_scores of a tile; dk and dv are added to g_k and g_v."""
    p, key, row = support.p, support.key, support.rows()
    b_do = do.flatten(0, 1).index_select(0, row)
    dp = v.flatten(0, 1).index_select(0, key).mul_(b_do).sum(-1)
    if isinstance(s, float) and s == 0.5:
        u = p.sqrt()
    elif isinstance(s, float) and s == 1.0:
        u = (p > 0).to(p.dtype)
    else:
        s_entry = s if isinstance(s, float) else s.reshape(-1).index_select(0, row)
        tiny = torch.finfo(p.dtype).tiny
        u = p.clamp(min=tiny).log_().mul_(1 - s_entry).exp_().mul_(p > 0)
    rows = torch.zeros(2, support.size.numel(), dtype=p.dtype, device=p.device)
    rows[0].index_add_(0, row, u * dp)
    rows[1].index_add_(0, row, u)
    mean = rows[0] / rows[1].masked_fill(rows[1] == 0, 1.0)
    ds = None
    if need_alpha:
        s_rows = s if isinstance(s, float) else s.reshape(-1, 1)
        ds = qexp.backward_s(support.padded(dp), support.padded(p), s_rows)
    d_scores = u.mul_(dp.sub_(mean.index_select(0, row)))
    g_v.flatten(0, 1).index_add_(0, key, b_do.mul_(p.unsqueeze(1)))
    b_q = q.flatten(0, 1).index_select(0, row)
    g_k.flatten(0, 1).index_add_(0, key, b_q.mul_(d_scores.unsqueeze(1)))
    return support.times(k, d_scores), ds, d_scores
