"""Retrieval and energy of a Hopfield memory as functions, and `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, ops

from . import _attention, _checks, _separation, _sharded
from ._separation import Normalizer
from ._tiles import row_tiles
from .pages import PatternPages


class Retrieval(NamedTuple):
    """What `retrieve` found: the patterns, and per query the updates made and the last movement."""

    patterns: Tensor
    steps: Tensor
    residual: Tensor


def retrieve(
    memory: Tensor,
    query: Tensor,
    beta: float = 1.0,
    steps: int | None = None,
    eps: float = 1e-5,
    separation: str | Normalizer = "softmax",
    certified: bool | PatternPages = False,
    group: Any = None,
) -> Retrieval:
    """Let each query fall into the memory: xi <- M^T separation(beta M xi).

    Args:
        memory: stored patterns (N, d) or (B, N, d).
        query: states (L, d) or (B, L, d).
        beta: inverse temperature.
        steps: most updates of a query; None until every query has settled.
        eps: a query has settled when an update moves it by at most this (Euclidean length), or by
            no more than rounding can (4 of the dtype's eps times the longest pattern) and no less
            than the update before.
        separation: "softmax", "entmax15", "sparsemax" or a callable (scores, dim) -> weights.
        certified: read only the patterns that can have a weight, which is proven for the others;
            "entmax15" or "sparsemax", memory (N, d), and no gradient. True makes the pages of the
            patterns first; a :class:`PatternPages` of the same memory has them.
        group: ranks that hold a part of the patterns each (a ProcessGroup or one dimension of a
            DeviceMesh): ``memory`` (N, d) is this rank's, in any number, and ``query`` the same on
            every rank, as is what is found. A loss of it has to be the same on every rank, too: the
            gradient of ``query`` is then whole on each, that of ``memory`` is of this rank's
            patterns. "softmax", "entmax15" or "sparsemax", and not ``certified``.

    Returns:
        ``patterns`` like ``query``, with the batch of either; ``steps`` int64 and ``residual``
        (…, L): updates made and the length of the last one. With a sparse separation and well
        separated memories the result is a stored pattern exactly.

    Example:
        >>> found = retrieve(torch.eye(3), torch.tensor([[0.9, 0.2, 0.1]]), beta=8.0,
        ...                  separation="sparsemax")
        >>> found.patterns
        tensor([[1., 0., 0.]])

    Source: Ramsauer et al. 2020, eq. 3; Martins et al. 2023 for sparse separation functions.
    """
    _checks.memory_and_query(memory, query)
    beta, eps = _checks.number("beta", beta), _checks.number("eps", eps)
    if steps is not None and steps != 0:
        steps = _checks.positive("steps", steps)
    most = _attention.MOST_STEPS if steps is None else steps
    rule = _attention.Rule(float(beta), _separation.resolve(separation).normalizer)
    held = _held(memory, certified)
    if group is not None and held is not None:
        checks.fail("certified", "be False with `group`", True, error=NotImplementedError)
    ranks = _sharded.ranks_of(group, memory, query, separation, (beta, steps, eps))
    k = (memory if memory.dim() == 3 else memory[None])[:, None]
    q = (query if query.dim() == 3 else query[None])[:, None]
    if q.shape[0] == 1 and k.shape[0] != 1:
        q = q.expand(k.shape[0], -1, -1, -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    made = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    residual = torch.full(q.shape[:3], torch.inf, dtype=wide, device=q.device)
    moving = torch.ones_like(made, dtype=torch.bool)
    # Rounding alone moves a query by up to this much: one whose movements are smaller, and do not
    # shrink any more, has settled.
    noise = torch.zeros((), dtype=wide, device=q.device)
    if ranks is not None:
        noise = 4 * torch.finfo(q.dtype).eps * _sharded.longest(memory, ranks)
    elif held is not None:  # looking for it here would read every pattern
        noise = 4 * torch.finfo(q.dtype).eps * held.longest
    elif k.shape[2]:
        lengths = torch.linalg.vector_norm(k.detach().to(wide), dim=-1)
        noise = 4 * torch.finfo(q.dtype).eps * lengths.amax(-1, keepdim=True)
    for _ in range(most):
        if _checks.is_batched(moving):
            # every query makes all updates; settled ones keep their state
            if steps is None:
                must = "be an int inside torch.func.vmap"
                checks.fail("steps", must, None, error=NotImplementedError)
        elif not bool(moving.any()):
            break
        if ranks is not None:
            states = q.reshape(-1, q.shape[-1])
            new = _sharded.attend(states, memory, float(beta), str(separation), ranks).view(q.shape)
        elif held is None:
            new = _attention.attend(q, k, k, None, rule)
        else:
            found = held.update(q.reshape(-1, q.shape[-1]), float(beta), separation)  # type: ignore[arg-type]
            new = found.patterns.view(q.shape)
        moved = torch.linalg.vector_norm((new - q).detach().to(wide), dim=-1)
        before, residual = residual, torch.where(moving, moved, residual)
        q = torch.where(moving[..., None], new, q)
        made = made + moving
        moving = moving & (residual > eps) & ((residual > noise) | (residual < before))
    else:
        if steps is None:
            raise RuntimeError(f"the retrieval does not settle in {most} updates; set steps or eps")
    q, made, residual = q[:, 0], made[:, 0], residual[:, 0]
    if query.dim() == 2 and memory.dim() == 2:
        q, made, residual = q[0], made[0], residual[0]
    return Retrieval(q, made, residual)


def _held(memory: Tensor, certified: bool | PatternPages) -> PatternPages | None:
    """The pages that a certified retrieval reads."""
    if isinstance(certified, PatternPages):
        if (certified.n_patterns, certified.d) != tuple(memory.shape):
            got = (certified.n_patterns, certified.d)
            checks.fail("certified", f"be pages of this memory {tuple(memory.shape)}", got)
        return certified
    if not checks.flag("certified", certified):
        return None
    if memory.dim() != 2:
        checks.fail("memory", "have shape (N, d) where `certified`", tuple(memory.shape))
    return PatternPages(memory)


def energy(
    memory: Tensor,
    query: Tensor,
    beta: float = 1.0,
    separation: str | Normalizer = "softmax",
    constants: bool = False,
) -> Tensor:
    """Hopfield energy that the update of `retrieve` never increases, per query.

    E(xi) = -(1/beta) Omega*(beta M xi) + |xi|^2 / 2, where Omega* = log-sum-exp for softmax and the
    conjugate of the Tsallis entropy for entmax15 and sparsemax.

    Args:
        memory: (N, d) or (B, N, d). query: (L, d) or (B, L, d).
        beta: inverse temperature, positive.
        separation: "softmax", "entmax15" or "sparsemax".
        constants: add Omega*(0)/beta (softmax: log(N)/beta) and half the largest squared norm of
            the memory, which make the energy non-negative.

    Returns:
        (L,) or (B, L), differentiable.

    Raises:
        NotImplementedError: for a callable, whose energy is not known.

    Example:
        >>> energy(torch.eye(2), torch.zeros(1, 2), constants=True)
        tensor([0.5000])

    Source: Ramsauer et al. 2020, eq. 2; Hoover et al. 2024 and Santos et al. 2024 for the others.
    """
    _checks.memory_and_query(memory, query)
    beta = _checks.number("beta", beta)
    if not beta > 0:
        checks.fail("beta", "be positive", beta)
    if memory.shape[-2] == 0:
        checks.fail("memory", "hold at least one pattern: an empty one has no energy", "0 patterns")
    chosen = _separation.resolve(separation)
    tiles = row_tiles(query.shape[-2], memory.shape[-2], _attention.TILE)
    parts = [_separation.conjugate(beta * query[..., t, :] @ memory.mT, chosen) for t in tiles]
    out = query.square().sum(-1) / 2 - torch.cat(parts, -1) / beta
    if constants:
        largest = memory.square().sum(-1).amax(-1, keepdim=True)
        out = out + _separation.uniform_conjugate(memory.shape[-2], chosen) / beta + largest / 2
    return out


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend would run each op of ``function(*args, **kwargs)``, and why not the others.

    Args:
        function: a layer or a function of this package, or any that runs one; then the arguments
            of a call to it.

    Returns:
        A few lines of text for each op in the call, which is made.

    Example:
        >>> from difflayers import DiffusedHopfield
        >>> layer = DiffusedHopfield(8, use_sparse=True)
        >>> print(explain(layer, torch.randn(1, 20, 8)).splitlines()[0])
        difflayers::neighbour_sum:
    """
    found = ops.explain_call("difflayers", function, *args, **kwargs)
    return found or "no op of difflayers: dense layers are plain PyTorch, on any device"
