"""Three legs for every number: the fast path, a float64 reference, plain PyTorch in the dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import ops
from .tolerances import assert_close, assert_no_worse


def _run(
    fn: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    differentiable: Sequence[str],
    dtype: torch.dtype,
    rounded_to: torch.dtype,
    seed: int,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    cast: dict[str, Tensor] = {}
    for name, x in inputs.items():
        if x.is_floating_point():
            # The reference sees the very numbers that the fast path sees, but keeps them exact.
            x = x.detach().to(rounded_to).to(dtype)
            x.requires_grad_(name in differentiable)
        cast[name] = x
    out = fn(**cast)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    if not differentiable:
        return outs, {}
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=dtype)
    for o in outs:
        if o.requires_grad:
            weight = torch.randn(o.shape, generator=generator, dtype=torch.float64)
            weight = weight.to(rounded_to).to(o.dtype).to(o.device)
            loss = loss + (o * weight).sum().to(loss)
    grads = torch.autograd.grad(loss, [cast[n] for n in differentiable], allow_unused=True)
    zeros = [torch.zeros_like(cast[n]) for n in differentiable]
    found = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
    return outs, dict(zip(differentiable, found, strict=True))


def compare(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    *,
    differentiable: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Compare ``fn(**inputs)`` in ``dtype`` with ``reference(**inputs)`` in float64.

    Values, and gradients of a random projection with respect to ``differentiable``. In half types
    the reference also runs in ``dtype`` and the rule is :func:`assert_no_worse`. The inputs must be
    left as they were.
    """
    ours, our_grads = _run(fn, inputs, differentiable, dtype, dtype, seed)
    exact, exact_grads = _run(reference, inputs, differentiable, torch.float64, dtype, seed)
    half = dtype in (torch.float16, torch.bfloat16)
    if half:
        # an op would give its reference half types in fp32
        with mock.patch.object(ops, "_is_half", return_value=False):
            eager, eager_grads = _run(reference, inputs, differentiable, dtype, dtype, seed)
    if len(ours) != len(exact):
        raise AssertionError(f"{len(ours)} outputs, the reference has {len(exact)}")
    for i, (o, e) in enumerate(zip(ours, exact, strict=True)):
        if o.dtype != dtype:
            raise AssertionError(f"output {i} has dtype {o.dtype}, expected {dtype}")
        if half:
            assert_no_worse(o, eager=eager[i], exact=e)
        else:
            assert_close(o, e, "forward")
    for name in differentiable:
        try:
            if half:
                assert_no_worse(our_grads[name], eager=eager_grads[name], exact=exact_grads[name])
            else:
                assert_close(our_grads[name], exact_grads[name], "gradient")
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
