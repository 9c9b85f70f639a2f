"""The Hopfield association: projections, masks, updates of the state, read-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks
from shared_kernels.calls import replaced

from . import _attention, _checks
from ._attention import Rule


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return x.transpose(1, 2).flatten(2)


def batch_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each with its first two dimensions exchanged; what was one tensor remains one."""
    turned = query.transpose(0, 1)
    if query is key and key is value:
        return turned, turned, turned
    return turned, key.transpose(0, 1), value.transpose(0, 1)


class Projections(NamedTuple):
    """From patterns to the association space of each head, and what a core adds to them there.

    The rows of ``in_proj_weight`` and ``in_proj_bias`` belong to q, k, v in this order; a static
    input has none. A connected value is projected by the key's projection, then by its own.
    ``bias_k`` and ``bias_v`` (1, 1, H d) are one more stored pattern and projection.
    """

    num_heads: int
    head_dim: int
    pattern_dim: int
    in_proj_weight: Tensor | None = None
    in_proj_bias: Tensor | None = None
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    key_as_static: bool = False
    query_as_static: bool = False
    value_as_static: bool = False
    value_as_connected: bool = False
    normalize_pattern: bool = False
    normalize_pattern_eps: float = 1e-5
    p_norm_weight: Tensor | None = None
    p_norm_bias: Tensor | None = None
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    add_zero_attn: bool = False

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patterns (B, N, size) -> q, k, v (B, H, N, head dim), normalised as the core asks."""
        q, k, v = self._projected(query, key, value)
        if self.normalize_pattern:
            norm = self.p_norm_weight, self.p_norm_bias, self.normalize_pattern_eps
            q, k = (F.layer_norm(x, (self.head_dim,), *norm) for x in (q, k))
        return q, k, v

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        H = self.num_heads
        h, p = H * self.head_dim, H * self.pattern_dim
        sizes = (0 if self.query_as_static else h, 0 if self.key_as_static else h, p)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)

        def rows(weight: Tensor | None, i: int) -> Tensor | None:
            return None if weight is None else weight[starts[i] : starts[i] + sizes[i]]

        def linear(x: Tensor, i: int) -> Tensor:
            own = separate[i]
            weight = rows(self.in_proj_weight, i) if own is None else own
            if weight is None:
                checks.fail("in_proj_weight", "be given where an input is not static", None)
            return F.linear(x, weight, rows(self.in_proj_bias, i))

        is_static = self.key_as_static or self.query_as_static or self.value_as_static
        one = query is key and key is value
        if one and self.in_proj_weight is not None and not (is_static or self.value_as_connected):
            whole = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = (split_heads(x, H) for x in whole.split(sizes, -1))
            return q, k, v

        def every_head(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(-1, H, -1, -1)

        q = every_head(query) if self.query_as_static else split_heads(linear(query, 0), H)
        k = every_head(key) if self.key_as_static else split_heads(linear(key, 1), H)
        is_connected = self.value_as_connected and not self.key_as_static
        if is_connected:
            value = linear(value, 1)
        if not self.value_as_static:
            return q, k, split_heads(linear(value, 2), H)
        return q, k, split_heads(value, H) if is_connected else every_head(value)

    def append(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One more stored pattern from the biases, one more of zeros; neither is ever masked."""
        H, n_more = k.shape[1], 0
        if self.bias_k is not None and self.bias_v is not None:
            more = split_heads(self.bias_k, H).to(k)
            k = torch.cat((k, more.expand(k.shape[0], -1, -1, -1)), 2)
            own = split_heads(self.bias_v, H).to(v)
            # hflayers' shape is that of bias_k, whatever the size of the projected patterns
            own = F.pad(own, (0, v.shape[-1] - own.shape[-1]))
            v = torch.cat((v, own.expand(v.shape[0], -1, -1, -1)), 2)
            n_more += 1
        if self.add_zero_attn:
            k, v, n_more = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), n_more + 1
        if mask is not None and n_more:
            mask = F.pad(mask, (0, n_more), value=mask.dtype == torch.bool)
        return k, v, mask


def association_scores(
    padding: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """The two masks of the public signature as one for `_attention`."""
    B, H, L, S = _attention.batch_of(q, k), q.shape[1], q.shape[2], k.shape[2]
    return _attention.merge_masks(
        _checks.padding_scores(padding, B, S), _checks.association_mask(attn_mask, B, H, L, S)
    )


class Readout(NamedTuple):
    """What `associate` found: the heads (B, H, L, d), and the weights (B, H, L, S) if asked for.

    ``weights`` are those of the separation function; ``dropped`` is what is left after dropout.
    """

    heads: Tensor
    weights: Tensor | None = None
    dropped: Tensor | None = None


def associate(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, needs_weights: bool
) -> Readout:
    """Update the state as the rule says, then read out the weighted sum of v."""
    last_rule = rule
    if rule.neighbours is None:
        heads = None if needs_weights else _attention.in_one_op(q, k, v, mask, rule)
        if heads is not None:
            return Readout(heads)
        q = _attention.iterate(q, k, mask, replaced(rule, transform=None), rule.steps, rule.eps)
        if not needs_weights:
            return Readout(_attention.attend(q, k, v, mask, rule, rule.dropout))
    else:
        index, ok = rule.neighbours(q, k)
        if not isinstance(rule.steps, int):
            checks.fail("update_steps_max", "be an int with neighbours", rule.steps)
        last_rule = replaced(rule, transform=None)
        for _ in range(rule.steps):
            q = _attention.attend_neighbours(q, k, k, index, ok, mask, last_rule)
        if not needs_weights:
            heads = _attention.attend_neighbours(q, k, v, index, ok, mask, last_rule, rule.dropout)
            return Readout(heads)
        mask = _mask_of_lists(index, ok, k, mask)
    xi = _attention.association_weights(q, k, mask, last_rule)
    dropped = F.dropout(xi, rule.dropout) if rule.dropout > 0.0 else xi
    return Readout(dropped @ v, xi, dropped)


def core_forward(
    inputs: tuple[Tensor, Tensor, Tensor],
    projections: Projections,
    rule: Rule,
    masks: tuple[Tensor | None, Tensor | None],
    output: Callable[[Tensor], Tensor],
    *,
    need_weights: bool,
    raw: bool,
    projected: bool,
    static: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Project, associate, project back: what `functional.hopfield_core_forward` returns.

    Args:
        inputs: query, key and value, batch first.
        masks: the padding mask and the association mask.
        output: heads (B, H, L, d) -> (B, L, out).
        raw, projected: whether the associations and the projected patterns are returned.
        static: (B H, S, d) in place of the projected keys and values.
    """
    q, k, v = projections.heads(*inputs)
    k, v = (
        x if given is None else given.unflatten(0, (-1, projections.num_heads))
        for x, given in zip((k, v), static, strict=True)
    )
    padding, mask = masks
    mask = association_scores(padding, mask, q, k)
    k, v, mask = projections.append(k, v, mask)
    found = associate(q, k, v, mask, rule, need_weights or raw)
    out = output(found.heads)
    if projected and v.shape[0] != out.shape[0]:
        v = v.expand(out.shape[0], -1, -1, -1)
    return (
        out.transpose(0, 1),
        found.dropped.mean(1) if need_weights and found.dropped is not None else None,
        found.weights if raw else None,
        v if projected else None,
    )


def _mask_of_lists(index: Tensor, ok: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask under which each state sees the stored patterns index[ok] and no others."""
    B, S = _attention.batch_of(index, k), k.shape[2]
    index, ok = index.expand(B, -1, -1), ok.expand(B, -1, -1)
    if S == 0:
        return mask
    seen = torch.zeros(B, index.shape[1], S, dtype=torch.int8, device=k.device)
    seen = seen.scatter_add(-1, index, ok.to(torch.int8))[:, None] > 0
    return _attention.merge_masks(seen, mask)
