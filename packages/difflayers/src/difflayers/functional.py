"""The Hopfield association as functions: projections, updates, retrieval and energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks, ops

from . import _attention, _checks, _kept, _separation
from ._separation import Normalizer


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return x.transpose(1, 2).flatten(2)


def _rows(weight: Tensor | None, start: int, n: int) -> Tensor | None:
    return None if weight is None else weight[start : start + n]


def project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    head_dim: int,
    pattern_dim: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    key_as_static: bool = False,
    query_as_static: bool = False,
    value_as_static: bool = False,
    value_as_connected: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns (B, N, size) -> q, k, v (B, H, N, head dim). A static input serves every head.

    The rows of ``in_proj_weight`` and ``in_proj_bias`` belong to q, k, v in this order; a static
    input has none. A connected value is projected by the key's projection, then by its own.
    """
    h, p = num_heads * head_dim, num_heads * pattern_dim
    sizes = (0 if query_as_static else h, 0 if key_as_static else h, p)
    starts = (0, sizes[0], sizes[0] + sizes[1])
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)

    def linear(x: Tensor, i: int) -> Tensor:
        weight = (
            separate[i] if separate[i] is not None else _rows(in_proj_weight, starts[i], sizes[i])
        )
        if weight is None:
            checks.fail("in_proj_weight", "be given where an input is not static", None)
        return F.linear(x, weight, _rows(in_proj_bias, starts[i], sizes[i]))

    if (
        query is key
        and key is value
        and in_proj_weight is not None
        and not (key_as_static or query_as_static or value_as_static or value_as_connected)
    ):
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).split(sizes, -1)
        return split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)

    def every_head(x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, num_heads, -1, -1)

    q = every_head(query) if query_as_static else split_heads(linear(query, 0), num_heads)
    k = every_head(key) if key_as_static else split_heads(linear(key, 1), num_heads)
    connected = value_as_connected and not key_as_static
    if connected:
        value = linear(value, 1)
    if not value_as_static:
        v = split_heads(linear(value, 2), num_heads)
    else:
        v = split_heads(value, num_heads) if connected else every_head(value)
    return q, k, v


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
    pattern_dim = head_dim if pattern_dim is None else pattern_dim
    same = query is key, key is value
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if all(same):
        query = key = value
    q, k, v = project(
        query,
        key,
        value,
        num_heads,
        head_dim,
        pattern_dim,
        None if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
        q_proj_weight if use_separate_proj_weight else None,
        k_proj_weight if use_separate_proj_weight else None,
        v_proj_weight if use_separate_proj_weight else None,
        key_as_static,
        query_as_static,
        value_as_static,
        value_as_connected,
    )
    if normalize_pattern:
        q, k = (
            F.layer_norm(x, (head_dim,), p_norm_weight, p_norm_bias, normalize_pattern_eps)
            for x in (q, k)
        )
    if static_k is not None:
        k = static_k.unflatten(0, (-1, num_heads))
    if static_v is not None:
        v = static_v.unflatten(0, (-1, num_heads))
    mask = association_scores(key_padding_mask, attn_mask, q, k)
    k, v, mask = append_patterns(k, v, mask, bias_k, bias_v, add_zero_attn)

    rule = _attention.Rule(
        1.0 if scaling is None else _checks.scaling(scaling, num_heads),
        _separation.resolve(separation).normalizer,
    )
    steps = _checks.steps(update_steps_max, num_heads)
    dropout = dropout_p if training else 0.0
    index = ok = None
    if neighbours is None:
        q = _attention.iterate(q, k, mask, rule, steps, _checks.eps(update_steps_eps, num_heads))
        rule = _attention.Rule(rule.scale, rule.normalizer, transform)
    else:
        index, ok = neighbours(q, k)
        if not isinstance(steps, int):
            checks.fail("update_steps_max", "be an int with neighbours", update_steps_max)
        for _ in range(steps):
            q = _attention.attend_neighbours(q, k, k, index, ok, mask, rule, 0.0, backend)
    raw = averaged = None
    if need_weights or return_raw_associations:
        seen = mask if index is None or ok is None else _only(index, ok, k, mask)
        xi = _attention.association(q, k, seen, rule)
        dropped = F.dropout(xi, dropout) if dropout > 0.0 else xi
        heads = dropped @ v
        raw = xi if return_raw_associations else None
        averaged = dropped.mean(1) if need_weights else None
    elif index is None or ok is None:
        heads = _attention.attend(q, k, v, mask, rule, dropout)
    else:
        heads = _attention.attend_neighbours(q, k, v, index, ok, mask, rule, dropout, backend)
    out = merge_heads(heads)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    if return_projected_patterns and v.shape[0] != out.shape[0]:
        v = v.expand(out.shape[0], -1, -1, -1)
    return out.transpose(0, 1), averaged, raw, v if return_projected_patterns else None


def _only(index: Tensor, ok: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask under which each state sees the stored patterns index[ok] and no others."""
    B, S = _attention.batch_of(index, k), k.shape[2]
    index, ok = index.expand(B, -1, -1), ok.expand(B, -1, -1)
    if S == 0:
        return mask
    seen = torch.zeros(B, index.shape[1], S, dtype=torch.int8, device=k.device)
    seen = seen.scatter_add(-1, index, ok.to(torch.int8))[:, None] > 0
    return _attention.merge_masks(seen, mask)


def association_scores(
    padding: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """The two masks of the public signature as one for `_attention`."""
    B, H, L, S = _attention.batch_of(q, k), q.shape[1], q.shape[2], k.shape[2]
    return _attention.merge_masks(
        _checks.padding_scores(padding, B, S), _checks.association_mask(attn_mask, B, H, L, S)
    )


def append_patterns(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One more stored pattern from the biases, one more of zeros; neither is ever masked."""
    H, extra = k.shape[1], 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat((k, split_heads(bias_k, H).to(k).expand(k.shape[0], -1, -1, -1)), 2)
        own = split_heads(bias_v, H).to(v)
        # hflayers' shape is that of bias_k, whatever the size of the projected patterns
        own = F.pad(own, (0, v.shape[-1] - own.shape[-1]))
        v = torch.cat((v, own.expand(v.shape[0], -1, -1, -1)), 2)
        extra += 1
    if add_zero:
        k, v, extra = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), extra + 1
    if mask is not None and extra:
        mask = F.pad(mask, (0, extra), value=mask.dtype == torch.bool)
    return k, v, mask


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
