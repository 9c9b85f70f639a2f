"""Rows of queries in tiles, so that no more than a constant number of scores is held at once."""

from __future__ import annotations

import torch


def in_one_piece() -> bool:
    """Whether the program recorded now takes any length: it is not cut by that of its example."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def slices(n_rows: int, size: int, most: int) -> list[slice]:
    """Slices of rows that hold at most `most` numbers each, where a row has `size`."""
    height = max(1, most // max(1, size))
    return [slice(i, i + height) for i in range(0, n_rows, height)]


def row_tiles(n_rows: int, size: int, most: int) -> list[slice]:
    """`slices`, or all rows at once where they fit or a program is recorded."""
    # this comparison is all that torch.compile learns of a length that fits
    if in_one_piece() or most // max(1, size) >= n_rows:
        return [slice(0, n_rows)]
    return slices(n_rows, size, most)
