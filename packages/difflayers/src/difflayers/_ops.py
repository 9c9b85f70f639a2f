"""torch.library ops of the sparse paths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shared_kernels import ops


def _fake(x: Tensor, crow: Tensor, col: Tensor, val: Tensor, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, crow, col, val, backend = inputs
    ctx.save_for_backward(crow, col, val)
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    crow, col, val = ctx.saved_tensors
    # W is symmetric: its transpose is itself
    return neighbour_sum(grad.contiguous(), crow, col, val, ctx.backend), None, None, None, None


# out_i = sum over e in [crow_i, crow_i+1) of val_e x_col_e: W x for a symmetric W in CSR; x (N, d).
# The sums are fp32 (fp64 for fp64); no gradient to the weights.
neighbour_sum = ops.define_op(
    "difflayers::neighbour_sum",
    "(Tensor x, Tensor crow, Tensor col, Tensor val, str backend='auto') -> Tensor",
    implementations={"cpu": "difflayers._cpu:neighbour_sum"},
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
