"""Is the input legal? One grammar of messages: what must hold, what was got, what to do."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE

MAX_HEAD_DIM = 256


def fail(
    name: str,
    must: str,
    got: object,
    hint: str | None = None,
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``error``: "`name` must <must>, got <got>; <hint>"."""
    tail = f"; {hint}" if hint else ""
    raise error(f"`{name}` must {must}, got {got}{tail}")


def reads_values(*tensors: torch.Tensor) -> bool:
    """Whether a check may look at values: CPU tensors that have some.

    They have none outside of eager code (compile, export, vmap and graph capture), and none where a
    FakeTensorMode is on.
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None:
        return False
    return all(t.device.type == "cpu" and has_values(t) for t in tensors)


def has_values(x: torch.Tensor) -> bool:
    """Whether there are numbers to read: not on meta, in a FakeTensorMode or inside torch.func."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not (x.is_meta or isinstance(x, FakeTensor) or wrapped)


def tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        fail(name, "be a torch.Tensor", type(x).__name__, error=TypeError)


def floating(name: str, x: Any, may_be_sparse: bool = False) -> None:
    tensor(name, x)
    if not x.is_floating_point():
        fail(name, "be a floating-point tensor", f"dtype {x.dtype}", error=TypeError)
    if not may_be_sparse:
        dense(name, x)


def dense(name: str, x: torch.Tensor) -> None:
    if x.is_nested:
        fail(name, "be a dense tensor", "a nested one", "pad it", TypeError)
    if x.layout != torch.strided:
        fail(name, "be a dense tensor", x.layout, f"pass {name}.to_dense()", TypeError)


def integer(name: str, x: Any) -> None:
    tensor(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        fail(name, "be an integer tensor", f"dtype {x.dtype}", error=TypeError)


def in_set(name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        fail(name, f"be one of {listed}", repr(value))


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        fail(name, "be an int", type(value).__name__, error=TypeError)
    if int(value) < 1:
        fail(name, "be at least 1", value)


def flag(name: str, value: Any) -> bool:
    """True or False, numpy's own included."""
    if not isinstance(value, (bool, np.bool_)):
        fail(name, "be True or False", repr(value), error=TypeError)
    return bool(value)


def _agree(what: str, values: dict[str, Any]) -> None:
    (first, expected), *rest = values.items()
    for name, value in rest:
        if value != expected:
            fail(name, f"have the {what} of `{first}` ({expected})", value)


def same_device(**tensors: torch.Tensor | None) -> None:
    _agree("device", {k: t.device for k, t in tensors.items() if t is not None})


def same_dtype(**tensors: torch.Tensor | None) -> None:
    _agree("dtype", {k: t.dtype for k, t in tensors.items() if t is not None})


def shape(
    name: str,
    x: torch.Tensor,
    expected: tuple[int | None, ...],
    spelled: str | Callable[[], str],
) -> None:
    """``expected`` has None where any size is allowed; ``spelled`` is the shape in letters.

    With sizes in its text ``spelled`` is a function: torch.compile fixes a size once it is spelled.
    """
    fits = x.dim() == len(expected) and all(
        want is None or size == want for size, want in zip(x.shape, expected, strict=True)
    )
    if not fits:
        text = spelled if isinstance(spelled, str) else spelled()
        fail(name, f"have shape {text}", tuple(x.shape))


class AttentionShape(NamedTuple):
    B: int
    H: int
    H_kv: int
    N_q: int
    N_k: int
    D: int
    D_v: int


def attention_shapes(q: Any, k: Any, v: Any, least: int = 1) -> AttentionShape:
    """Check q (B, H, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v) and return the sizes.

    ``least``: the smallest number of heads and head dim that the caller takes, 0 or 1.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating(name, x)
        if x.dim() != 4:
            fail(name, "have four dimensions (B, H, N, D)", f"shape {tuple(x.shape)}")
    same_device(q=q, k=k, v=v)
    same_dtype(q=q, k=k, v=v)
    (B, H, N_q, D), (_, H_kv, N_k, _), D_v = q.shape, k.shape, v.shape[-1]
    shape("k", k, (B, None, None, D), lambda: f"(B={B}, H_kv, N_k, D={D}) like q")
    shape("v", v, (B, H_kv, N_k, None), lambda: f"(B={B}, H_kv={H_kv}, N_k={N_k}, D_v) like k")
    if (H_kv == 0 and (least > 0 or H > 0)) or (H_kv > 0 and H % H_kv):
        fail("q", "have a number of heads divisible by k's (grouped queries)", f"{H} and {H_kv}")
    for name, dim in (("q", D), ("v", D_v)):
        if not least <= dim <= MAX_HEAD_DIM:
            fail(name, f"have a head dim in [{least}, {MAX_HEAD_DIM}]", dim)
    return AttentionShape(B, H, H_kv, N_q, N_k, D, D_v)
