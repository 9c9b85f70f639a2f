"""Is the input legal? Shapes and dtypes always; values only where that costs no synchronisation."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks

BACKENDS = ("auto", "reference", "native", "torch", "cpu", "triton")


def backend(name: str) -> None:
    checks.in_set("backend", name, BACKENDS)


def steps(name: str, n: Any) -> None:
    checks.positive_int(name, n)


def alpha(value: Any) -> None:
    """A number in [1, 2] or a floating-point tensor with such values."""
    if isinstance(value, Tensor):
        checks.floating("alpha", value)
        if value.numel() and checks.reads_values(value):
            low, high = (float(x) for x in torch.aminmax(value.detach()))
            if not (low >= 1.0 and high <= 2.0):  # also NaN
                worst = high if low >= 1.0 else low
                checks.fail("alpha", "be in [1, 2]", worst, "1 is softmax, 2 is sparsemax")
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        checks.fail("alpha", "be a number or a tensor", type(value).__name__, error=TypeError)
    if not 1.0 <= float(value) <= 2.0:  # also NaN
        checks.fail("alpha", "be in [1, 2]", value, "1 is softmax, 2 is sparsemax")


def flag(name: str, value: Any, hint: str | None = None) -> None:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # NumPy's
        checks.fail(name, "be True or False", type(value).__name__, hint, TypeError)


def scale(value: Any, q: Tensor) -> float:
    """The factor of q k^T: a finite number, or None for 1 / sqrt(D)."""
    if value is None:
        return float(max(q.shape[-1] if q.dim() else 1, 1) ** -0.5)
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "multiply q by a learned scale" if isinstance(value, Tensor) else None
        checks.fail("scale", "be a number", type(value).__name__, hint, TypeError)
    if not math.isfinite(float(value)):
        checks.fail("scale", "be finite", value)
    return float(value)


def softcap(value: Any) -> float | None:
    """None, or the finite number above 0 that scores cannot reach."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        checks.fail("softcap", "be a number or None", type(value).__name__, error=TypeError)
    if not 0.0 < float(value) < math.inf:  # also NaN
        checks.fail("softcap", "be finite and above 0", value, "None leaves the scores as they are")
    return float(value)


def rows(x: Any, value: Any, dim: int) -> None:
    """``x`` with a row dimension ``dim``, and an ``alpha`` that broadcasts over its rows."""
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "have at least one dimension", "a scalar")
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        checks.fail("dim", "be an int", type(dim).__name__, error=TypeError)
    if not -x.dim() <= dim < x.dim():
        checks.fail("dim", f"be in [{-x.dim()}, {x.dim() - 1}]", dim, error=IndexError)
    alpha(value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return
    checks.same_device(x=x, alpha=value)
    wanted = list(x.shape)
    wanted[dim] = 1
    fits = value.dim() <= x.dim() and all(
        size in (1, want)
        for size, want in zip(reversed(value.shape), reversed(wanted), strict=False)
    )
    if not fits:
        checks.fail("alpha", f"broadcast to {tuple(wanted)}, one per row", tuple(value.shape))


def per_head(name: str, value: Tensor, H: int) -> None:
    """A scalar tensor, (H,) or (1, H, 1, 1)."""
    # Sizes one by one: inside torch.compile a tuple of them is in no tuple.
    at = {1: 0, 4: 1}.get(value.dim())
    fits = at is not None and value.numel() == H and value.shape[at] == H
    if value.numel() != 1 and not fits:
        checks.fail(name, f"be a scalar or have shape (H={H},)", tuple(value.shape))


def lengths(varlen: Any, B: int, N_q: int, N_k: int, name: str = "varlen") -> None:
    checks.integer(name, varlen)
    checks.shape(name, varlen, (B,), lambda: f"(B={B},)")
    if N_q != N_k:
        checks.fail("varlen", "come with N_q = N_k: one length serves both", f"{N_q} and {N_k}")
    if varlen.numel() and checks.reads_values(varlen):
        low, high = (int(x) for x in torch.aminmax(varlen))
        if low < 0 or high > N_k:
            checks.fail(name, f"be in [0, N={N_k}]", low if low < 0 else high)


def packed(cu_seqlens: Any, B: int, N_q: int, N_k: int) -> None:
    checks.integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        checks.fail("cu_seqlens", "have shape (sequences + 1,)", tuple(cu_seqlens.shape))
    if B != 1 or N_q != N_k:
        checks.fail(
            "cu_seqlens", "come with B = 1 and N_q = N_k (packed tokens)", f"B={B}, {N_q}, {N_k}"
        )
    if checks.reads_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        if (
            ends[0] != 0
            or ends[-1] > N_k
            or any(a > b for a, b in zip(ends, ends[1:], strict=False))
        ):
            checks.fail("cu_seqlens", f"rise from 0 to at most N={N_k}", ends)


def pairs(name: str, x: Tensor, B: int, H: int, N_q: int, N_k: int) -> Tensor:
    """``x`` with four dimensions that broadcast to (B, H, N_q, N_k)."""
    wanted = (B, H, N_q, N_k)
    padded = (1,) * (4 - x.dim()) + tuple(x.shape)
    if x.dim() > 4 or any(size not in (1, want) for size, want in zip(padded, wanted, strict=True)):
        checks.fail(name, f"broadcast to (B, H, N_q, N_k) = {wanted}", tuple(x.shape))
    return x.reshape(padded)


def mask(x: Any, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """None, or a boolean mask with four dimensions that broadcast to ``shape``."""
    if x is None:
        return None
    checks.tensor("mask", x)
    if x.dtype != torch.bool:
        checks.fail(
            "mask",
            "be a boolean tensor, True where attention is allowed",
            f"dtype {x.dtype}",
            "additive scores go into `bias`",
            TypeError,
        )
    checks.same_device(q=q, mask=x)
    return pairs("mask", x, *shape)
