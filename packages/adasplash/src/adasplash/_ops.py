"""The registered ops: schema, shapes of the results, implementations (imported lazily)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels import device
from shared_kernels.blockmask import n_tiles
from shared_kernels.ops import register_op
from shared_kernels.rows import define_entmax

from . import _autograd

_LAZY = "int window_size, Tensor? varlen, Tensor? mask, float scale"
_PAIRS = (
    "Tensor? alpha, float alpha_value, bool is_causal, "
    "Tensor? varlen, Tensor? cu_seqlens, Tensor? mask, Tensor? bias, Tensor? slopes, "
    "int? window, float scale, int n_iter"
)
_OPTIONS = f"{_PAIRS}, bool block_mask"


def _one_by_one(name: str) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of an op that keeps lists: a call for each element of the batch."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.adasplash, name)

        def call(i: int) -> tuple[Tensor, ...]:
            return op(*(
                x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)
            ))  # fmt: skip

        if info.batch_size:
            found = [torch.stack(x) for x in zip(*map(call, range(info.batch_size)), strict=True)]
        else:  # the shapes are those of an element of zeros
            args = tuple(
                x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:]).unsqueeze(dim)
                for x, dim in zip(args, dims, strict=True)
            )
            found = [x.new_empty(0, *x.shape) for x in call(0)]
        return tuple(found), (0,) * len(found)

    return rule


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _float64(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return (
            "attention in float64 has no kernel: its tiles do not fit in the registers; the cpu "
            "backend takes it on any device"
        )
    return None


def _runs_kernels(q: Tensor, backend: str) -> bool:
    """Whether attention of such tensors is a matter for the kernels, as dispatch decides it."""
    if backend == "auto":
        backend = "triton" if device.target(q).is_gpu and not device.triton_why_not(q) else "cpu"
    return backend == "triton" and _float64(q) is None


# --- rows ---------------------------------------------------------------------------------------


entmax, _ = define_entmax(
    "adasplash",
    {
        "triton": "adasplash._triton.rows:launch_entmax_forward",
        "cpu": "shared_kernels.qexp:entmax_forward",
    },
    {
        "triton": "adasplash._triton.rows:launch_entmax_backward",
        "cpu": "shared_kernels.qexp:entmax_backward",
    },
)


# --- attention ----------------------------------------------------------------------------------


def _fake_attention(q, k, v, *options, backend="auto"):
    """o, theta, then o2 and squares for kernels, or the weights, keys and counts of the tiles."""
    cu_seqlens, block_mask, save = options[4], options[11], options[12]
    backend = options[13] if len(options) > 13 else backend
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    theta = q.new_empty(q.shape[:3] if save else (0,), dtype=_wide(q))
    squares, ints = q.new_empty(0, dtype=torch.int8), q.new_empty(0, dtype=torch.int32)
    if not _runs_kernels(q, backend):
        keys = q.new_empty(64 * theta.numel(), dtype=torch.int32)
        counts = q.new_empty(theta.shape, dtype=torch.int32)
        return o, theta, q.new_empty(64 * theta.numel(), dtype=_wide(q)), squares, keys, counts
    o2 = theta.new_empty(o.shape if save else (0,))
    if save and block_mask:
        n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sides = (n_tiles(q.shape[2], 64), n_tiles(k.shape[2], 64))
        squares = q.new_empty((n * q.shape[1], *sides), dtype=torch.int8)
    return o, theta, o2, squares, ints, ints.new_empty(0)


def _fake_attention_backward(
    do, q, k, v, theta, kept, squares, keys, counts, *options, backend="auto"
):
    bias, need_alpha, need_bias, need_slopes = options[6], *options[12:15]
    d_alpha, d_slopes = (
        q.new_empty(q.shape[1] if need else 0, dtype=_wide(q)) for need in (need_alpha, need_slopes)
    )
    d_bias = q.new_empty(bias.shape if need_bias and bias is not None else (0,), dtype=_wide(q))
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *fresh, d_alpha, d_bias, d_slopes


def _fake_attention_second(do, q, k, v, *options, backend="auto"):
    bias = options[12]
    shapes = (q.shape[1], 0 if bias is None else bias.shape, q.shape[1])
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (do, q, k, v))
    return *fresh, *(q.new_empty(shape, dtype=_wide(q)) for shape in shapes)


attention_second_backward = register_op(
    "adasplash::attention_second_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? to_q, Tensor? to_k, Tensor? to_v, "
    f"Tensor? to_alpha, Tensor? to_bias, Tensor? to_slopes, {_PAIRS}, str backend='auto') "
    f"-> ({', '.join(['Tensor'] * 7)})",
    implementations={"cpu": "adasplash._torch:attention_second_backward"},
    fake=_fake_attention_second,
    vmap=_one_by_one("attention_second_backward"),
)

attention_backward = register_op(
    "adasplash::attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor theta, Tensor kept, Tensor squares, "
    "Tensor keys, Tensor counts, "
    f"{_OPTIONS}, bool need_alpha, bool need_bias, bool need_slopes, "
    "str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "triton": "adasplash._triton.backward:launch_attention_backward",
        "cpu": "adasplash._torch:attention_backward",
    },
    why_not={"triton": lambda do, q, *_: _float64(q)},
    fake=_fake_attention_backward,
    setup_context=_autograd.attention_backward_context,
    backward=_autograd.attention_second_backward,
    vmap=_one_by_one("attention_backward"),
)

attention = register_op(
    "adasplash::attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool save, "
    "str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "triton": "adasplash._triton.forward:launch_attention_forward",
        "cpu": "adasplash._torch:attention_forward",
    },
    why_not={"triton": lambda q, *_: _float64(q)},
    fake=_fake_attention,
    setup_context=_autograd.attention_context,
    backward=_autograd.attention_backward,
    vmap=_one_by_one("attention"),
)


def _stats_why_not(q, k, tile, *options):
    if tile != 64:
        return f"kernels keep or skip tiles of 64, not of {tile}"
    return _float64(q)


def _fake_stats(q, k, tile, *options, backend="auto"):
    rows, heads = q.shape[:3], q.shape[:2]
    counts = (q.new_empty(heads, dtype=torch.int64) for _ in range(3))
    return q.new_empty(rows, dtype=torch.int64), q.new_empty(rows, dtype=_wide(q)), *counts


attention_stats = register_op(
    "adasplash::attention_stats",
    f"(Tensor q, Tensor k, int tile, {_PAIRS}, str backend='auto') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "triton": "adasplash._triton.forward:launch_attention_stats",
        "cpu": "adasplash._torch:attention_stats",
    },
    why_not={"triton": _stats_why_not},
    fake=_fake_stats,
)


# --- lazy attention -----------------------------------------------------------------------------


def _fake_lazy(q, k, v, bias, tau, window_size, varlen, mask, scale, save, backend="auto"):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    sums = (*q.shape[:3], 2, v.shape[-1]) if save and _runs_kernels(q, backend) else (0,)
    return o, *(q.new_empty(shape, dtype=_wide(q)) for shape in (q.shape[:3], sums))


def _fake_lazy_backward(do, q, k, v, bias, tau, *options, backend="auto"):
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *fresh, *(torch.empty(x.shape, dtype=_wide(q), device=q.device) for x in (bias, tau))


def _fake_lazy_second(do, q, k, v, bias, tau, *options, backend="auto"):
    fresh = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (do, q, k, v))
    return *fresh, *(torch.empty(x.shape, dtype=_wide(q), device=q.device) for x in (bias, tau))


lazy_second_backward = register_op(
    "adasplash::lazy_second_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor tau, Tensor lse, "
    "Tensor? to_q, Tensor? to_k, Tensor? to_v, Tensor? to_bias, Tensor? to_tau, "
    f"{_LAZY}, str backend='auto') -> ({', '.join(['Tensor'] * 6)})",
    implementations={"cpu": "adasplash._torch_lazy:lazy_second_backward"},
    fake=_fake_lazy_second,
    vmap=_one_by_one("lazy_second_backward"),
)

lazy_backward = register_op(
    "adasplash::lazy_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor tau, Tensor lse, "
    f"Tensor sums, {_LAZY}, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "triton": "adasplash._triton.lazy:launch_lazy_backward",
        "cpu": "adasplash._torch_lazy:lazy_backward",
    },
    why_not={"triton": lambda do, q, *_: _float64(q)},
    fake=_fake_lazy_backward,
    setup_context=_autograd.lazy_backward_context,
    backward=_autograd.lazy_second_backward,
    vmap=_one_by_one("lazy_backward"),
)

lazy = register_op(
    "adasplash::lazy",
    f"(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor tau, {_LAZY}, bool save, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)",
    implementations={
        "triton": "adasplash._triton.lazy:launch_lazy_forward",
        "cpu": "adasplash._torch_lazy:lazy_forward",
    },
    why_not={"triton": lambda q, *_: _float64(q)},
    fake=_fake_lazy,
    setup_context=_autograd.lazy_context,
    backward=_autograd.lazy_backward,
    vmap=_one_by_one("lazy"),
)
