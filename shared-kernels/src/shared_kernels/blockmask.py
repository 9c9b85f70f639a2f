"""Which pairs of tiles matter, and the lists of them that kernels walk.

A list is CSR at fixed capacity: ``offsets`` (..., T_q + 1) and ``tiles`` (..., T_q * T_k) int32, of
which the first ``offsets[..., -1]`` entries count. Everything is built on the device, without a
host synchronisation, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileList(NamedTuple):
    """Key tiles of each query tile: ``tiles[..., offsets[i] : offsets[i + 1]]``, ascending."""

    offsets: Tensor
    tiles: Tensor


def n_tiles(n: int, tile: int) -> int:
    return -(-n // tile)


def to_lists(block_mask: Tensor) -> TileList:
    """(..., T_q, T_k) bool -> the key tiles of each query tile."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    offsets = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    # A stable sort brings the wanted pairs to the front in row order.
    tiles = torch.argsort(~block_mask.flatten(-2), dim=-1, stable=True)
    return TileList(offsets, (tiles % max(block_mask.shape[-1], 1)).to(torch.int32))
