"""The Hopfield association under hflayers' signature, beside the functions of `api`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks

from . import _attention, _checks, _separation
from ._association import Projections, batch_first, core_forward, merge_heads
from ._separation import Normalizer
from .api import Retrieval, energy, explain, retrieve

__all__ = ["Retrieval", "energy", "explain", "hopfield_core_forward", "retrieve"]


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

    def output(heads: Tensor) -> Tensor:
        out = merge_heads(heads)
        return out if out_proj_weight is None else F.linear(out, out_proj_weight, out_proj_bias)

    return core_forward(
        *(batch_first(query, key, value), projections, rule, (key_padding_mask, attn_mask), output),
        need_weights=need_weights,
        raw=return_raw_associations,
        projected=return_projected_patterns,
        static=(static_k, static_v),
    )
