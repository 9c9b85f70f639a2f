"""The registered ops, each from its call; implementations are imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import device
from shared_kernels.calls import recast
from shared_kernels.ops import Backend, Op, define_op
from shared_kernels.rows import define_entmax

from . import _native
from ._call import (
    SQUARE,
    ActiveSums,
    Attention,
    Lazy,
    LazySecondDerivative,
    Lists,
    RowSums,
    SecondDerivative,
    Statistics,
    Supports,
    Tiles,
)
from ._paged_call import PagedDecode
from ._sharded_call import Reach, Sharded


def _float64(call: Attention | Lazy | PagedDecode) -> str | None:
    if call.q.dtype == torch.float64:
        return (
            "attention in float64 has no kernel: its tiles do not fit in the registers; the torch "
            "backend takes it on any device"
        )
    return None


def _wide_pages(call: PagedDecode) -> str | None:
    widest = max(call.q.shape[-1], call.values.shape[-1])
    if widest > 128:
        return (
            f"decoding over pages has kernels for head dims up to 128, got {widest}: wider tiles "
            "do not fit in the registers; the torch backend takes them on any device"
        )
    return _float64(call)


def _too_wide(call: Attention | Statistics) -> str | None:
    wide = call.q.dtype == torch.float32 and max(call.q.shape[-1], call.v.shape[-1]) > 128
    if wide and device.target(call.q).backend == "cuda":
        return (
            "attention in float32 with head dims above 128 has no kernel for NVIDIA's cards: exact "
            "products of this width do not fit in the registers; fp16 and bf16 have one, and the "
            "torch backend takes it on any device"
        )
    return _float64(call)


def _other_squares(call: Statistics) -> str | None:
    if call.square != SQUARE:
        return f"kernels keep or skip tiles of {SQUARE}, not of {call.square}"
    return _too_wide(call)


def _second(op: Op[tuple[Tensor, ...]], Derivative: Any) -> Callable[..., dict[str, Any]]:
    """The formula of a second derivative that an op of its own computes."""

    def formula(
        call: Any, out: Tensor | None, d_out: Tensor, to: dict[str, Tensor | None], backend: str
    ) -> dict[str, Any]:
        if backend == "triton":
            raise NotImplementedError(
                "backend 'triton' has no second derivative of attention: tiles of plain PyTorch "
                "take it on any device, with backend='auto'"
            )
        cotangents = {f"to_{name}": x for name, x in to.items()}
        found = op(recast(call, Derivative, d_out=d_out, **cotangents))
        return dict(zip(("d_out", *to), found, strict=True))

    return formula


# --- rows ---------------------------------------------------------------------------------------


entmax = define_entmax(
    "adasplash",
    triton=(
        "adasplash._triton.rows:launch_entmax_forward",
        "adasplash._triton.rows:launch_entmax_backward",
    ),
)


# --- attention ----------------------------------------------------------------------------------

attention_second_backward = define_op(
    "adasplash::attention_second_backward",
    SecondDerivative,
    {"torch": Backend("adasplash._torch:attention_second_backward")},
    n_outputs=8,
    vmap="each",
)


attention = define_op(
    "adasplash::attention",
    Attention,
    {
        "triton": Backend(
            "adasplash._triton.forward:launch_attention_forward",
            "adasplash._triton.backward:launch_attention_backward",
            saved=Tiles,
            why_not=_too_wide,
        ),
        "native": Backend(
            "adasplash._native:attention_forward",
            "adasplash._native:attention_backward",
            saved=Supports,
            why_not=_native.why_not,
        ),
        "torch": Backend(
            "adasplash._torch:attention_forward", "adasplash._torch:attention_backward", saved=Lists
        ),
        "reference": Backend("adasplash._reference:attention"),
    },
    gradients=("q", "k", "v", "alpha", "bias", "slopes", "s_aux"),
    second=_second(attention_second_backward, SecondDerivative),
    vmap="each",
)

attention_stats = define_op(
    "adasplash::attention_stats",
    Statistics,
    {
        "triton": Backend(
            "adasplash._triton.forward:launch_attention_stats", why_not=_other_squares
        ),
        "torch": Backend("adasplash._torch:attention_stats"),
        "reference": Backend("adasplash._reference:attention_stats"),
    },
    n_outputs=5,
)


# No derivative: a cache holds numbers, and decoding runs without gradients.
paged_decode = define_op(
    "adasplash::paged_decode",
    PagedDecode,
    {
        "triton": Backend(
            "adasplash._triton.paged:launch_paged_decode",
            why_not=_wide_pages,
        ),
        "native": Backend(
            "adasplash._paged_native:paged_decode",
            why_not="adasplash._paged_native:why_not",
        ),
        "torch": Backend("adasplash._paged_torch:paged_decode"),
        "reference": Backend("adasplash._paged_reference:paged_decode"),
    },
    n_outputs=2,
    vmap="each",
)


# A second derivative would need the messages of both passes once more: define_op refuses it.
sharded_attention = define_op(
    "adasplash::sharded_attention",
    Sharded,
    {
        "torch": Backend(
            "adasplash._sharded_torch:attention_forward",
            "adasplash._sharded_torch:attention_backward",
            saved=Reach,
        ),
    },
    gradients=("q", "k", "v", "alpha", "slopes", "s_aux"),
)


# --- lazy attention -----------------------------------------------------------------------------

lazy_second_backward = define_op(
    "adasplash::lazy_second_backward",
    LazySecondDerivative,
    {"torch": Backend("adasplash._torch_lazy:lazy_second_backward")},
    n_outputs=6,
    vmap="each",
)


lazy = define_op(
    "adasplash::lazy",
    Lazy,
    {
        "triton": Backend(
            "adasplash._triton.lazy:launch_lazy_forward",
            "adasplash._triton.lazy:launch_lazy_backward",
            saved=ActiveSums,
            why_not=_float64,
        ),
        "native": Backend(
            "adasplash._native:lazy_forward",
            "adasplash._native:lazy_backward",
            saved=RowSums,
            why_not=_native.why_not,
        ),
        "torch": Backend(
            "adasplash._torch_lazy:lazy_forward",
            "adasplash._torch_lazy:lazy_backward",
            saved=RowSums,
        ),
        "reference": Backend("adasplash._reference:lazy_attention"),
    },
    gradients=("q", "k", "v", "bias", "tau"),
    second=_second(lazy_second_backward, LazySecondDerivative),
    vmap="each",
)
