"""Lazy attention by the native library: softmax plus tau over the row's number, cut at 0.

    w_ij = [softmax_j(scale q_i k_j + bias[h, i - j]) + tau_h / i]_+ for j <= i,    o = w v

i counts from 1; the bias is 0 beyond the window. `forward` gives the output and what `backward`
needs; both use memory in proportion to the lengths.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .library import run, zeros

__all__ = ["Arguments", "backward", "forward"]

_SECONDS_PER_PRODUCT = 1e-10  # of one multiply-add of q k^T

_POINTERS = (
    *("q", "k", "v", "o", "lse", "bias", "tau", "mask", "lengths"),
    *("d_out", "dq", "dk", "dv", "d_bias", "d_tau"),
)


class _LazyCall(ctypes.Structure):
    """`LazyCall` of lazy.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("H", "H_kv", "N", "D", "D_v", "window")),
        ("mask_step", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
    )


class Arguments(NamedTuple):
    """What is computed.

    Args:
        q: (B, H, N, D), fp64, fp32, fp16 or bf16; the half types are computed in fp32.
        k, v: (B, H_kv, N, D) and (B, H_kv, N, D_v), H a multiple of H_kv.
        bias: (H, W + 1), added to the score of a key so many positions behind; a pair whose score
            is -inf is hidden as the mask hides one.
        tau: (H,).
        scale: the factor of q k^T.
        varlen: (B,) lengths.
        mask: bool, broadcasts to (B, H, N, N); True where a key is seen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tau: Tensor
    scale: float
    varlen: Tensor | None = None
    mask: Tensor | None = None


def _computed_in(a: Arguments) -> torch.dtype:
    return torch.float64 if a.q.dtype == torch.float64 else torch.float32


def _run(name: str, a: Arguments, **more: Tensor) -> None:
    """The library's function `name` on the arguments and the further tensors of its call."""
    B, H, N, D = a.q.shape
    dtype = _computed_in(a)
    of = "lazy_double" if dtype == torch.float64 else "lazy"
    floats = ("q", "k", "v", "bias", "tau")
    tensors = {x: getattr(a, x).detach().to(dtype).contiguous() for x in floats}
    lengths = (
        torch.full((B,), N, device="cpu") if a.varlen is None else a.varlen.long().contiguous()
    )
    tensors |= {"lengths": lengths, **more}
    c = _LazyCall()
    if a.mask is not None:
        tensors["mask"] = a.mask.detach().expand(B, H, N, N)
        c.mask_step = (ctypes.c_int64 * 4)(*tensors["mask"].stride())
    for field, x in tensors.items():
        setattr(c, field, x.data_ptr())
    c.H, c.H_kv, c.N, c.D, c.D_v = H, a.k.shape[1], N, D, a.v.shape[-1]
    c.window, c.scale = a.bias.shape[1] - 1, a.scale
    if a.q.numel():
        seconds = B * H * N * N * D * _SECONDS_PER_PRODUCT
        run(f"{of}_{name}", c, B * c.H_kv, seconds)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D_v) in the dtype of q, and log2 of each row's sum (B, H, N).

    A query that sees no key, and one behind its sequence's end, gives zeros.
    """
    dtype = _computed_in(a)
    o = zeros((*a.q.shape[:3], a.v.shape[-1]), dtype)
    lse = zeros(a.q.shape[:3], dtype)
    _run("forward", a, o=o, lse=lse)
    return o.to(a.q.dtype), lse


def backward(a: Arguments, lse: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """The gradients of `forward` by the names of q, k, v, bias and tau, in their shapes and dtypes.

    `lse` is the second result of `forward`.
    """
    B, H = a.q.shape[:2]
    dtype = _computed_in(a)
    dq, dk, dv = (zeros(x.shape, dtype) for x in (a.q, a.k, a.v))
    d_bias = zeros((B, H, a.bias.shape[1]), torch.float64)
    d_tau = zeros(a.q.shape[:3], dtype)
    d_out = d_out.detach().to(dtype).contiguous()
    more = {"lse": lse, "d_out": d_out, "dq": dq, "dk": dk, "dv": dv}
    _run("backward", a, **more, d_bias=d_bias, d_tau=d_tau)
    found = {"q": dq, "k": dk, "v": dv, "bias": d_bias.sum(0), "tau": d_tau.double().sum((0, 2))}
    return {name: x.to(getattr(a, name).dtype) for name, x in found.items()}
