"""Decoding over pages by the native CPU library of shared-kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels.calls import recast, replaced
from shared_kernels.native import pages

from . import _paged_torch
from ._call import ENOUGH_STEPS
from ._paged_call import PagedDecode


def _pages(call: PagedDecode) -> pages.Pages:
    H = call.q.shape[1]
    if call.alpha is None:
        s = torch.full((H,), call.alpha_value - 1, dtype=torch.float64, device="cpu")
    else:
        s = (call.alpha.detach().double().reshape(-1) - 1).expand(H)
    return recast(call, pages.Pages, s=s, table=call.table.long(), lengths=call.lengths.long())


def why_not(call: PagedDecode) -> str | None:
    """None where the library runs the call; else the reason."""
    if call.n_iter < ENOUGH_STEPS:
        return f"native decoding runs until it has converged, not for niter={call.n_iter} steps"
    if call.alpha is not None and call.alpha.device.type != "cpu":
        return f"the native library runs on CPU tensors, got alpha on {call.alpha.device}"
    return pages.why_not(replaced(_pages(call), s=call.q))


def paged_decode(call: PagedDecode) -> tuple[Tensor, Tensor]:
    """o (B, H, n, D_v) and how many pages were read (B, H_kv)."""
    out, read = pages.decode(_pages(call))
    is_dense = read < 0
    if bool(is_dense.any()):
        read.masked_fill_(is_dense, 0)
        _paged_torch.read_whole(call, is_dense, out, read)
    return out, read
