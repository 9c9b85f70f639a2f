"""Is the input legal? Messages name stored, state and projection."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from shared_kernels import checks
from shared_kernels.ops import autocast_on

# An additive mask of at most this is a mask: beside any score, its weight is 0.
MASKED = -1e4
DIFFUSION_MODES = ("factored", "simple", "iterative", "spectral", "ppr", "heat")
ATTENTION_MODES = ("dense", "graph")
BACKENDS = ("auto", "reference", "torch", "cpu", "triton")


def patterns(data: Any, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(stored, state, projection), each (B, N, size), from one tensor or a tuple of three."""
    if isinstance(data, Tensor):
        data = (data, data, data)
    if not isinstance(data, (tuple, list)) or len(data) != 3:
        got = f"{len(data)} entries" if isinstance(data, (tuple, list)) else type(data).__name__
        checks.fail(
            "input", "be one tensor or the tuple (stored, state, projection)", got, error=TypeError
        )
    for name, x in zip(("stored", "state", "projection"), data, strict=True):
        checks.floating(name, x)
        if x.dim() != 3:
            order = "(batch, patterns, size)" if batch_first else "(patterns, batch, size)"
            checks.fail(name, f"have three dimensions {order}", f"shape {tuple(x.shape)}")
    stored, state, projection = data
    # under autocast the layers' inputs meet in its dtype
    if not autocast_on(stored.device.type):
        checks.same_dtype(stored=stored, state=state, projection=projection)
    checks.same_device(stored=stored, state=state, projection=projection)
    if not batch_first:
        # what was one tensor stays one: a memory that associates with itself is told by identity
        turned = stored.transpose(0, 1)
        state = turned if state is stored else state.transpose(0, 1)
        projection = turned if projection is stored else projection.transpose(0, 1)
        stored = turned
    if stored.shape[:2] != projection.shape[:2]:
        checks.fail(
            "projection",
            f"have as many patterns as `stored`, {tuple(stored.shape[:2])} (batch, patterns)",
            tuple(projection.shape[:2]),
            "the order is (stored, state, projection)",
        )
    if stored.shape[0] != state.shape[0]:
        checks.fail(
            "state",
            f"have the batch size of `stored`, {stored.shape[0]}",
            state.shape[0],
            "the order is (stored, state, projection)",
        )
    return stored, state, projection


def pattern_size(name: str, x: Tensor, size: int | None) -> None:
    if size is not None and x.shape[-1] != size:
        checks.fail(
            name,
            f"have last dimension {size}",
            x.shape[-1],
            "the order is (stored, state, projection)",
        )


def _one_per_head(name: str, value: Tensor, num_heads: int) -> None:
    if value.shape != (num_heads,):
        checks.fail(name, f"have one entry per head ({num_heads},)", f"shape {tuple(value.shape)}")


def steps(value: Any, num_heads: int) -> int | Tensor | None:
    """update_steps_max: None, an int >= 0, or one int per head (negative: until convergence)."""
    if isinstance(value, Tensor):
        _one_per_head("update_steps_max", value, num_heads)
        checks.integer("update_steps_max", value)
        return value
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        checks.fail(
            "update_steps_max", "be an int, a tensor or None", type(value).__name__, error=TypeError
        )
    return None if value < 0 else int(value)


def eps(value: Any, num_heads: int) -> float | Tensor:
    if isinstance(value, Tensor):
        _one_per_head("update_steps_eps", value, num_heads)
        if value.requires_grad:
            checks.fail(
                "update_steps_eps",
                "need no gradient",
                "requires_grad=True",
                "a threshold of convergence has none",
            )
        # a small one is 0 in a half type
        if reads_values(value) and bool((value < 0).any()):
            checks.fail("update_steps_eps", "be positive", value.min().item())
        return value
    threshold = number("update_steps_eps", value, low=-math.inf)
    if not threshold > 0:
        checks.fail("update_steps_eps", "be positive", threshold)
    return threshold


def scaling(value: Any, num_heads: int) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, num_heads)):
            checks.fail(
                "scaling",
                f"be a number or have one entry per head ({num_heads},)",
                f"shape {tuple(value.shape)}",
            )
        return value.reshape(-1)
    return number("scaling", value, low=-math.inf)


def padding_mask(mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """(B, S) bool, True = ignore, from bool, integers (nonzero = ignore) or additive 0/MASKED."""
    if mask is None:
        return None
    checks.tensor("stored_pattern_padding_mask", mask)
    if mask.dim() != 2 or (mask.shape[0] != B and mask.shape[0] != 1) or mask.shape[1] != S:
        checks.fail(
            "stored_pattern_padding_mask",
            f"have shape (batch, stored) = ({B}, {S})",
            tuple(mask.shape),
        )
    if mask.is_floating_point():
        return mask <= MASKED
    return mask if mask.dtype == torch.bool else mask != 0


def padding_scores(mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """The padding mask for scores (B, 1, 1, S): bool (True = may be seen), or additive."""
    padding = padding_mask(mask, B, S)
    if mask is not None and mask.is_floating_point():
        return mask.masked_fill(mask <= MASKED, -torch.inf)[:, None, None, :]
    return None if padding is None else ~padding[:, None, None, :]


def association_mask(mask: Tensor | None, B: int, H: int, L: int, S: int) -> Tensor | None:
    """Bool (True = may be seen) or additive, broadcastable to (B, H, L, S)."""
    if mask is None:
        return None
    checks.tensor("association_mask", mask)
    if mask.shape == (L, S):
        mask = mask.view(1, 1, L, S) if mask.is_contiguous() else mask[None, None]
    elif mask.shape == (B * H, L, S):
        mask = mask.unflatten(0, (B, H))
    else:
        checks.fail(
            "association_mask",
            f"have shape ({L}, {S}) or (batch * heads, state, stored) = ({B * H}, {L}, {S})",
            tuple(mask.shape),
        )
    if mask.is_floating_point():
        return mask
    return ~mask if mask.dtype == torch.bool else mask == 0


def backend(value: Any, has_kernels: bool) -> None:
    """A backend's name, and "triton" only where something runs on a kernel."""
    checks.in_set("backend", value, BACKENDS)
    if value == "triton" and not has_kernels:
        checks.fail(
            "backend",
            "be 'auto', 'torch' or 'reference' where graph and association are dense",
            repr(value),
            "kernels are for use_sparse=True and for attention along the graph",
            NotImplementedError,
        )


def number(name: str, value: Any, low: float = 0.0, high: float | None = None) -> float:
    """A finite number in [low, high], numpy's too; an int stays one."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        checks.fail(name, "be a number", type(value).__name__, error=TypeError)
    if torch.compiler.is_compiling():
        # a layer's numbers were looked at when it was made; a compiled program takes any
        return value  # type: ignore[return-value]
    if not math.isfinite(value):
        checks.fail(name, "be finite", value)
    if not float(value) >= low or (high is not None and float(value) > high):
        checks.fail(
            name, f"be at least {low:g}" if high is None else f"be in [{low:g}, {high:g}]", value
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def positive(name: str, value: Any) -> int:
    """An int of at least 1, numpy's too."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)):
        value = int(value)
    checks.positive_int(name, value)
    return value  # type: ignore[no-any-return]


def reads_values(*tensors: Tensor) -> bool:
    """`checks.reads_values`, and no tensor without values."""
    # a trace would keep what was read as a constant
    if torch.jit.is_tracing() or any(isinstance(t, FakeTensor) for t in tensors):
        return False
    return checks.reads_values(*tensors)


def is_batched(x: Tensor) -> bool:
    """Whether x is one of many inside torch.func.vmap: no number of it can decide a branch."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def memory_and_query(memory: Any, query: Any) -> None:
    """memory (N, d) or (B, N, d), query (L, d) or (B, L, d); one set serves every item."""
    for name, x in (("memory", memory), ("query", query)):
        checks.floating(name, x)
        if x.dim() not in (2, 3):
            checks.fail(name, "have shape (N, d) or (B, N, d)", tuple(x.shape))
    checks.same_dtype(memory=memory, query=query)
    checks.same_device(memory=memory, query=query)
    if memory.shape[-1] != query.shape[-1]:
        checks.fail("query", f"have the size of `memory`, {memory.shape[-1]}", query.shape[-1])
    sizes = [x.shape[0] for x in (memory, query) if x.dim() == 3 and x.shape[0] != 1]
    if len(set(sizes)) > 1:
        checks.fail("query", f"have the batch size of `memory`, {sizes[0]}, or 1", sizes[1])


def separated(weights: Tensor, scores: Tensor) -> None:
    """What a callable made of scores must have their shape."""
    if not isinstance(weights, Tensor) or weights.shape != scores.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        checks.fail("separation", f"return weights of the scores' shape {tuple(scores.shape)}", got)


def finite(name: str, x: Tensor) -> None:
    """Reads values: CPU tensors outside compile only."""
    if reads_values(x) and not bool(torch.isfinite(x.detach()).all()):
        checks.fail(name, "be finite", "NaN or inf", "a neighbour graph of such patterns is void")


def stable_step(eta: float, largest_degree: float) -> None:
    """(I - eta L) must not amplify: eta d_max <= 1, as L's spectrum reaches 2 d_max."""
    if eta * largest_degree > 1.0 + 1e-6:
        checks.fail(
            "eta",
            f"be at most 1/d_max = {1.0 / largest_degree:.4g} for the plain Laplacian "
            f"(largest degree {largest_degree:.4g})",
            eta,
            "use_normalized_laplacian=True allows eta up to 1",
        )
