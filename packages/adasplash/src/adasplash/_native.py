"""Attention by the native CPU library of shared-kernels."""

from __future__ import annotations

from torch import Tensor

from shared_kernels.native import attention, lazy

from ._call import ROOM, Attention, Lazy, RowSums, Supports, per_head_sums


def why_not(call: Attention | Lazy) -> str | None:
    """None where the library runs the call; else the reason."""
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
        s_aux=call.s_aux,
        softcap=call.softcap,
        steps=call.n_iter,
    )


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
    if call.slopes is not None and found.alibi_slopes is not None:
        gradients["slopes"] = found.alibi_slopes.sum((0, 2)).to(call.slopes.dtype)
    if call.s_aux is not None and found.s_aux is not None:
        gradients["s_aux"] = found.s_aux.sum((0, 2)).to(call.s_aux.dtype)
    if found.bias is not None:
        gradients["bias"] = found.bias
    return gradients


def _lazy_arguments(call: Lazy) -> lazy.Arguments:
    return lazy.Arguments(
        call.q, call.k, call.v, call.bias, call.tau, call.scale, call.varlen, call.mask
    )


def lazy_forward(call: Lazy) -> tuple[Tensor, RowSums]:
    """o, and the log2-sum-exp2 of each row."""
    o, lse = lazy.forward(_lazy_arguments(call))
    return o, RowSums(lse if call.save else lse.new_empty(0))


def lazy_backward(
    call: Lazy, saved: RowSums, d_out: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of q, k, v, bias and tau."""
    return lazy.backward(_lazy_arguments(call), saved.lse, d_out)._asdict()
