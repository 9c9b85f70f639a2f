"""Sparse attention by the native library: weights [s x - tau]_+^(1/s) of x, times v.

    x = cap(scale q k^T) + bias - slope |distance|,    cap(x) = softcap tanh(x / softcap)

Both ends of queries and keys are at one position. A sink is one more score of each row that sees a
key; its value is 0.

`forward` gives the output and what `backward` needs; both use memory in proportion to the lengths.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import MAX_HEAD_DIM
from . import library
from .library import empty, run, zeros
from .library import why_not as no_library

__all__ = ["Arguments", "Gradients", "Kept", "backward", "forward", "why_not"]

_SECONDS_PER_PRODUCT = 1e-10  # of one multiply-add of q k^T

_POINTERS = (
    *("q", "k", "v", "o", "top", "unit", "inverse", "keys", "p", "counts", "s", "slopes", "mask"),
    *("bias", "segments", "d_out", "dq", "dk", "dv", "d_s", "d_slope", "dbias", "s_aux", "d_aux"),
)
_NUMBERS = ("H", "H_kv", "N_q", "N_k", "D", "D_v", "room", "window")


class _AttentionCall(ctypes.Structure):
    """`AttentionCall` of attention.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("mask_step", ctypes.c_int64 * 4),
        ("bias_step", ctypes.c_int64 * 4),
        ("dbias_step", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("causal", ctypes.c_int),
        ("skip", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("coarse", ctypes.c_int),
    )


class Arguments(NamedTuple):
    """What is computed.

    Args:
        q: (B, H, N_q, D), fp64, fp32, fp16 or bf16; the half types are computed in fp32.
        k, v: (B, H_kv, N_k, D) and (B, H_kv, N_k, D_v), H a multiple of H_kv.
        s: in [0, 1], a number or one per head, (H,); 0 is softmax, 1/2 is 1.5-entmax.
        scale: the factor of q k^T; D ** -0.5 if None.
        window: keys at a distance of `window` or more are not seen.
        varlen: (B,) lengths, or (B, 2) for queries and keys.
        cu_seqlens: (n + 1,) ends of sequences that lie side by side; B = 1.
        mask: bool, broadcasts to (B, H, N_q, N_k); True where a key is seen.
        bias: broadcasts to (B, H, N_q, N_k).
        slopes: (H,), times the distance of query and key, subtracted from the score.
        s_aux: (H,), the scores of the sinks.
        softcap: above 0; scores before the bias lie within it on both sides.
        n_iter: the most steps that a threshold is solved in; it stops earlier where it is exact.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    s: float | Tensor = 0.5
    is_causal: bool = False
    scale: float | None = None
    window: int | None = None
    varlen: Tensor | None = None
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    s_aux: Tensor | None = None
    softcap: float | None = None
    n_iter: int = 60


class Kept(NamedTuple):
    """What `backward` needs of `forward`: thresholds, sums, and the weights that fitted in."""

    top: Tensor
    unit: Tensor
    inverse: Tensor
    keys: Tensor
    p: Tensor
    counts: Tensor


class Gradients(NamedTuple):
    """In the arguments' shapes; of s, slopes and sinks per query, (B, H, N_q), to be summed."""

    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor | None
    slopes: Tensor | None
    bias: Tensor | None
    s_aux: Tensor | None = None


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None where the native library computes attention of such tensors; else the reason."""
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"native attention takes head dims up to {MAX_HEAD_DIM}, got {widest}"
    return no_library(q, k, v)


def _segments(a: Arguments) -> Tensor:
    """(n, 5) int64: batch, first query, queries, first key, keys of each sequence."""
    B, N_q, N_k = a.q.shape[0], a.q.shape[2], a.k.shape[2]
    if a.cu_seqlens is not None:
        ends = a.cu_seqlens.long()
        n = ends.diff()
        return torch.stack([torch.zeros_like(n), ends[:-1], n, ends[:-1], n], 1).contiguous()
    # NumPy fills a few numbers in a tenth of the time that an operator of torch takes to begin
    sizes = np.zeros((B, 5), dtype=np.int64)
    sizes[:, 0], sizes[:, 2], sizes[:, 4] = np.arange(B), N_q, N_k
    found = torch.from_numpy(sizes)
    if a.varlen is not None:
        found[:, 2::2] = a.varlen.view(B, 1 if a.varlen.dim() == 1 else 2)
    return found


def _spread(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x in `dtype` by strides, expanded to `shape`: a copy holds no number twice."""
    x = x.detach()
    if x.dtype != dtype:
        for dim, step in enumerate(x.stride()):
            if step == 0:
                x = x.narrow(dim, 0, 1) if x.shape[dim] else x
        x = x.to(dtype)
    return x.expand(shape)


class _Prepared:
    """The arguments as the library takes them; holds every tensor that a pointer points into."""

    def __init__(self, a: Arguments):
        self.dtype = torch.float64 if a.q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = (self.wide(x) for x in (a.q, a.k, a.v))
        self.shape = (*a.q.shape[:2], a.q.shape[2], a.k.shape[2])
        B, H, N_q, N_k = self.shape
        D = a.q.shape[-1]
        s = torch.as_tensor(a.s, dtype=torch.float64, device="cpu").detach()
        self.s = s.reshape(-1).expand(H).contiguous()
        self.segments = _segments(a)
        # whether each query and each key belongs to a sequence, and there are numbers in both
        self.covers = a.varlen is None and a.cu_seqlens is None and a.q.numel() * a.v.numel() > 0
        self.slopes, self.s_aux = (
            None if x is None else self.wide(x).view(-1).expand(H).contiguous()
            for x in (a.slopes, a.s_aux)
        )
        self.mask = None if a.mask is None else a.mask.detach().expand(self.shape)
        self.bias = None if a.bias is None else _spread(a.bias, self.shape, self.dtype)
        c = self.call = _AttentionCall()
        for name in ("q", "k", "v", "s", "segments", "slopes", "s_aux", "mask", "bias"):
            self.put(name, getattr(self, name))
        for name, x in (("mask_step", self.mask), ("bias_step", self.bias)):
            self.put_steps(name, x)
        c.H, c.H_kv, c.N_q, c.N_k, c.D, c.D_v = H, a.k.shape[1], N_q, N_k, D, a.v.shape[-1]
        c.window = -1 if a.window is None else a.window
        c.scale = D**-0.5 if a.scale is None else a.scale
        c.softcap = a.softcap or 0.0
        c.causal = a.is_causal
        # the key that stands for a tile bounds the tile's scores where no mask or bias changes them
        c.skip = a.mask is None and a.bias is None
        c.steps = a.n_iter
        c.coarse = library.multiplies_bytes()

    def wide(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype).contiguous()

    def zeros(self, *shape: int) -> Tensor:
        return zeros(shape, self.dtype)

    def put_steps(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            setattr(self.call, name, (ctypes.c_int64 * 4)(*x.stride()))

    def put(self, name: str, x: Tensor | None) -> None:
        setattr(self.call, name, None if x is None else x.data_ptr())

    def run(self, name: str, alone: bool = False) -> None:
        items = len(self.segments) * self.call.H_kv
        products = self.q.numel() * self.call.N_k
        seconds = 0.0 if alone else products * _SECONDS_PER_PRODUCT
        of = "attention_double" if self.dtype == torch.float64 else "attention"
        run(f"{of}_{name}", self.call, items, seconds)


def forward(a: Arguments, room: int = 64) -> tuple[Tensor, Kept | None]:
    """The attention's output (B, H, N_q, D_v) in the dtype of q, and what `backward` needs.

    A query that sees no key, and one behind its sequence's end, gives zeros. A value that is not
    finite reaches every query that gives it a weight, and no other. (A product of matrices, as in
    the reference, gives NaN to the others, too: 0 times infinity.)

    Args:
        a: what is computed.
        room: how many weights may be kept per query, on average of a head; a block of queries whose
            weights do not fit in is computed again by `backward`. 0: no backward pass will follow.
    """
    prepared = _Prepared(a)
    B, H, N_q, _ = prepared.shape
    # the library writes the rows of all sequences
    new = empty if prepared.covers else zeros
    o = new((B, H, N_q, a.v.shape[-1]), prepared.dtype)
    top, unit, inverse = (prepared.zeros(B, H, N_q) for _ in range(3))
    kept = None
    if room:
        prepared.call.room = room
        # zeros where nothing is kept: the op's results are then the same in each run
        keys = zeros((B, H, N_q, room), torch.int32)
        counts = zeros(unit.shape, torch.int32)
        kept = Kept(top, unit, inverse, keys, prepared.zeros(*keys.shape), counts)
        for name in ("keys", "p", "counts"):
            prepared.put(name, getattr(kept, name))
    for name, x in (("o", o), ("top", top), ("unit", unit), ("inverse", inverse)):
        prepared.put(name, x)
    if o.numel() and a.k.shape[2]:
        prepared.run("forward")
    return o.to(a.q.dtype), kept


def backward(
    a: Arguments,
    kept: Kept,
    d_out: Tensor,
    need_s: bool = False,
    need_slopes: bool = False,
    need_bias: bool = False,
    need_sinks: bool = False,
) -> Gradients:
    """Gradients of `forward`; those in s, slopes, bias and sinks only where they are asked for."""
    prepared = _Prepared(a)
    d_out = prepared.wide(d_out)
    new = empty if prepared.covers else zeros
    dq, dk, dv = (new(x.shape, prepared.dtype) for x in (a.q, a.k, a.v))
    d_s, d_slope, d_aux = (
        prepared.zeros(*prepared.shape[:3]) if need else None
        for need in (need_s, need_slopes, need_sinks)
    )
    dbias = bias = None
    if need_bias and a.bias is not None:
        bias = prepared.zeros(*a.bias.shape)
        dbias = bias.expand(prepared.shape)
    named = (("d_out", d_out), ("dq", dq), ("dk", dk), ("dv", dv), ("d_s", d_s), ("d_aux", d_aux))
    for name, x in (*named, ("d_slope", d_slope), ("dbias", dbias), *kept._asdict().items()):
        prepared.put(name, x)
    prepared.call.room = kept.keys.shape[-1]
    if d_out.numel() and a.k.shape[2]:
        prepared.put_steps("dbias_step", dbias)
        # what heads, batches or packed sequences share of a bias is added to by one thread
        shared = dbias is not None and (0 in dbias.stride()[:2] or a.cu_seqlens is not None)
        prepared.run("backward", alone=shared)
    if bias is not None and a.bias is not None:
        bias = bias.to(a.bias.dtype)
    dq, dk, dv = dq.to(a.q.dtype), dk.to(a.k.dtype), dv.to(a.v.dtype)
    return Gradients(dq, dk, dv, d_s, d_slope, bias, d_aux)
