"""Which tile pairs matter: one bit per (query tile, key tile), and the lists that kernels walk.

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


def causal(
    N_q: int, N_k: int, tile_q: int, tile_k: int, device: torch.device | str = "cpu"
) -> Tensor:
    """(T_q, T_k) bool: tile pairs with at least one key j <= i + N_k - N_q (aligned at the end)."""
    last_query = (
        torch.arange(1, n_tiles(N_q, tile_q) + 1, device=device).mul(tile_q).clamp(max=N_q) - 1
    )
    first_key = torch.arange(n_tiles(N_k, tile_k), device=device) * tile_k
    return first_key[None, :] <= last_query[:, None] + (N_k - N_q)


def from_mask(mask: Tensor, tile_q: int, tile_k: int) -> Tensor:
    """(..., N_q, N_k) bool -> (..., T_q, T_k) bool: tile pairs with at least one True."""
    *_, N_q, N_k = mask.shape
    T_q, T_k = n_tiles(N_q, tile_q), n_tiles(N_k, tile_k)
    padded = torch.nn.functional.pad(mask, (0, T_k * tile_k - N_k, 0, T_q * tile_q - N_q))
    return padded.unflatten(-1, (T_k, tile_k)).unflatten(-3, (T_q, tile_q)).any(-1).any(-2)


def to_lists(block_mask: Tensor) -> TileList:
    """(..., T_q, T_k) bool -> the key tiles of each query tile."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    offsets = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    flat = block_mask.flatten(-2)
    # A stable sort brings the wanted pairs to the front in row order.
    order = torch.argsort(~flat, dim=-1, stable=True)
    tiles = (
        (order % block_mask.shape[-1]).to(torch.int32) if flat.shape[-1] else order.to(torch.int32)
    )
    return TileList(offsets, tiles)


def transpose(block_mask: Tensor) -> Tensor:
    """The same pairs seen from the keys, for dk/dv."""
    return block_mask.transpose(-1, -2)


def density(block_mask: Tensor) -> Tensor:
    """Share of tile pairs that matter, over the last two dimensions."""
    return block_mask.float().mean((-1, -2))
