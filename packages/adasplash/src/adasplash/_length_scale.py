"""Scores that grow with the length: the factor delta + beta (log n)^gamma of each query."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.calls import replaced
from shared_kernels.rows import wide

from ._call import Attention
from ._paged_call import PagedDecode

AnyCall = TypeVar("AnyCall", Attention, PagedDecode)


def scaled(call: AnyCall, length_scale: Tensor | None) -> AnyCall:
    """The call with each query times its factor, so that its products are, too."""
    if length_scale is None:
        return call
    return times(call, length_scale, lengths(call))


def times(call: AnyCall, length_scale: Tensor, n: Tensor) -> AnyCall:
    """The call with each query times the factor of its length n."""
    H = call.q.shape[1]
    checks.floating("length_scale", length_scale)
    checks.same_device(q=call.q, length_scale=length_scale)
    if tuple(length_scale.shape) not in ((3,), (H, 3)):
        checks.fail(
            "length_scale",
            f"have shape (3,) or (H={H}, 3): delta, beta, gamma",
            tuple(length_scale.shape),
        )
    factor = factors(length_scale.to(wide(call.q)), n)
    q = (call.q * factor).to(call.q.dtype)
    return call.with_queries(q) if isinstance(call, Attention) else replaced(call, q=q)


def factors(length_scale: Tensor, n: Tensor) -> Tensor:
    """(B, H or 1, N_q, 1) factors of (B, 1, N_q, 1) lengths; delta where n = 1, as log n is 0."""
    delta, beta, gamma = length_scale.view(-1, 3, 1, 1).unbind(1)
    log_n = n.clamp(min=2).to(length_scale.dtype).log()
    return delta + beta * torch.where(n > 1, log_n**gamma, 0.0)


def lengths(call: Attention | PagedDecode) -> Tensor:
    """(B or 1, 1, N_q, 1): tokens up to the query's own if causal, those of its sequence if not."""
    N_q, device = call.q.shape[2], call.q.device
    at = torch.arange(N_q, device=device).view(1, 1, -1, 1)
    if isinstance(call, PagedDecode):  # the last N_q queries of each sequence
        return call.lengths.view(-1, 1, 1, 1) - N_q + at + 1
    if call.cu_seqlens is not None:
        ends = call.cu_seqlens.to(device, torch.int64)
        which = torch.bucketize(at, ends[1:], right=True).clamp(max=max(len(ends) - 2, 0))
        n = at - ends[which] + 1
        return n if call.is_causal else ends.diff()[which] if len(ends) > 1 else at + 1
    if call.varlen is not None:
        both = call.varlen.to(device).view(-1, 1 if call.varlen.dim() == 1 else 2)
        n_q, n_k = (x.view(-1, 1, 1, 1) for x in (both[:, 0], both[:, -1]))
    else:
        n_q, n_k = (torch.full((1, 1, 1, 1), n, device=device) for n in (N_q, call.k.shape[2]))
    return n_k - n_q + at + 1 if call.is_causal else n_k + 0 * at
