"""Associations with several updates by the native CPU library of shared-kernels."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.calls import replaced
from shared_kernels.native import association as library

from ._call import Association, States


def why_not(call: Association) -> str | None:
    """None where the library runs the call; else the reason."""
    return library.why_not(call.q, call.k, call.v)


def association(call: Association) -> tuple[Tensor, States]:
    """All updates and the read-out of a few states at a time, in the cache."""
    out, states, lse = library.forward(*call)
    return out, States(states, lse)


def association_backward(
    call: Association, saved: States, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """From the read-out back to the first state, a few states at a time."""
    q, k, v, mask, scale, steps, _ = call
    if not call.save:  # forward did not know of this pass
        saved = association(replaced(call, save=True))[1]
    found = library.backward(q, k, v, mask, scale, steps, *saved, d_out)
    return {field: g for field, g in zip("qkv", found, strict=True) if field in needs}
