"""torch.library ops of the sparse paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels import ops


def _no_fp64(x: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "the kernels sum in fp32; float64 runs on backend 'cpu'"
    return None


def _sum_fake(x: Tensor, crow: Tensor, col: Tensor, val: Tensor, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, crow, col, val, backend = inputs
    # the patterns are needed for a gradient of the weights only
    ctx.save_for_backward(crow, col, val, x if val.requires_grad else None)
    ctx.backend = backend


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    crow, col, val, x = ctx.saved_tensors
    dx = d_val = None
    if ctx.needs_input_grad[0]:
        # W is symmetric: its transpose is itself
        dx = neighbour_sum(grad.contiguous(), crow, col, val, ctx.backend)
    if ctx.needs_input_grad[3]:
        wide = torch.promote_types(val.dtype, torch.float32)
        rows = torch.repeat_interleave(crow.diff(), output_size=col.shape[0])
        d_val = (grad.to(wide)[rows] * x.to(wide)[col]).sum(-1).to(val.dtype)
    return dx, None, None, d_val, None


# out_i = sum over e in [crow_i, crow_i+1) of val_e x_col_e: W x for a symmetric W in CSR; x (N, d).
# The sums are fp32 (fp64 for fp64). A gradient of the weights is that of each edge by itself.
neighbour_sum = ops.register_op(
    "difflayers::neighbour_sum",
    "(Tensor x, Tensor crow, Tensor col, Tensor val, str backend='auto') -> Tensor",
    implementations={
        "triton": "difflayers._triton.forward:launch_neighbour_sum",
        "cpu": "difflayers._cpu:neighbour_sum",
    },
    why_not={"triton": _no_fp64},
    fake=_sum_fake,
    setup_context=_sum_setup,
    backward=_sum_backward,
)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, index, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, do: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, index, o, lse = ctx.saved_tensors
    arguments = (do.contiguous(), q, k, v, index, o, lse, ctx.scale, ctx.backend)
    return *neighbour_attention_backward(*arguments), None, None, None


# softmax(scale q_i k_index[i]^T) v_index[i]; q (B, H, L, D), index (B, L, K) with -1 = empty.
# Also the log-sum-exp to base 2 of the scaled scores, +inf where a state has no neighbour.
neighbour_attention = ops.register_op(
    "difflayers::neighbour_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor index, float scale, str backend='auto') "
    "-> (Tensor, Tensor)",
    implementations={
        "triton": "difflayers._triton.forward:launch_neighbour_attention_forward",
        "cpu": "difflayers._cpu:neighbour_attention",
    },
    why_not={"triton": _no_fp64},
    fake=_attention_fake,
    setup_context=_attention_setup,
    backward=_attention_backward,
)


def _attention_backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


neighbour_attention_backward = ops.register_op(
    "difflayers::neighbour_attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor index, Tensor o, Tensor lse, float scale, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)",
    implementations={
        "triton": "difflayers._triton.backward:launch_neighbour_attention_backward",
        "cpu": "difflayers._cpu:neighbour_attention_backward",
    },
    why_not={"triton": _no_fp64},
    fake=_attention_backward_fake,
)
