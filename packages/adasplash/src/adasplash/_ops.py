"""The registered ops: schema, shapes of the results, implementations (imported lazily)."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels.ops import define_op

from . import _autograd

_LAZY = "int window_size, Tensor? varlen, Tensor? mask, float scale"
_PAIRS = (
    "Tensor q, Tensor k, Tensor v, Tensor? alpha, float alpha_value, bool is_causal, "
    "Tensor? varlen, Tensor? cu_seqlens, Tensor? mask, Tensor? bias, Tensor? slopes, "
    "int? window, float scale, int n_iter, bool block_mask"
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- rows ---------------------------------------------------------------------------------------


def _fake_entmax(x, alpha, alpha_value, n_iter, fast_math, backend="auto"):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_entmax_backward(dy, y, alpha, alpha_value, need_alpha, fast_math, backend="auto"):
    rows = (*y.shape[:-1], 1) if need_alpha else (0,)
    return torch.empty_like(y, memory_format=torch.contiguous_format), y.new_empty(
        rows, dtype=_wide(y)
    )


entmax_backward = define_op(
    "adasplash::entmax_backward",
    "(Tensor dy, Tensor y, Tensor? alpha, float alpha_value, bool need_alpha, bool fast_math, "
    "str backend='auto') -> (Tensor, Tensor)",
    implementations={"cpu": "adasplash._cpu:entmax_backward"},
    fake=_fake_entmax_backward,
)

entmax = define_op(
    "adasplash::entmax",
    "(Tensor x, Tensor? alpha, float alpha_value, int n_iter, bool fast_math, "
    "str backend='auto') -> Tensor",
    implementations={"cpu": "adasplash._cpu:entmax_forward"},
    fake=_fake_entmax,
    setup_context=_autograd.entmax_context,
    backward=_autograd.entmax_backward,
    autocast=torch.float32,
)


# --- attention ----------------------------------------------------------------------------------


def _fake_attention(q, k, v, *options, backend="auto"):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=_wide(q))


def _fake_attention_backward(do, q, k, v, tau, alpha, *options, backend="auto"):
    *_, need_alpha, need_bias = options[:14]
    bias = options[5]
    d_alpha = q.new_empty(q.shape[1] if need_alpha else 0, dtype=_wide(q))
    d_bias = q.new_empty(bias.shape if need_bias and bias is not None else (0,), dtype=_wide(q))
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *fresh, d_alpha, d_bias


attention_backward = define_op(
    "adasplash::attention_backward",
    f"(Tensor do, {_PAIRS.replace('Tensor v, ', 'Tensor v, Tensor tau, ')}, bool need_alpha, "
    "bool need_bias, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={"cpu": "adasplash._cpu:attention_backward"},
    fake=_fake_attention_backward,
)

attention = define_op(
    "adasplash::attention",
    f"({_PAIRS}, str backend='auto') -> (Tensor, Tensor)",
    implementations={"cpu": "adasplash._cpu:attention_forward"},
    fake=_fake_attention,
    setup_context=_autograd.attention_context,
    backward=_autograd.attention_backward,
)


# --- lazy attention -----------------------------------------------------------------------------


def _fake_lazy(q, k, v, bias, tau, window_size, varlen, mask, scale, save, backend="auto"):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    active = q.new_empty(o.shape if save else (0,), dtype=_wide(q))
    return o, q.new_empty(q.shape[:3], dtype=_wide(q)), active


def _fake_lazy_backward(do, q, k, v, bias, tau, *options, backend="auto"):
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *fresh, *(torch.empty(x.shape, dtype=_wide(q), device=q.device) for x in (bias, tau))


lazy_backward = define_op(
    "adasplash::lazy_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor tau, Tensor o, Tensor lse, "
    f"Tensor active, {_LAZY}, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={"cpu": "adasplash._cpu_lazy:lazy_backward"},
    fake=_fake_lazy_backward,
)

lazy = define_op(
    "adasplash::lazy",
    f"(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor tau, {_LAZY}, bool save, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)",
    implementations={"cpu": "adasplash._cpu_lazy:lazy_forward"},
    fake=_fake_lazy,
    setup_context=_autograd.lazy_context,
    backward=_autograd.lazy_backward,
)
