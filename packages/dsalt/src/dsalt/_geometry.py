"""Which sequence, which keys and which list of landmarks belong to a query."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import packed


def n_lists(n_q: int, n_k: int, block: int, cu_seqlens: Tensor | None) -> int:
    """How many lists of landmarks the queries need: one per block that they touch."""
    if cu_seqlens is not None:
        return n_k // block + cu_seqlens.shape[0] - 1
    return -(-n_k // block) - (n_k - n_q) // block if n_q else 0


def first_lists(cu_seqlens: Tensor, block: int) -> Tensor:
    """The list of the first block of each packed sequence, and the end, (S + 1,) int64.

    Sequence s, which begins at token b, has the lists from b // block + s on.
    """
    bounds = cu_seqlens.to(torch.int64)
    return bounds // block + torch.arange(bounds.shape[0], device=bounds.device)


def sequence_starts(n: int, cu_seqlens: Tensor) -> Tensor:
    """First token of the sequence that each of n packed tokens belongs to, (n,) int64."""
    return cu_seqlens.to(torch.int64)[packed.segment_ids(cu_seqlens, n)]


def row_lists(
    n_q: int, n_k: int, block: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First visible key and landmark list of each query row, (N_q,) int64 each.

    Queries are the last N_q of N_k tokens. Without ``block`` there is one list for all of them.
    """
    row = torch.arange(n_k - n_q, n_k, device=device)
    if cu_seqlens is None:
        zero = torch.zeros_like(row)
        return zero, row // block - (n_k - n_q) // block if block else zero
    start = sequence_starts(n_k, cu_seqlens)
    if not block:
        return start, torch.zeros_like(row)
    first = first_lists(cu_seqlens, block)[packed.segment_ids(cu_seqlens, n_k)]
    return start, first + (row - start) // block


def unique_landmarks(landmark_idx: Tensor, n_k: int) -> Tensor:
    """Landmarks as int32 with -1 for what is out of range or named by an earlier slot."""
    l = landmark_idx.to(torch.int64)
    l = torch.where((l >= 0) & (l < n_k), l, -1)
    ordered, slot = l.sort(dim=-1, stable=True)
    again = torch.zeros_like(l, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return l.masked_fill(torch.zeros_like(again).scatter(-1, slot, again), -1).to(torch.int32)
