"""The specification of decoding over pages: gather every page, then dense maths."""

from __future__ import annotations

from torch import Tensor

from . import _reference
from ._paged_call import PagedDecode


def paged_decode(call: PagedDecode) -> tuple[Tensor, Tensor]:
    """o = weights @ v, one sequence after the other; it reads every page of each."""
    size, alpha = call.keys.shape[2], call.alpha_value if call.alpha is None else call.alpha
    out, pages = (x.zero_() for x in call.fake())
    for b, length in enumerate(call.lengths.tolist()):
        held = call.table[b, : -(-length // size)].long()
        k, v = (x[:, held].flatten(1, 2)[None, :, :length] for x in (call.keys, call.values))
        weights = _reference.attention_weights(
            call.q[b : b + 1],
            k,
            alpha,
            True,
            scale=call.scale,
            alibi_slopes=call.slopes,
            window=call.window,
            s_aux=call.s_aux,
            softcap=call.softcap,
        )
        out[b] = (weights @ v.repeat_interleave(call.q.shape[1] // k.shape[1], 1))[0]
        pages[b] = held.numel()
    return out, pages
