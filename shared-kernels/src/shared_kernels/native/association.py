"""Repeated association by the native library: q <- softmax(scale q k^T + mask) k, then times v.

Workspace of a thread: the keys and values of one head four times, and 48 numbers per key.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import empty, run, zeros
from .library import why_not as no_library

__all__ = ["backward", "forward", "why_not"]

_SECONDS_PER_PRODUCT = 2e-11

_POINTERS = (
    *("q", "k", "v", "o", "seen", "add", "states", "lse"),
    *("d_out", "dq", "dk", "dv"),
)


class _AssociationCall(ctypes.Structure):
    """`AssociationCall` of association.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("B", "H", "L", "S", "D", "D_v", "steps")),
        *((f"{name}_step", ctypes.c_int64 * 3) for name in "qkv"),
        *((f"{name}_step", ctypes.c_int64 * 4) for name in ("seen", "add")),
        ("scale", ctypes.c_float),
    )


def why_not(*tensors: Tensor) -> str | None:
    """None where the native library associates such tensors; else the reason."""
    if any(x.dtype == torch.float64 for x in tensors):
        return f"the native association takes fp32, fp16 and bf16, got {torch.float64}"
    return no_library(*tensors)


class _Prepared:
    """The arguments as the library takes them; holds every tensor that a pointer points into."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, steps: int
    ) -> None:
        (B, H, L, D), (S, D_v) = q.shape, v.shape[2:]
        c = self.call = _AssociationCall()
        c.B, c.H, c.L, c.S, c.D, c.D_v, c.steps, c.scale = B, H, L, S, D, D_v, steps, scale
        self._held: list[Tensor] = []
        for name, x in zip("qkv", (q, k, v), strict=True):
            x = x.detach().float()
            x = self.put(name, x if x.stride(-1) == 1 else x.contiguous())
            setattr(c, f"{name}_step", (ctypes.c_int64 * 3)(*x.stride()[:3]))
        if mask is not None:
            name = "seen" if mask.dtype == torch.bool else "add"
            mask = mask if mask.dtype == torch.bool else mask.detach().float()
            whole = self.put(name, mask.expand(B, H, L, S))
            setattr(c, f"{name}_step", (ctypes.c_int64 * 4)(*whole.stride()))

    def put(self, name: str, x: Tensor) -> Tensor:
        self._held.append(x)
        setattr(self.call, name, x.data_ptr())
        return x

    def run(self, name: str, passes: int) -> None:
        c = self.call
        if c.B * c.H * c.L * c.S:
            products = c.B * c.H * c.L * c.S * (c.D + c.D_v + 20) * (c.steps + 1) * passes
            run(name, c, c.B * c.H, products * _SECONDS_PER_PRODUCT)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    steps: int,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale q k^T + mask) v after `steps` updates of q, and what `backward` asks for.

    Args:
        q, k, v: (B, H, L, D), (B, H, S, D), (B, H, S, D_v), fp32, fp16 or bf16; computed in fp32.
        mask: bool (True = seen) or floating (added); broadcasts to (B, H, L, S). A query that sees
            nothing gives zeros.
        save: whether the second and third result are wanted; they are empty without.

    Returns:
        (B, H, L, D_v) in the dtype of q; the updated states, times scale, (steps, B, H, L, D), and,
        (2, steps + 1, B, H, L), a score of each row and log2 of the sum of exponentials beside it,
        in fp32.
    """
    prepared = _Prepared(q, k, v, mask, scale, steps)
    B, H, L, D = q.shape
    # all of it is written, unless there is nothing to be added up
    make = empty if k.numel() else zeros
    out = prepared.put("o", make((B, H, L, v.shape[-1])))
    states, lse = empty((0,)), empty((0,))
    if save:
        states = prepared.put("states", zeros((steps, B, H, L, D)))
        lse = prepared.put("lse", zeros((2, steps + 1, B, H, L)).fill_(torch.inf))
    prepared.run("association_forward", 1)
    return out.to(q.dtype), states, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    steps: int,
    states: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` in q, k and v, each of the shape and dtype of its tensor.

    Args:
        states, lse: what `forward` gave where `save` was asked for.
        d_out: (B, H, L, D_v).
    """
    prepared = _Prepared(q, k, v, mask, scale, steps)
    prepared.put("states", states.contiguous())
    prepared.put("lse", lse.contiguous())
    prepared.put("d_out", d_out.detach().float().contiguous())
    found = [
        prepared.put(f"d{name}", zeros(x.shape)) for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    prepared.run("association_backward", 3)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv
