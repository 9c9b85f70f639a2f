"""Attention over a band and landmarks by the native CPU library of shared-kernels."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.calls import recast
from shared_kernels.native import band

from ._call import Attention, Normalized


def why_not(call: Attention) -> str | None:
    """None where the library runs the call; else the reason."""
    return band.why_not(call.q, call.k, call.v)


def _band(call: Attention) -> band.Band:
    landmarks, bias = call.landmarks, call.bias
    if landmarks.dim() == 3:  # one list for all queries
        landmarks = landmarks[:, :, None]
        bias = None if bias is None else bias[:, :, None]
    starts, lists = call.rows()
    lists_of = {"landmarks": landmarks, "bias": bias, "starts": starts, "lists": lists}
    return recast(call, band.Band, scale=call.factor, **lists_of)


def attention_forward(call: Attention) -> tuple[Tensor, Normalized]:
    found = Normalized(*band.forward(_band(call)))
    return found.out, found


def attention_backward(
    call: Attention, saved: Normalized, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    found = band.backward(_band(call), *saved, d_out, "windows" in needs, "bias" in needs)
    fields = ((field, getattr(call, field)) for field in needs)
    return {field: found[field].reshape(x.shape).to(x.dtype).contiguous() for field, x in fields}
