"""The operators: schema, shapes, backends. Their maths stands in ``_reference``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels import ops

from . import _autograd, _checks


def _cpu_only(first: Tensor, *_: Any) -> str | None:
    if first.device.type in ("cpu", "meta"):
        return None
    return f"the tensors are on {first.device}"


def _triton_why_not(*args: Any) -> str | None:
    for x in args[:4]:
        if x.is_floating_point() and x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernels take float16, bfloat16 and float32, got {x.dtype}"
    return None


def _attention_fake(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


def _backward_fake(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    landmarks: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    ramp: float,
    block: int,
    with_windows: bool,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        windows.new_empty(windows.shape) if with_windows else q.new_empty((0,), dtype=wide),
        q.new_empty((0,), dtype=wide) if bias is None else bias.new_empty(bias.shape),
    )


def _lists_fake(
    scores: Tensor, k: int, block: int, cu_seqlens: Tensor | None, backend: str = "auto"
) -> Tensor:
    B, H, n = scores.shape
    return scores.new_empty((B, H, _checks.n_lists(n, n, block, cu_seqlens), k), dtype=torch.int32)


attention = ops.register_op(
    "dsalt::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor windows, Tensor landmarks, Tensor? bias, "
    "Tensor? cu_seqlens, float scale, float ramp, int block, str backend='auto') "
    "-> (Tensor, Tensor)",
    implementations={
        "triton": "dsalt._triton.forward:launch_attention_forward",
        "cpu": "dsalt._cpu:forward",
    },
    why_not={"triton": _triton_why_not, "cpu": _cpu_only},
    fake=_attention_fake,
    setup_context=_autograd.save,
    backward=_autograd.attention_backward,
)

attention_backward = ops.register_op(
    "dsalt::attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor windows, Tensor landmarks, Tensor? bias, "
    "Tensor? cu_seqlens, Tensor out, Tensor lse, float scale, float ramp, int block, "
    "bool with_windows, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "triton": "dsalt._triton.backward:launch_attention_backward",
        "cpu": "dsalt._cpu:backward",
    },
    why_not={"triton": _triton_why_not, "cpu": _cpu_only},
    fake=_backward_fake,
)

causal_landmarks = ops.register_op(
    "dsalt::causal_landmarks",
    "(Tensor scores, int k, int block, Tensor? cu_seqlens, str backend='auto') -> Tensor",
    implementations={
        "cpu": "dsalt._energy:causal_landmarks_loop",
        "scan": "dsalt._energy:causal_landmarks_scan",
    },
    why_not={"cpu": _cpu_only},
    fake=_lists_fake,
)
