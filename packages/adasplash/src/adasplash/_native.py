"""Attention by the native CPU library of shared-kernels."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.calls import recast
from shared_kernels.native import attention, lazy

from ._call import ROOM, Attention, Lazy, RowSums, Supports, per_head_sums


def why_not(call: Attention | Lazy) -> str | None:
    """None where the library runs the call; else the reason."""
    return attention.why_not(call.q, call.k, call.v)


def _arguments(call: Attention) -> attention.Arguments:
    alpha = call.alpha
    s = call.alpha_value - 1 if alpha is None else alpha.detach().reshape(-1).double() - 1
    return recast(call, attention.Arguments, s=s)


def attention_forward(call: Attention) -> tuple[Tensor, Supports]:
    """o (B, H, N_q, D_v), and what the backward pass asks for."""
    o, kept = attention.forward(_arguments(call), room=ROOM if call.save else 0)
    return o, Supports.fake(call) if kept is None else Supports(**kept._asdict())


def attention_backward(
    call: Attention, saved: Supports, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k and v, and of alpha, bias, slopes and s_aux if they are needed."""
    found = attention.backward(
        _arguments(call),
        attention.Kept(**saved._asdict()),
        d_out,
        need_s="alpha" in needs,
        need_slopes="slopes" in needs,
        need_bias="bias" in needs,
        need_sinks="s_aux" in needs,
    )
    gradients = {"q": found.q, "k": found.k, "v": found.v}
    if call.alpha is not None and found.s is not None:
        gradients["alpha"] = per_head_sums(found.s.sum((0, 2)), call.alpha)
    if call.slopes is not None and found.slopes is not None:
        gradients["slopes"] = found.slopes.sum((0, 2)).to(call.slopes.dtype)
    if call.s_aux is not None and found.s_aux is not None:
        gradients["s_aux"] = found.s_aux.sum((0, 2)).to(call.s_aux.dtype)
    if found.bias is not None:
        gradients["bias"] = found.bias
    return gradients


def lazy_forward(call: Lazy) -> tuple[Tensor, RowSums]:
    """o, and the log2-sum-exp2 of each row."""
    o, lse = lazy.forward(recast(call, lazy.Arguments))
    return o, RowSums(lse if call.save else lse.new_empty(0))


def lazy_backward(
    call: Lazy, saved: RowSums, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k, v, bias and tau."""
    return lazy.backward(recast(call, lazy.Arguments), saved.lse, d_out)
