"""HopfieldCore: the multi-head association with its projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from ._association import Projections, batch_first, core_forward, merge_heads
from ._attention import Neighbours, Rule, Transform
from ._separation import Normalizer, resolve


class HopfieldCore(nn.Module):
    """Multi-head Hopfield association: xi = separation(scaling * q k^T), output = xi v W_o.

    Args:
        embed_dim: size of the state patterns. kdim, vdim: of the stored patterns and projections.
        num_heads: parallel associations.
        head_dim: size of the association space of one head; None is embed_dim / num_heads.
        pattern_dim: size of a head's projected patterns; None is head_dim.
        out_dim: size of the output; None is embed_dim.
        bias: projections have biases. add_bias_kv: learn one more stored pattern.
        add_zero_attn: one more stored pattern of zeros.
        key_as_static, query_as_static, value_as_static: this input is not projected.
        value_as_connected: the value is projected by the key's projection first.
        normalize_pattern: LayerNorm of q and k in the association space of a head.
        separation: "softmax", "entmax15", "sparsemax" or a callable (scores, dim) -> weights.

    Parameters have the names and shapes of hflayers' core, so checkpoints are interchangeable.
    """

    p_norm_weight: Tensor | None
    p_norm_bias: Tensor | None
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module | None

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        pattern_dim: int | None = None,
        out_dim: int | None = None,
        disable_out_projection: bool = False,
        key_as_static: bool = False,
        query_as_static: bool = False,
        value_as_static: bool = False,
        value_as_connected: bool = False,
        normalize_pattern: bool = False,
        normalize_pattern_affine: bool = False,
        normalize_pattern_eps: float = 1e-5,
        separation: str | Normalizer = "softmax",
    ) -> None:
        super().__init__()
        num_heads = _checks.positive("num_heads", num_heads)
        dropout = _checks.number("dropout", dropout, 0.0, 1.0)
        normalize_pattern_eps = _checks.number("normalize_pattern_eps", normalize_pattern_eps)
        embed_dim, kdim, vdim, head_dim, pattern_dim, out_dim = (
            None if size is None else _checks.positive(name, size)
            for name, size in (
                ("input_size", embed_dim),
                ("stored_pattern_size", kdim),
                ("pattern_projection_size", vdim),
                ("hidden_size", head_dim),
                ("pattern_size", pattern_dim),
                ("output_size", out_dim),
            )
        )
        if normalize_pattern_affine and not normalize_pattern:
            checks.fail("normalize_pattern_affine", "be False without normalize_pattern", True)
        resolve(separation)
        self.separation = separation
        self.num_heads, self.dropout = num_heads, dropout
        self.key_as_static, self.query_as_static = key_as_static, query_as_static
        self.value_as_static, self.value_as_connected = value_as_static, value_as_connected
        self.normalize_pattern = normalize_pattern
        self.normalize_pattern_affine = normalize_pattern_affine
        self.normalize_pattern_eps = normalize_pattern_eps
        self.disable_out_projection = disable_out_projection
        self.add_zero_attn = add_zero_attn
        all_static = key_as_static and query_as_static and value_as_static
        # Nothing is learned: sizes come with the data.
        self.static_execution = (
            all_static and not (value_as_connected or normalize_pattern) and disable_out_projection
        )
        if self.static_execution:
            embed_dim = kdim = vdim = None
        elif embed_dim is None:
            checks.fail(
                "input_size",
                "be given unless all inputs are static, without output "
                "projection, connection or normalised association space",
                None,
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = (
            self.kdim == embed_dim
            and self.vdim == embed_dim
            and pattern_dim is None
            and not value_as_connected
        )
        self.head_dim: int | None = None
        self.pattern_dim = pattern_dim
        self.virtual_hopfield_dim: int | None = None
        self.virtual_pattern_dim: int | None = None
        if embed_dim is not None:
            if head_dim is None and embed_dim % num_heads:
                checks.fail(
                    "input_size",
                    f"be divisible by num_heads={num_heads} when hidden_size is not given",
                    embed_dim,
                    "hidden_size is the size per head",
                )
            self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
            if pattern_dim is None:
                self.pattern_dim = self.head_dim
            self.virtual_hopfield_dim = num_heads * self.head_dim
            self.virtual_pattern_dim = num_heads * (self.pattern_dim or 0)
        if value_as_connected:
            if self.kdim != self.vdim:
                checks.fail(
                    "pattern_projection_size",
                    f"equal stored_pattern_size={self.kdim} when the projection is connected",
                    self.vdim,
                )
            if self.pattern_dim != self.head_dim:
                checks.fail(
                    "pattern_size",
                    f"equal hidden_size={self.head_dim} when the projection is connected",
                    self.pattern_dim,
                )
        self.out_dim = embed_dim if out_dim is None else out_dim
        if not disable_out_projection:
            _checks.positive("output_size", self.out_dim)
        self._build(bias, add_bias_kv)
        self.reset_parameters()

    def _build(self, bias: bool, add_bias_kv: bool) -> None:
        h, p = self.virtual_hopfield_dim or 0, self.virtual_pattern_dim or 0
        q_rows = 0 if self.query_as_static else h
        k_rows = 0 if self.key_as_static else h
        v_rows = 0 if self.value_as_static else p
        learned = q_rows + k_rows + v_rows > 0

        def add(name: str, *shape: int | None) -> None:
            present = all(n is not None and n > 0 for n in shape)
            value = nn.Parameter(torch.empty(shape)) if present else None  # type: ignore[arg-type]
            self.register_parameter(name, value)

        norm = (self.head_dim,) if self.normalize_pattern_affine else (0,)
        add("p_norm_weight", *norm)
        add("p_norm_bias", *norm)
        if self._qkv_same_embed_dim:
            add("in_proj_weight", q_rows + k_rows + v_rows, self.embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                add(name, 0)
        else:
            connected = self.value_as_connected and not self.key_as_static
            add("in_proj_weight", 0)
            add("q_proj_weight", q_rows, self.embed_dim)
            add("k_proj_weight", k_rows, self.kdim)
            add("v_proj_weight", v_rows, h if connected else self.vdim)
        # a static value keeps its rows in the bias (they are never read): hflayers' shape
        add("in_proj_bias", q_rows + k_rows + p if bias and learned else 0)
        if self.disable_out_projection:
            self.register_parameter("out_proj", None)
        else:
            self.out_proj = nn.Linear(p, self.out_dim or 0, bias=bias)
        if add_bias_kv and (self.key_as_static or self.value_as_static):
            checks.fail(
                "concat_bias_pattern",
                "be False when the stored pattern or the projection is static",
                True,
            )
        add("bias_k", *((1, 1, h) if add_bias_kv else (0,)))
        # hflayers' shape, which is bias_k's whatever the size of the projected patterns
        add("bias_v", *((1, 1, h) if add_bias_kv else (0,)))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # until 0.1.0 bias_v had the size of the projected patterns; zeros at its end change nothing
        key, mine = f"{prefix}bias_v", self.bias_v
        old = state_dict.get(key)
        if mine is not None and old is not None and old.shape[-1] == self.virtual_pattern_dim:
            more = mine.shape[-1] - old.shape[-1]
            if more > 0:
                heads = old.unflatten(-1, (self.num_heads, -1))
                state_dict[key] = F.pad(heads, (0, more // self.num_heads)).flatten(-2)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02), biases 0, norms 1 and 0."""
        for name, parameter in self.named_parameters():
            if name == "p_norm_weight":
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, mean=0.0, std=0.02)

    def sizes(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
        """(head dim, pattern dim) for these inputs, after checking theirs."""
        if self.query_as_static and self.key_as_static:
            head_dim = query.shape[-1]
            _checks.pattern_size("stored", key, head_dim)
        else:
            head_dim = self.head_dim or 0
            _checks.pattern_size(
                "state", query, self.head_dim if self.query_as_static else self.embed_dim
            )
            _checks.pattern_size("stored", key, self.head_dim if self.key_as_static else self.kdim)
        if not self.value_as_static or (self.value_as_connected and not self.key_as_static):
            _checks.pattern_size("projection", value, self.vdim)
        elif not self.disable_out_projection:
            _checks.pattern_size("projection", value, self.pattern_dim)
        pattern_dim = value.shape[-1] if self.value_as_static else self.pattern_dim
        if self.value_as_static and self.value_as_connected:
            pattern_dim = head_dim
        return head_dim, pattern_dim or head_dim

    def projections(self, query: Tensor, key: Tensor, value: Tensor) -> Projections:
        """The projections of this core, for inputs of these sizes."""
        head_dim, pattern_dim = self.sizes(query, key, value)
        return Projections(
            self.num_heads,
            head_dim,
            pattern_dim,
            **{name: getattr(self, name) for name in Projections._fields[3:]},
        )

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch-first patterns -> q, k, v (B, H, N, d), normalised in the association space."""
        return self.projections(query, key, value).heads(query, key, value)

    def output(self, heads: Tensor) -> Tensor:
        """(B, H, L, d) -> (B, L, out)."""
        out = merge_heads(heads)
        return out if self.out_proj is None else self.out_proj(out)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        scaling: float | Tensor | None = None,
        update_steps_max: int | Tensor | None = 0,
        update_steps_eps: float | Tensor = 1e-4,
        return_raw_associations: bool = False,
        return_pattern_projections: bool = False,
        transform: Transform | None = None,
        neighbours: Neighbours | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """query (L, B, embed_dim), key (S, B, kdim), value (S, B, vdim).

        Returns what `functional.hopfield_core_forward` returns.

        ``need_weights=False`` never forms the (L, S) associations unless they are asked for.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.floating(name, x)
        inputs = batch_first(query, key, value)
        projections = self.projections(*inputs)
        rule = Rule(
            1.0 if scaling is None else _checks.scaling(scaling, self.num_heads),
            resolve(self.separation).normalizer,
            transform,
            _checks.steps(update_steps_max, self.num_heads),
            _checks.eps(update_steps_eps, self.num_heads),
            self.dropout if self.training else 0.0,
            neighbours,
            backend,
        )
        return core_forward(
            *(inputs, projections, rule, (key_padding_mask, attn_mask), self.output),
            need_weights=need_weights,
            raw=return_raw_associations,
            projected=return_pattern_projections,
        )
