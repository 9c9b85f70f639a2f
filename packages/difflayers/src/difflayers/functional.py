"""The Hopfield association as functions: projections, updates, retrieval and energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks, ops

from . import _attention, _checks, _kept, _separation
from ._association import Projections, associate, association_scores, batch_first, merge_heads
from ._separation import Normalizer


def hopfield_core_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    key_as_static: bool = False,
    query_as_static: bool = False,
    value_as_static: bool = False,
    value_as_connected: bool = False,
    normalize_pattern: bool = False,
    normalize_pattern_eps: float = 1e-5,
    p_norm_weight: Tensor | None = None,
    p_norm_bias: Tensor | None = None,
    head_dim: int | None = None,
    pattern_dim: int | None = None,
    scaling: float | Tensor | None = None,
    update_steps_max: int | Tensor | None = 0,
    update_steps_eps: float | Tensor = 1e-4,
    return_raw_associations: bool = False,
    return_projected_patterns: bool = False,
    separation: str | Normalizer = "softmax",
    transform: _attention.Transform | None = None,
    neighbours: _attention.Neighbours | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Retrieve patterns: project, update the state, read out, project back.

    xi = separation(scaling * q k^T), q <- xi k for ``update_steps_max`` steps, output = xi v W_o.

    Args:
        query: state patterns (L, B, size). key, value: stored patterns and projections
            (S, B, size); a batch of 1 serves every item.
        embed_dim_to_check: the size that ``query`` must have.
        in_proj_weight, in_proj_bias: rows for q, k, v; or one ``*_proj_weight`` each with
            ``use_separate_proj_weight``.
        bias_k, bias_v: (1, 1, H d), one more stored pattern and projection. Where a head's
            projected patterns are wider, zeros follow; where they are narrower, the rest is unused.
        add_zero_attn: one more stored pattern of zeros.
        key_padding_mask: (B, S), True or nonzero = ignore, or additive.
        attn_mask: (L, S) or (B H, L, S), True or nonzero = ignore, or additive.
        static_k, static_v: (B H, S, d) replace the projected keys and values.
        scaling: inverse temperature, a number or one per head; None is 1.
        update_steps_max: n gives n + 1 associations; None until no head moves by more than
            ``update_steps_eps``. A threshold above 1e-3 may also end a fixed number early.
        need_weights: also return the weights averaged over heads.
        separation: "softmax", "entmax15", "sparsemax" or a callable (scores, dim) -> weights.
        transform: (weights (B, H, rows, S), those that may be above 0 or None) -> weights, at the
            read-out, not in updates.
        neighbours: (q, k) (B, H, ., d) -> index (B, L, K) and which of them are there: each state
            sees only these stored patterns.
        backend: what runs an association with ``neighbours``.

    Returns:
        output (L, B, out), averaged weights (B, L, S) or None, associations (B, H, L, S) or None,
        projected patterns (B, H, S, d) or None.

    Source: Ramsauer et al. 2020, "Hopfield Networks is All You Need", eq. 3 and 10.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.floating(name, x)
    if query.shape[-1] != embed_dim_to_check:
        checks.fail("query", f"have last dimension {embed_dim_to_check}", query.shape[-1])
    if head_dim is None:
        if embed_dim_to_check % num_heads:
            checks.fail("num_heads", f"divide the embedding size {embed_dim_to_check}", num_heads)
        head_dim = embed_dim_to_check // num_heads
    separate = use_separate_proj_weight
    projections = Projections(
        num_heads,
        head_dim,
        head_dim if pattern_dim is None else pattern_dim,
        None if separate else in_proj_weight,
        in_proj_bias,
        q_proj_weight if separate else None,
        k_proj_weight if separate else None,
        v_proj_weight if separate else None,
        key_as_static,
        query_as_static,
        value_as_static,
        value_as_connected,
        normalize_pattern,
        normalize_pattern_eps,
        p_norm_weight,
        p_norm_bias,
        bias_k,
        bias_v,
        add_zero_attn,
    )
    rule = _attention.Rule(
        1.0 if scaling is None else _checks.scaling(scaling, num_heads),
        _separation.resolve(separation).normalizer,
        transform,
        _checks.steps(update_steps_max, num_heads),
        _checks.eps(update_steps_eps, num_heads),
        dropout_p if training else 0.0,
        neighbours,
        backend,
    )
    q, k, v = projections.heads(*batch_first(query, key, value))
    if static_k is not None:
        k = static_k.unflatten(0, (-1, num_heads))
    if static_v is not None:
        v = static_v.unflatten(0, (-1, num_heads))
    mask = association_scores(key_padding_mask, attn_mask, q, k)
    k, v, mask = projections.append(k, v, mask)
    found = associate(q, k, v, mask, rule, need_weights or return_raw_associations)
    out = merge_heads(found.heads)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    if return_projected_patterns and v.shape[0] != out.shape[0]:
        v = v.expand(out.shape[0], -1, -1, -1)
    return (
        out.transpose(0, 1),
        found.dropped.mean(1) if need_weights and found.dropped is not None else None,
        found.weights if return_raw_associations else None,
        v if return_projected_patterns else None,
    )


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
    k = (memory if memory.dim() == 3 else memory[None])[:, None]
    q = (query if query.dim() == 3 else query[None])[:, None]
    if q.shape[0] == 1 and k.shape[0] != 1:
        q = q.expand(k.shape[0], -1, -1, -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    made = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    residual = torch.full(q.shape[:3], torch.inf, dtype=wide, device=q.device)
    moving = torch.ones_like(made, dtype=torch.bool)
    # what rounding alone can move: a query that no longer slows down below this has settled
    noise = torch.zeros((), dtype=wide, device=q.device)
    if k.shape[2]:
        lengths = torch.linalg.vector_norm(k.detach().to(wide), dim=-1)
        noise = 4 * torch.finfo(q.dtype).eps * lengths.amax(-1, keepdim=True)
    for _ in range(most):
        if _checks.is_batched(moving):  # every query makes all its updates; those at rest stay
            if steps is None:
                must = "be an int inside torch.func.vmap"
                checks.fail("steps", must, None, error=NotImplementedError)
        elif not bool(moving.any()):
            break
        new = _attention.attend(q, k, k, None, rule)
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
    rows = max(1, _attention.TILE // max(1, memory.shape[-2]))
    split = (query,) if _kept.in_one_piece() else query.split(rows, -2)
    parts = [_separation.conjugate(beta * part @ memory.mT, chosen) for part in split]
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
