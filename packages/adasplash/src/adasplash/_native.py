"""Attention by the native CPU library of shared-kernels."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.native import attention

from ._call import ROOM, Attention, Supports, per_head_sums

# The fields of a call that the library knows; `square` says how kernels skip and changes no number.
_KNOWN = frozenset(
    ("q", "k", "v", "alpha", "alpha_value", "is_causal", "varlen", "cu_seqlens", "mask", "bias")
) | {"slopes", "window", "scale", "n_iter", "square", "save"}


def why_not(call: Attention) -> str | None:
    """None where the library runs the call; else the reason."""
    for field, default in call._field_defaults.items():
        if field not in _KNOWN and getattr(call, field) is not default:
            return f"the native library does not know `{field}`; the torch backend does"
    return attention.why_not(call.q, call.k, call.v)


def _arguments(call: Attention) -> attention.Arguments:
    alpha = call.alpha
    return attention.Arguments(
        call.q,
        call.k,
        call.v,
        call.alpha_value - 1 if alpha is None else alpha.detach().reshape(-1).double() - 1,
        causal=call.is_causal,
        scale=call.scale,
        window=call.window,
        varlen=call.varlen,
        cu_seqlens=call.cu_seqlens,
        mask=call.mask,
        bias=call.bias,
        alibi_slopes=call.slopes,
        steps=call.n_iter,
    )


def attention_forward(call: Attention) -> tuple[Tensor, Supports]:
    """o (B, H, N_q, D_v), and what the backward pass asks for."""
    o, kept = attention.forward(_arguments(call), room=ROOM if call.save else 0)
    return o, Supports.fake(call) if kept is None else Supports(**kept._asdict())


def attention_backward(
    call: Attention, saved: Supports, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k and v, and of alpha, bias and slopes if they are needed."""
    found = attention.backward(
        _arguments(call),
        attention.Kept(**saved._asdict()),
        d_out,
        need_s="alpha" in needs,
        need_slopes="slopes" in needs,
        need_bias="bias" in needs,
    )
    gradients = {"q": found.q, "k": found.k, "v": found.v}
    if call.alpha is not None and found.s is not None:
        gradients["alpha"] = per_head_sums(found.s.sum((0, 2)), call.alpha)
    if call.slopes is not None and found.alibi_slopes is not None:
        gradients["slopes"] = found.alibi_slopes.sum((0, 2)).to(call.slopes.dtype)
    if found.bias is not None:
        gradients["bias"] = found.bias
    return gradients
