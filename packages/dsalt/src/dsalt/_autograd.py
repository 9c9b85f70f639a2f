"""Backward of the attention operator: from q, k, v, the output and the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, windows, landmarks, bias, cu_seqlens, scale, ramp, block, backend = inputs
    ctx.save_for_backward(q, k, v, windows, landmarks, bias, cu_seqlens, *output)
    ctx.numbers = (scale, ramp, block, ctx.needs_input_grad[3], backend)


def attention_backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple:
    grads = torch.ops.dsalt.attention_backward.default(d_out, *ctx.saved_tensors, *ctx.numbers)
    d_q, d_k, d_v, d_windows, d_bias = grads
    with_windows, with_bias = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    return (
        d_q,
        d_k,
        d_v,
        d_windows if with_windows else None,
        None,
        d_bias if with_bias else None,
        None,
        None,
        None,
        None,
        None,
    )
