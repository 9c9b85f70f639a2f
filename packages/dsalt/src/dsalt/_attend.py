"""The one way to the attention operator, with softmax or any other map to weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shared_kernels import ops
from shared_kernels.calls import replaced

from . import _normalized, _ops
from ._call import Attention


def attend(
    call: Attention,
    normalizer: Callable[[Tensor, int], Tensor] | None = None,
    backend: str = "auto",
    *,
    rows: tuple[Tensor, Tensor] | None = None,
    reach: float | None = None,
) -> Tensor:
    """The output of a call: functions, modules and caches all come through here.

    Args:
        call: a checked call.
        normalizer: takes the place of softmax, in plain PyTorch.
        backend: of the operator, where softmax runs as one.
        rows: first visible key and landmark list of each query, (B, N_q) each, where the rows of a
            batch differ; the operator has no such rows, so they run in plain PyTorch.
        reach: upper bound of the windows; without one a normaliser has to read their values.
    """
    q, k, v = (x for x in ops.autocast_lower(call.q, call.k, call.v) if x is not None)
    call = replaced(call, q=q, k=k, v=v)
    if normalizer is None and rows is None:
        return _ops.attention(call, backend)
    if reach is None:
        reach = float(call.windows.detach().max()) if call.windows.numel() else 0.0
    rows = call.rows() if rows is None else rows
    return _normalized.attention(call, rows, normalizer or torch.softmax, reach)
