"""What the ops keep for their backward, and the backward itself: another registered op."""

from __future__ import annotations

import torch


def attention_context(ctx, inputs, output):
    q, k, v, alpha, ctx.value, ctx.is_causal, varlen, cu_seqlens, mask, bias, slopes = inputs[:11]
    ctx.window, ctx.scale, ctx.n_iter, ctx.block_mask, _, ctx.backend = inputs[11:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.save_for_backward(q, k, v, *output[1:], alpha, varlen, cu_seqlens, mask, bias, slopes)


def attention_backward(ctx, do, *_):
    *tensors, alpha, varlen, cu_seqlens, mask, bias, slopes = ctx.saved_tensors
    need_alpha, need_bias, need_slopes = (ctx.needs_input_grad[i] for i in (3, 9, 10))
    dq, dk, dv, d_alpha, d_bias, d_slopes = torch.ops.adasplash.attention_backward(
        do, *tensors, alpha, ctx.value, ctx.is_causal, varlen, cu_seqlens,
        mask, bias, slopes, ctx.window, ctx.scale, ctx.n_iter, ctx.block_mask, need_alpha,
        need_bias, need_slopes, ctx.backend,
    )  # fmt: skip
    d_alpha = _like(d_alpha, alpha) if need_alpha else None
    d_bias = d_bias.to(bias.dtype) if need_bias else None
    d_slopes = d_slopes.to(slopes.dtype) if need_slopes else None
    return dq, dk, dv, d_alpha, None, None, None, None, None, d_bias, d_slopes, *(None,) * 6


def attention_backward_context(ctx, inputs, output):
    do, q, k, v, *_, alpha, ctx.value, ctx.is_causal, varlen, cu_seqlens, mask = inputs[:15]
    bias, slopes, ctx.window, ctx.scale, ctx.n_iter, *_, ctx.backend = inputs[15:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(do, q, k, v, alpha, varlen, cu_seqlens, mask, bias, slopes)


def attention_second_backward(ctx, *grads):
    """What comes from above is that of dq, dk, dv and of those of alpha, bias and slopes."""
    do, q, k, v, alpha, varlen, cu_seqlens, mask, bias, slopes = ctx.saved_tensors
    _no_kernel(ctx.backend)
    d_do, dq, dk, dv, d_alpha, d_bias, d_slopes = torch.ops.adasplash.attention_second_backward(
        do, q, k, v, *grads, alpha, ctx.value, ctx.is_causal, varlen, cu_seqlens, mask, bias,
        slopes, ctx.window, ctx.scale, ctx.n_iter, ctx.backend,
    )  # fmt: skip
    needs = ctx.needs_input_grad
    d_alpha = _like(d_alpha, alpha) if needs[9] else None
    d_bias = d_bias.to(bias.dtype) if needs[15] else None
    d_slopes = d_slopes.to(slopes.dtype) if needs[16] else None
    return (
        d_do, dq, dk, dv, *(None,) * 5, d_alpha, *(None,) * 5, d_bias, d_slopes, *(None,) * 8
    )  # fmt: skip


def _no_kernel(backend):
    if backend == "triton":
        raise NotImplementedError(
            "backend 'triton' has no second derivative of attention: tiles of plain PyTorch take "
            "it on any device, with backend='auto'"
        )


def _like(per_head, alpha):
    """The gradient of each head as that of ``alpha``: a scalar, (H,) or (1, H, 1, 1)."""
    if alpha.numel() == 1:
        per_head = per_head.sum()
    return per_head.reshape(alpha.shape).to(alpha.dtype)


def lazy_context(ctx, inputs, output):
    q, k, v, bias, tau, ctx.window_size, varlen, mask, ctx.scale, _, ctx.backend = inputs
    _, lse, sums = output
    ctx.mark_non_differentiable(lse, sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, tau, lse, sums, varlen, mask)


def lazy_backward(ctx, do, *_):
    q, k, v, bias, tau, lse, sums, varlen, mask = ctx.saved_tensors
    dq, dk, dv, d_bias, d_tau = torch.ops.adasplash.lazy_backward(
        do, q, k, v, bias, tau, lse, sums, ctx.window_size, varlen, mask, ctx.scale,
        ctx.backend,
    )  # fmt: skip
    return dq, dk, dv, d_bias.to(bias.dtype), d_tau.to(tau.dtype), *(None,) * 6


def lazy_backward_context(ctx, inputs, output):
    do, q, k, v, bias, tau, lse, _, ctx.window_size, varlen, mask, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(do, q, k, v, bias, tau, lse, varlen, mask)


def lazy_second_backward(ctx, *grads):
    *tensors, varlen, mask = ctx.saved_tensors
    _no_kernel(ctx.backend)
    *fresh, d_bias, d_tau = torch.ops.adasplash.lazy_second_backward(
        *tensors, *grads, ctx.window_size, varlen, mask, ctx.scale, ctx.backend
    )
    bias, tau = tensors[4:6]
    return *fresh, d_bias.to(bias.dtype), d_tau.to(tau.dtype), *(None,) * 7
