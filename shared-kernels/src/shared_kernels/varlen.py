"""Sequences of different lengths: padded batches, packed rows, and the offsets between them.

``lengths`` is (B,), the true lengths of right-padded rows; ``cu_seqlens`` is (B+1,) int32: row
``cu_seqlens[b]`` of a packed tensor is the first token of sequence b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def check_lengths(lengths: Tensor, B: int, N: int, name: str = "varlen") -> None:
    """``lengths`` must be an integer tensor of shape (B,) with values in [0, N]."""
    checks.tensor(name, lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        checks.fail(name, "be an integer tensor of lengths", f"dtype {lengths.dtype}")
    checks.shape(name, lengths, (B,), f"(B={B},)")
    if checks.reads_values(lengths) and B:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > N:
            checks.fail(name, f"lie in [0, N={N}]", f"values in [{low}, {high}]")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, name: str = "cu_seqlens") -> None:
    """``cu_seqlens`` must be int32 (B+1,), start at 0, never fall, and end at ``total``."""
    checks.tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        checks.fail(name, "be an int32 tensor of shape (B+1,)", got)
    if checks.reads_values(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != total or any(cu_seqlens.diff() < 0):
            checks.fail(name, f"start at 0, never fall and end at {total}", values)


def lengths_to_cu_seqlens(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B+1,) int32 offsets."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def cu_seqlens_to_lengths(cu_seqlens: Tensor) -> Tensor:
    """(B+1,) offsets -> (B,) lengths."""
    return cu_seqlens.diff()


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: the sequence that each packed row belongs to."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def padding_mask(lengths: Tensor, N: int) -> Tensor:
    """(B, N) bool, True where there is a token."""
    return torch.arange(N, device=lengths.device) < lengths[:, None]


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, N, ...) right-padded -> (total, ...) packed."""
    return x[padding_mask(lengths, x.shape[1])]


def unpack(x: Tensor, lengths: Tensor, N: int) -> Tensor:
    """(total, ...) packed -> (B, N, ...) padded with zeros."""
    out = x.new_zeros((lengths.shape[0], N, *x.shape[1:]))
    return out.masked_scatter(
        padding_mask(lengths, N).view(-1, N, *(1,) * (x.dim() - 1)).expand_as(out), x
    )
