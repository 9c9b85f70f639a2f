"""Sequences of different lengths that are packed into one row of N tokens.

``cu_seqlens`` is an integer tensor of shape (sequences + 1,): the tokens of sequence b are
``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``. There is one rule for it in every package: it starts
at 0, never falls, and ends at N, so that each token belongs to exactly one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks


def check(
    cu_seqlens: Any, N: int, name: str = "cu_seqlens", *, B: int = 1, N_q: int | None = None
) -> None:
    """Refuse offsets that do not divide N tokens into sequences.

    The values are read only where that costs nothing: on CPU tensors, outside compile and vmap.

    Args:
        cu_seqlens: integer, shape (sequences + 1,).
        N: the number of packed tokens (of keys).
        name: how the caller's argument is called, for the messages.
        B: the batch size of the packed tensor, which must be 1.
        N_q: the number of queries, which must be N; None: there are none.

    Raises:
        TypeError: ``cu_seqlens`` is not an integer tensor.
        ValueError: the shape, the batch size, the number of queries or the values are wrong.

    Example:
        >>> import torch
        >>> check(torch.tensor([0, 3, 5]), 5)
        >>> check(torch.tensor([0, 3]), 5)
        Traceback (most recent call last):
            ...
        ValueError: `cu_seqlens` must start at 0, never fall and end at N=5, got [0, 3]; every \
token belongs to one sequence: give the tokens of padding a sequence of their own, or leave them out
    """
    checks.integer(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        checks.fail(name, "have shape (sequences + 1,)", tuple(cu_seqlens.shape))
    if B != 1:
        checks.fail(name, "come with a batch of one packed row", f"B={B}")
    if N_q is not None and N_q != N:
        checks.fail(name, "come with as many queries as keys", f"N_q={N_q} and N_k={N}")
    if checks.reads_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        falls = any(a > b for a, b in zip(ends, ends[1:], strict=False))
        if ends[0] != 0 or ends[-1] != N or falls:
            checks.fail(
                name,
                f"start at 0, never fall and end at N={N}",
                ends,
                "every token belongs to one sequence: give the tokens of padding a sequence of "
                "their own, or leave them out",
            )


def lengths(cu_seqlens: Tensor) -> Tensor:
    """(sequences + 1,) offsets -> (sequences,) numbers of tokens."""
    return cu_seqlens.diff()


def from_lengths(varlen: Tensor) -> Tensor:
    """(sequences,) numbers of tokens -> (sequences + 1,) int32 offsets."""
    return torch.nn.functional.pad(varlen.cumsum(0), (1, 0)).to(torch.int32)


def segment_ids(cu_seqlens: Tensor, N: int) -> Tensor:
    """(N,) int64: the number of the sequence that each token belongs to.

    Example:
        >>> import torch
        >>> segment_ids(torch.tensor([0, 3, 3, 5]), 5)
        tensor([0, 0, 0, 2, 2])
    """
    tokens = torch.arange(N, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)
