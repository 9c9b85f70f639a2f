"""Attention over a band and landmarks by the native library.

    o_i = sum_j M_ij exp(scale q_i k_j) v_j / sum_j M_ij exp(scale q_i k_j)

At distance d = i - j >= 0 a key has M = m(d) = clamp((R + w_i - d) / R, 0, 1); a landmark adds
(1 - m) exp(bias). Workspace of a thread: what the widest window and a list of landmarks hold, times
the head dim.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import MAX_HEAD_DIM
from .library import call, in_ranges, run
from .library import why_not as no_library

__all__ = ["Band", "backward", "forward", "why_not"]

_SECONDS_PER_PRODUCT = 4e-11  # of a multiply-add, with all that belongs to it

_POINTERS = (
    *("q", "k", "v", "o", "top", "lse", "windows", "landmarks", "bias", "starts", "lists"),
    *("d_out", "dq", "dk", "dv", "d_windows", "d_bias"),
)
_NUMBERS = ("H", "H_kv", "N_q", "N_k", "D", "n_lists", "K")


class _BandCall(ctypes.Structure):
    """`BandCall` of band.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((f"{name}_step", ctypes.c_int64 * 3) for name in "qkv"),
        ("scale", ctypes.c_double),
        ("ramp", ctypes.c_double),
    )


class Band(NamedTuple):
    """What is computed.

    Args:
        q: (B, H, N_q, D), fp64, fp32, fp16 or bf16: the last N_q of N_k tokens. The half types are
            computed in fp32.
        k, v: (B, H_kv, N_k, D), H a multiple of H_kv.
        windows: (B, H, N_q), w in tokens, >= 0.
        landmarks: (B, H, lists, K) int32, each key at most once in a list; negative: empty.
        bias: the shape of landmarks, or None.
        starts, lists: (N_q,) int64, the first visible key and the list of each query. Queries of
            one sequence have one start and lie side by side.
        scale: factor of q k^T.
        ramp: R > 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    windows: Tensor
    landmarks: Tensor
    bias: Tensor | None
    starts: Tensor
    lists: Tensor
    scale: float
    ramp: float


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None where the native library computes attention of such tensors; else the reason."""
    D = q.shape[-1]
    if D > MAX_HEAD_DIM:
        return f"native attention over a band takes head dims up to {MAX_HEAD_DIM}, got {D}"
    return no_library(q, k, v)


class _Prepared:
    """The arguments as the library takes them; holds every tensor that a pointer points into."""

    def __init__(self, a: Band) -> None:
        self.shape = a.q.shape
        self.dtype = torch.float64 if a.q.dtype == torch.float64 else torch.float32
        B, H, N_q, D = a.q.shape
        H_kv, N_k = a.k.shape[1:3]
        self.items, self.wide = B * H_kv, -(-D // 16) * 16
        c = self.call = _BandCall()
        self._held: list[Tensor] = []
        for name, x in zip("qkv", (a.q, a.k, a.v), strict=True):
            x = x.detach().to(self.dtype)
            x = x if x.stride(-1) == 1 else x.contiguous()
            self.put(name, x)
            setattr(c, f"{name}_step", (ctypes.c_int64 * 3)(*x.stride()[:3]))
        self.put("windows", a.windows.detach().to(self.dtype).contiguous())
        self.put("landmarks", a.landmarks.to(torch.int32).contiguous())
        if a.bias is not None:
            self.put("bias", a.bias.detach().to(self.dtype).contiguous())
        self.put("starts", a.starts.contiguous())
        self.put("lists", a.lists.contiguous())
        c.H, c.H_kv, c.N_q, c.N_k, c.D = H, H_kv, N_q, N_k, D
        c.n_lists, c.K = a.landmarks.shape[2:]
        c.scale, c.ramp = a.scale, a.ramp

    def put(self, name: str, x: Tensor) -> Tensor:
        self._held.append(x)
        setattr(self.call, name, x.data_ptr())
        return x

    def run(self, name: str, windows: Tensor, products: int, d_out: Tensor | None = None) -> None:
        """Call the library; a given `d_out` is made contiguous for one item at a time."""
        if not self.shape.numel():
            return
        keys = min(float(windows.detach().mean()) + self.call.ramp + self.call.K, self.call.N_k)
        seconds = self.shape.numel() * keys * products * _SECONDS_PER_PRODUCT
        name = f"band_double_{name}" if self.dtype == torch.float64 else f"band_{name}"
        if d_out is None:
            run(name, self.call, self.items, seconds)
            return

        def part(start: int, stop: int) -> None:
            own = _BandCall.from_buffer_copy(self.call)
            heads = d_out.unflatten(1, (self.call.H_kv, -1)).flatten(0, 1)  # (items, group, N_q, D)
            for item in range(start, stop):
                rows = heads[item].to(self.dtype).contiguous()
                own.d_out = rows.data_ptr() - item * rows.numel() * rows.element_size()
                call(name, ctypes.c_void_p(ctypes.addressof(own)), item, item + 1)

        in_ranges(part, self.items, seconds)


def forward(a: Band) -> tuple[Tensor, Tensor, Tensor]:
    """The attention's output in the dtype of q; the largest score of each row; the log-sum-exp.

    The latter is to the base 2, of scores less the largest. A row whose scores are all -inf gives
    zeros and a log-sum-exp of inf.
    """
    prepared = _Prepared(a)
    rows = a.q.shape[:-1]
    o, top, lse = (a.q.new_empty(x, dtype=prepared.dtype) for x in (a.q.shape, rows, rows))
    for name, x in (("o", o), ("top", top), ("lse", lse)):
        prepared.put(name, x)
    prepared.run("forward", a.windows, 2)
    return o.to(a.q.dtype), top, lse


def backward(
    a: Band,
    out: Tensor,
    top: Tensor,
    lse: Tensor,
    d_out: Tensor,
    need_windows: bool,
    need_bias: bool,
) -> dict[str, Tensor]:
    """Gradients in q, k, v, and in windows and bias where they are needed, all in the type that
    is computed in."""
    prepared = _Prepared(a)
    for name, x in (("o", out), ("top", top), ("lse", lse)):
        prepared.put(name, x.detach().to(prepared.dtype).contiguous())
    d_out = d_out.detach()
    is_ready = d_out.dtype == prepared.dtype and d_out.is_contiguous()
    if is_ready:
        prepared.put("d_out", d_out)
    found = {"q": prepared.put("dq", a.q.new_empty(a.q.shape, dtype=prepared.dtype))}
    padded = (*a.k.shape[:3], prepared.wide)
    for name in "kv":
        whole = prepared.put(f"d{name}", a.k.new_zeros(padded, dtype=prepared.dtype))
        found[name] = whole[..., : a.k.shape[-1]]
    if need_windows:
        windows = a.windows.new_empty(a.windows.shape, dtype=prepared.dtype)
        found["windows"] = prepared.put("d_windows", windows)
    if need_bias and a.bias is not None:
        bias = a.bias.new_zeros(a.bias.shape, dtype=prepared.dtype)
        found["bias"] = prepared.put("d_bias", bias)
    prepared.run("backward", a.windows, 5, None if is_ready else d_out)
    return found
