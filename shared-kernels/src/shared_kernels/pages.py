"""Pages of keys with bounds: which of them can hold a key whose sparse weight is above 0.

The coordinate-wise minimum and maximum of the keys of a page bound q . k from above for each of
its keys. The threshold of any subset of a row's keys is a lower bound of the row's threshold. So
pages are visited in falling order of their bound, and as soon as the next bound is at most the
threshold of what was read, every key that was not read has weight 0: a proof, not an estimate.

Rounding cannot break that proof. A dot product of length D in any order of summation, fused or not,
errs by at most D eps sum |q_i k_i|. Each key enters the minimum and the maximum moved outwards by
:func:`margin` times its magnitude, which is more than the error of a key's score and the error of
the bound taken together; so a computed bound is never below a computed score. The threshold is
lowered by what its solver may err by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Certified",
    "bounds_of",
    "certify",
    "corners",
    "empty_bounds",
    "margin",
    "outwards",
    "weighted",
]

# How far below its computed value a threshold (in units of s * score) may lie.
_TAU_ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}
# The first round reads pages with this many keys in all, and at least so many pages; a later round
# reads at most _GROWTH times the pages that were read before it.
_MIN_KEYS, _MIN_PAGES, _GROWTH = 512, 4, 4
# Pages are gathered up to the first share of all pages. If after the first round more than the
# second share is needed, there is no second round.
_MAX_GATHERED, _MAX_NEEDED = 0.25, 0.5


def margin(head_dim: int, dtype: torch.dtype) -> float:
    """By how much of its magnitude a coordinate is moved outwards.

    The score errs by head_dim roundings and the bound by twice as many; the factor 2 is for matrix
    units that truncate instead of rounding, 8 for the factors before and after the product.
    """
    return 2 * (3 * head_dim + 8) * torch.finfo(dtype).eps / 2


def outwards(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (..., D), moved down and up by their margin, in fp32 (fp64 for fp64)."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    by = wide.abs().mul_(margin(keys.shape[-1], wide.dtype))
    return wide - by, by.add_(wide)


def empty_bounds(*shape: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bounds (*shape, 2 D) of pages without a key: maximum -inf, minimum inf."""
    bounds = torch.full((*shape, 2 * head_dim), -torch.inf, dtype=dtype, device=device)
    bounds[..., head_dim:] = torch.inf
    return bounds


def bounds_of(keys: Tensor) -> Tensor:
    """Bounds of whole pages: keys (..., size, D) -> (..., 2 D), the maximum and then the minimum.

    A NaN in a page makes its bound NaN, which rules nothing out.

    Example:
        >>> bounds_of(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).round(decimals=3)
        tensor([ 3.,  0.,  1., -2.])
    """
    low, high = outwards(keys)
    return torch.cat((high.amax(-2), low.amin(-2)), -1)


def corners(q: Tensor) -> Tensor:
    """Queries (..., D) -> (..., 2 D), whose product with a page's bounds is its upper bound.

    max over the box of q . k takes the maximum where q_i > 0 and the minimum where q_i < 0.
    """
    return torch.cat((q.clamp(min=0), q.clamp(max=0)), -1)


class Certified(NamedTuple):
    """What :func:`certify` found.

    Fields:
        weights: (heads, R, pages * size), the weights of the keys that were read.
        pages: (heads, read), which pages were read, best bound first.
        is_dense: (heads,), whose bounds do not separate; what is said of the others holds.
    """

    weights: Tensor
    pages: Tensor
    is_dense: Tensor


def certify(
    upper: Tensor,
    s: float | Tensor,
    size: int,
    read: Callable[[Tensor], Tensor],
    solve: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Certified:
    """Read pages in falling order of their bound until the rest is proven to weigh 0.

    Args:
        upper: (heads, R, P) upper bounds of the scores of a page for R rows that read together;
            -inf where a row sees no key of the page, NaN where nothing is known.
        s: the solver's s > 0, a float or (heads, R, 1).
        size: how many keys a page has.
        read: function of pages (heads, n) that gives scores (heads, R, n * size) in fp32 or fp64,
            -inf where hidden.
        solve: function of such scores that gives weights and tau as ``qexp.normalize`` does. It
            may add scores of its own, as of a sink, that raise tau.

    Returns:
        :class:`Certified`. A row with a NaN among what it sees gets NaN weights.
    """
    P = upper.shape[-1]
    first = max(_MIN_PAGES, _MIN_KEYS // size)
    pages = upper.amax(1).topk(min(first, P)).indices  # a NaN, where there is one, comes first
    scores = read(pages)
    largest, error = torch.finfo(scores.dtype).max, _TAU_ERROR[scores.dtype]
    while True:
        weights, tau = solve(scores)
        threshold = (tau - error) / s
        threshold -= threshold.abs() * (4 * torch.finfo(scores.dtype).eps)
        # A row whose keys so far are all hidden knows nothing yet; a row with a NaN is settled.
        threshold.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, -largest)
        lead = (upper - threshold.nan_to_num_(largest)).nan_to_num_(torch.inf).amax(1)
        lead.clamp_(min=-largest).scatter_(1, pages, -torch.inf)
        left, n_read = (lead > 0).sum(1), pages.shape[1]
        allowed = _MAX_GATHERED * P - n_read if n_read > first else _MAX_NEEDED * P
        is_dense = left > allowed
        most = int(left.masked_fill_(is_dense, 0).max())
        if most == 0:
            return Certified(weights, pages, is_dense)
        more = lead.topk(min(most, _GROWTH * n_read)).indices
        pages, scores = torch.cat((pages, more), 1), torch.cat((scores, read(more)), -1)


def weighted(weights: Tensor, pages: Tensor, values: Tensor) -> Tensor:
    """sum of weight * value over what was read; only values with a weight are touched.

    Args:
        weights: (heads, R, n * size).
        pages: (heads, n), where those pages lie in ``values``.
        values: (pages, size, D_v).

    Returns:
        (heads, R, D_v) in the dtype of the weights.
    """
    heads, n_rows, _ = weights.shape
    size, D_v = values.shape[1:]
    flat = weights.flatten(0, 1)
    row, column = flat.nonzero().unbind(1)
    slot = torch.div(column, size, rounding_mode="floor")
    head = torch.div(row, n_rows, rounding_mode="floor")
    key = pages[head, slot].mul_(size).add_(column - slot * size)
    table = values.flatten(0, 1)
    if table.dtype != weights.dtype:
        table = table.index_select(0, key).to(weights.dtype)
        key = torch.arange(len(key), device=key.device)
    start = torch.searchsorted(row, torch.arange(heads * n_rows, device=row.device))
    o = F.embedding_bag(key, table, start, mode="sum", per_sample_weights=flat[row, column])
    return o.view(heads, n_rows, D_v)
