"""torch.library ops: the sparse paths, and an association with all its updates."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels.ops import Backend, define_op

from ._autograd import second_of_association, second_of_attention, second_of_sum
from ._call import Association, LogSumExp, NeighbourAttention, NeighbourSum, States
from ._torch import decomposed_association, decomposed_attention, decomposed_sum


def _no_float64(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "the kernels sum in fp32; float64 runs on backend 'torch'"
    return None


neighbour_sum = define_op(
    "difflayers::neighbour_sum",
    NeighbourSum,
    {
        "triton": Backend(
            "difflayers._triton.forward:launch_neighbour_sum",
            "difflayers._triton.backward:launch_neighbour_sum_backward",
            why_not=lambda call: _no_float64(call.x),
        ),
        "torch": Backend(
            "difflayers._torch:neighbour_sum", "difflayers._torch:neighbour_sum_backward"
        ),
        "reference": Backend("difflayers._reference:neighbour_sum"),
    },
    gradients=("x", "val"),
    second=second_of_sum,
    vmap="each",
    decomposition=decomposed_sum,
)

neighbour_attention = define_op(
    "difflayers::neighbour_attention",
    NeighbourAttention,
    {
        "triton": Backend(
            "difflayers._triton.forward:launch_neighbour_attention_forward",
            "difflayers._triton.backward:launch_neighbour_attention_backward",
            saved=LogSumExp,
            why_not=lambda call: _no_float64(call.q),
        ),
        "torch": Backend(
            "difflayers._torch:neighbour_attention",
            "difflayers._torch:neighbour_attention_backward",
            saved=LogSumExp,
        ),
        "reference": Backend("difflayers._reference:neighbour_attention"),
    },
    gradients=("q", "k", "v"),
    second=second_of_attention,
    vmap="each",
    decomposition=decomposed_attention,
)

association = define_op(
    "difflayers::association",
    Association,
    {
        "native": Backend(
            "difflayers._native:association",
            "difflayers._native:association_backward",
            saved=States,
            why_not="difflayers._native:why_not",
        ),
        "torch": Backend("difflayers._torch:association", "difflayers._torch:association_backward"),
        "reference": Backend("difflayers._reference:association"),
    },
    gradients=("q", "k", "v"),
    second=second_of_association,
    vmap="each",
    decomposition=decomposed_association,
)
