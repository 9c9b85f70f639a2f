"""Strided groups of a row's entries, and ragged rows side by side in a rectangle.

Group j of a row of N entries, N a multiple of ``group``, holds the entries j, j + width,
j + 2 width, ... with width = N / group. Where the maximum of a group is too small to matter, none
of its entries does: a look at the maxima finds the few entries of a sparse row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def padded(x: Tensor, group: int) -> Tensor:
    """Rows (..., N) filled up with -inf to whole groups."""
    missing = -x.shape[-1] % group
    return torch.nn.functional.pad(x, (0, missing), value=-math.inf) if missing else x


def maxima(x: Tensor, group: int) -> Tensor:
    """Rows (n, N) of whole groups -> (n, N / group), the largest entry of each group."""
    largest: Tensor = x.unflatten(1, (group, x.shape[1] // group)).amax(1)
    return largest


def members(hit: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The entries of the groups that are hit.

    Args:
        hit: (n, N / group), bool.

    Returns:
        row: (hits,) int64, the row of each group that is hit, ascending.
        flat: (hits, group), where its entries lie in the flattened (n * N) rows; int32 where that
            is enough, int64 beyond.

    Example:
        >>> import torch
        >>> row, flat = members(torch.tensor([[False, True], [True, False]]), group=3)
        >>> row.tolist(), flat.tolist()
        ([0, 1], [[1, 3, 5], [6, 8, 10]])
    """
    width, length = hit.shape[1], hit.shape[1] * group
    index = torch.int32 if hit.numel() * group < 2**31 else torch.int64
    place = hit.view(-1).nonzero().squeeze(1)
    row = torch.div(place, width, rounding_mode="floor")
    first = (place + row * (length - width)).to(index).unsqueeze(1)
    return row, first + torch.arange(group, dtype=index, device=hit.device) * width


def shifts(count: Tensor, longest: int) -> Tensor:
    """How far each row's entries move from a list, one row after the other, into a rectangle.

    Entry e of row r, with ``count[r]`` entries, has slot e + shifts[r] of the flattened
    (rows, longest) rectangle.

    Example:
        >>> import torch
        >>> count, row = torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2])
        >>> (torch.arange(3) + shifts(count, 4)[row]).tolist()
        [0, 1, 8]
    """
    rows = torch.arange(count.numel(), device=count.device)
    return rows * longest - (count.cumsum(0) - count)
