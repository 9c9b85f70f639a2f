"""The operators and their backends."""

from __future__ import annotations

import torch

from shared_kernels.ops import Backend, define_op

from ._call import Attention, CausalLandmarks, LinearCrossEntropy, LossGradients, Normalized


def _triton_why_not(call: Attention) -> str | None:
    for x in (call.q, call.k, call.v, call.windows):
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernels take float16, bfloat16 and float32, got {x.dtype}"
    return None


attention = define_op(
    "dsalt::attention",
    Attention,
    {
        "triton": Backend(
            "dsalt._triton.forward:launch_attention_forward",
            "dsalt._triton.backward:launch_attention_backward",
            saved=Normalized,
            why_not=_triton_why_not,
        ),
        "native": Backend(
            "dsalt._native:attention_forward",
            "dsalt._native:attention_backward",
            saved=Normalized,
            why_not="dsalt._native:why_not",
        ),
        "torch": Backend("dsalt._torch:forward", "dsalt._torch:backward", saved=Normalized),
        "reference": Backend("dsalt._reference:attention"),
    },
    gradients=("q", "k", "v", "windows", "bias"),
)

causal_landmarks = define_op(
    "dsalt::causal_landmarks",
    CausalLandmarks,
    {
        "torch": Backend("dsalt._landmarks:causal_landmarks"),
        "reference": Backend("dsalt._reference:causal_landmarks"),
    },
)

linear_cross_entropy = define_op(
    "dsalt::linear_cross_entropy",
    LinearCrossEntropy,
    {
        "torch": Backend("dsalt._loss:forward", "dsalt._loss:backward", saved=LossGradients),
        "reference": Backend("dsalt._reference:linear_cross_entropy"),
    },
    gradients=("hidden", "weight"),
    drops=("hidden", "weight", "labels"),
)
