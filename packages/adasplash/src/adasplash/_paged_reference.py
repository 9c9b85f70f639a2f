"""The specification of decoding over pages: gather every page, then dense maths."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.calls import recast

from . import _reference
from ._call import Attention
from ._paged_call import PagedDecode


def paged_decode(call: PagedDecode) -> tuple[Tensor, Tensor]:
    """o = weights @ v, one sequence after the other; it reads every page of each."""
    size = call.keys.shape[2]
    out, pages = (x.zero_() for x in call.fake())
    for b, length in enumerate(call.lengths.tolist()):
        held = call.table[b, : -(-length // size)].long()
        k, v = (x[:, held].flatten(1, 2)[None, :, :length] for x in (call.keys, call.values))
        part = recast(call, Attention, q=call.q[b : b + 1], k=k, v=v, is_causal=True)
        weights = _reference.attention_weights(part)
        out[b] = (weights[..., :length] @ v.repeat_interleave(call.q.shape[1] // k.shape[1], 1))[0]
        pages[b] = held.numel()
    return out, pages
