"""Decoding over pages by the native library: it reads the pages that can hold a weight.

    x = cap(scale q k^T) - slope distance,    weights [s x - tau]_+^(1/s), times v

What a page can hold is known by its bounds, which `shared_kernels.pages` makes and explains.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .library import run, zeros
from .library import why_not as no_library

__all__ = ["Pages", "decode", "why_not"]

_SECONDS_PER_BOUND = 1e-10  # of one multiply-add of a bound
_POINTERS = (
    *("q", "keys", "values", "bounds", "out", "read"),
    *("table", "lengths", "s", "slopes", "s_aux"),
)
_NUMBERS = ("B", "H", "H_kv", "n", "D", "D_v", "pages", "size", "most", "window")


class _PagesCall(ctypes.Structure):
    """`PagesCall` of pages.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Pages(NamedTuple):
    """What is decoded.

    Args:
        q: (B, H, n, D) fp32, the newest n queries of each sequence.
        keys, values: (H_kv, pages, size, D) and (..., D_v) fp32, contiguous, H a multiple of H_kv,
            size a multiple of 16.
        bounds: (H_kv, pages, 2 D) fp32, contiguous.
        table: (B, M) int64, the pages of each sequence in order.
        lengths: (B,) int64.
        s: (H,) fp64, in (0, 1]; a head with 0 is not decoded.
        scale: the factor of q k^T.
        slopes: (H,) fp32, or None.
        window: keys at a distance of `window` or more are not seen.
        s_aux: (H,) fp32, a score of each head that has no value, or None.
        softcap: scale q k^T becomes softcap tanh(scale q k^T / softcap); None: it does not.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    bounds: Tensor
    table: Tensor
    lengths: Tensor
    s: Tensor
    scale: float
    slopes: Tensor | None = None
    window: int | None = None
    s_aux: Tensor | None = None
    softcap: float | None = None


def why_not(a: Pages) -> str | None:
    """None where the native library decodes over these pages; else the reason."""
    tensors = (a.q, a.keys, a.values)
    other = next((x.dtype for x in tensors if x.dtype != torch.float32), None)
    if other is not None:
        return f"native decoding over pages takes fp32, got {other}"
    if not (a.keys.is_contiguous() and a.values.is_contiguous() and a.bounds.is_contiguous()):
        return "native decoding over pages takes contiguous pools of pages"
    if a.keys.shape[2] % 16:
        return f"native decoding takes pages of a multiple of 16 keys, got {a.keys.shape[2]}"
    return no_library(*tensors)


def decode(a: Pages) -> tuple[Tensor, Tensor]:
    """The output (B, H, n, D_v), and how many pages were read, (B, H_kv) int64.

    -1 pages say that the bounds of a head do not separate, and that its output means nothing: many
    rows that need many pages are better read at once. A row alone is always decoded.
    """
    (B, H, n, D), (H_kv, pages, size, D_v) = a.q.shape, a.values.shape
    out, read = zeros((B, H, n, D_v)), zeros((B, H_kv), torch.int64)
    c = _PagesCall()
    slopes, s_aux = (
        None if x is None else x.detach().float().contiguous() for x in (a.slopes, a.s_aux)
    )
    tensors = {
        "q": a.q.detach().contiguous(),
        "table": a.table.contiguous(),
        "lengths": a.lengths.contiguous(),
        "s": a.s.detach().double().contiguous(),
        "slopes": slopes,
        "s_aux": s_aux,
        "out": out,
        "read": read,
    }
    for name in _POINTERS:
        x = tensors.get(name, getattr(a, name, None))
        setattr(c, name, None if x is None else x.data_ptr())
    c.B, c.H, c.H_kv, c.n, c.D, c.D_v = B, H, H_kv, n, D, D_v
    c.pages, c.size, c.most, c.scale = pages, size, a.table.shape[1], a.scale
    c.window = -1 if a.window is None else a.window
    c.softcap = 0.0 if a.softcap is None else a.softcap
    if out.numel():
        seconds = _SECONDS_PER_BOUND * 2 * D * H * n * int(a.lengths.sum()) / size
        run("pages_decode", c, B * H_kv, seconds)
    return out, read
