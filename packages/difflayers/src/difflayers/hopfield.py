"""Hopfield, HopfieldPooling, HopfieldLayer: associative memories as layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from ._attention import Transform
from ._separation import Normalizer
from .activation import HopfieldCore

Patterns = Tensor | tuple[Tensor, Tensor, Tensor]


def one_item(x: Tensor) -> Tensor:
    """The single item of a batch made by ``expand``: its work is done once, not per item."""
    return x[:1] if x.shape[0] > 1 and x.stride(0) == 0 else x


class Hopfield(nn.Module):
    """Continuous Hopfield association of state patterns with stored patterns.

    xi = separation(beta W_q(state) W_k(stored)^T), output = W_o(xi W_v(projection)), each input
    after its LayerNorm; with ``update_steps_max`` n the state is first updated n times, q <- xi k.

    Args:
        input_size: size of the state patterns, and of the others unless ``stored_pattern_size`` or
            ``pattern_projection_size`` say otherwise. None only for purely static retrieval.
        hidden_size: size of the association space of ONE head; None is input_size / num_heads.
        output_size: None is input_size.
        pattern_size: size of one head's projected patterns; None is hidden_size.
        scaling: beta, a number or a tensor with one entry per head (a Parameter is learned); None
        is
            1/sqrt(hidden_size), or 1 for purely static retrieval.
        update_steps_max: n >= 0 updates (n + 1 associations), one number per head, or None: until
        no
            head's association moves by more than ``update_steps_eps``.
        normalize_*: LayerNorm of the inputs; normalize_hopfield_space: of q and k, per head.
        *_as_static: the input is used as it is, without projection. Gradients do flow.
        pattern_projection_as_connected: the projection goes through the stored patterns' too.
        batch_first: (batch, patterns, size), else (patterns, batch, size).
        association_activation: name of a torch function applied to the output.
        dropout: of the associations.
        input_bias: biases of all projections.
        concat_bias_pattern: learn one more stored pattern; add_zero_association: add one of zeros.
        disable_out_projection: return the heads side by side.
        separation: "softmax", "entmax15", "sparsemax" or a callable (scores, dim) -> weights.

    Example:
        >>> hopfield = Hopfield(input_size=8, num_heads=2)
        >>> hopfield(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])

    Source: Ramsauer et al. 2020; parameters and results are those of hflayers.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        output_size: int | None = None,
        pattern_size: int | None = None,
        num_heads: int = 1,
        scaling: float | Tensor | None = None,
        update_steps_max: int | Tensor | None = 0,
        update_steps_eps: float | Tensor = 1e-4,
        normalize_stored_pattern: bool = True,
        normalize_stored_pattern_affine: bool = True,
        normalize_stored_pattern_eps: float = 1e-5,
        normalize_state_pattern: bool = True,
        normalize_state_pattern_affine: bool = True,
        normalize_state_pattern_eps: float = 1e-5,
        normalize_pattern_projection: bool = True,
        normalize_pattern_projection_affine: bool = True,
        normalize_pattern_projection_eps: float = 1e-5,
        normalize_hopfield_space: bool = False,
        normalize_hopfield_space_affine: bool = False,
        normalize_hopfield_space_eps: float = 1e-5,
        stored_pattern_as_static: bool = False,
        state_pattern_as_static: bool = False,
        pattern_projection_as_static: bool = False,
        pattern_projection_as_connected: bool = False,
        stored_pattern_size: int | None = None,
        pattern_projection_size: int | None = None,
        batch_first: bool = True,
        association_activation: str | None = None,
        dropout: float = 0.0,
        input_bias: bool = True,
        concat_bias_pattern: bool = False,
        add_zero_association: bool = False,
        disable_out_projection: bool = False,
        separation: str | Normalizer = "softmax",
    ) -> None:
        super().__init__()
        self.association_core = core = HopfieldCore(
            embed_dim=input_size,
            num_heads=num_heads,
            dropout=dropout,
            bias=input_bias,
            add_bias_kv=concat_bias_pattern,
            add_zero_attn=add_zero_association,
            kdim=stored_pattern_size,
            vdim=pattern_projection_size,
            head_dim=hidden_size,
            pattern_dim=pattern_size,
            out_dim=output_size,
            disable_out_projection=disable_out_projection,
            key_as_static=stored_pattern_as_static,
            query_as_static=state_pattern_as_static,
            value_as_static=pattern_projection_as_static,
            value_as_connected=pattern_projection_as_connected,
            normalize_pattern=normalize_hopfield_space,
            normalize_pattern_affine=normalize_hopfield_space_affine,
            normalize_pattern_eps=normalize_hopfield_space_eps,
            separation=separation,
        )
        self.association_activation = None
        if association_activation is not None:
            self.association_activation = getattr(torch, association_activation, None)
            if not callable(self.association_activation):
                checks.fail(
                    "association_activation", "name a torch function", repr(association_activation)
                )

        def norm(
            name: str, size: int | None, use: bool, affine: bool, eps: float
        ) -> nn.LayerNorm | None:
            if affine and not use:
                checks.fail(f"normalize_{name}_affine", f"be False without normalize_{name}", True)
            if not use:
                return None
            if size is None:
                checks.fail("input_size", f"be given to normalise the {name}", None)
            return nn.LayerNorm(size, eps=eps, elementwise_affine=affine)

        self.norm_stored_pattern = norm(
            "stored_pattern",
            input_size if stored_pattern_size is None else stored_pattern_size,
            normalize_stored_pattern,
            normalize_stored_pattern_affine,
            normalize_stored_pattern_eps,
        )
        self.norm_state_pattern = norm(
            "state_pattern",
            input_size,
            normalize_state_pattern,
            normalize_state_pattern_affine,
            normalize_state_pattern_eps,
        )
        self.norm_pattern_projection = norm(
            "pattern_projection",
            input_size if pattern_projection_size is None else pattern_projection_size,
            normalize_pattern_projection,
            normalize_pattern_projection_affine,
            normalize_pattern_projection_eps,
        )
        if scaling is None:
            scaling = 1.0 if core.head_dim is None else core.head_dim**-0.5
        _checks.scaling(scaling, num_heads)
        self._scaling = scaling
        self._update_steps_max = update_steps_max
        self._update_steps_eps = update_steps_eps
        _checks.steps(update_steps_max, num_heads)
        _checks.eps(update_steps_eps, num_heads)
        self._batch_first = bool(batch_first)

    def reset_parameters(self) -> None:
        """Projections N(0, 0.02), biases 0, norms 1 and 0."""
        norms = (self.norm_stored_pattern, self.norm_state_pattern, self.norm_pattern_projection)
        for module in (self.association_core, *norms):
            if module is not None:
                module.reset_parameters()

    def _normalize(self, stored: Tensor, state: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        norms = (self.norm_stored_pattern, self.norm_state_pattern, self.norm_pattern_projection)
        sizes = (self.stored_pattern_dim, self.state_pattern_dim, self.pattern_projection_dim)
        names = ("stored", "state", "projection")
        out = []
        for name, x, norm, size in zip(
            names, (stored, state, projection), norms, sizes, strict=True
        ):
            if norm is not None:
                _checks.pattern_size(name, x, norm.normalized_shape[0] if size is None else size)
                x = norm(x)
            out.append(x)
        return tuple(out)

    def _patterns(self, data: Any) -> tuple[Tensor, Tensor, Tensor]:
        stored, state, projection = _checks.patterns(data, self.batch_first)
        if state is stored:
            return stored, state, projection
        one = one_item(stored)
        projection = one if projection is stored else one_item(projection)
        if one is stored and projection.shape[0] == stored.shape[0]:
            state = one_item(state)
        return one, state, projection

    def _associate(
        self,
        data: Any,
        padding: Tensor | None,
        mask: Tensor | None,
        raw: bool = False,
        projected: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output (B, L, ·), associations, projected patterns)."""
        stored, state, projection = self._normalize(*self._patterns(data))
        return self._core(stored, state, projection, padding, mask, raw, projected)

    def _core(
        self,
        stored: Tensor,
        state: Tensor,
        projection: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        raw: bool = False,
        projected: bool = False,
        transform: Transform | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        key = stored.transpose(0, 1)
        query = key if state is stored else state.transpose(0, 1)
        value = key if projection is stored else projection.transpose(0, 1)
        out, _, xi, v = self.association_core(
            query,
            key,
            value,
            key_padding_mask=padding,
            need_weights=False,
            attn_mask=mask,
            scaling=self._scaling,
            update_steps_max=self._update_steps_max,
            update_steps_eps=self._update_steps_eps,
            return_raw_associations=raw,
            return_pattern_projections=projected,
            transform=transform,
        )
        return out.transpose(0, 1), xi, v

    def forward(
        self,
        input: Patterns,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """Retrieve for every state pattern.

        Args:
            input: (stored (B, S, ·), state (B, L, ·), projection (B, S, ·)), or one tensor for all.
            stored_pattern_padding_mask: (B, S), True or nonzero = ignore, or additive (0/-inf).
            association_mask: (L, S) or (B H, L, S), True or nonzero = ignore, or additive.

        Returns:
            (B, L, output_size); a state with nothing to associate retrieves zeros (then projected).
        """
        out = self._associate(input, stored_pattern_padding_mask, association_mask)[0]
        if self.association_activation is not None:
            out = self.association_activation(out)
        return out if self.batch_first else out.transpose(0, 1)

    @torch.no_grad()
    def get_association_matrix(
        self,
        input: Patterns,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """The associations xi (B, H, L, S), without gradient."""
        masks = stored_pattern_padding_mask, association_mask
        return self._associate(input, *masks, raw=True)[1]  # type: ignore[return-value]

    @torch.no_grad()
    def get_projected_pattern_matrix(
        self,
        input: Patterns,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """The projected patterns v (B, H, S, ·), without gradient."""
        masks = stored_pattern_padding_mask, association_mask
        return self._associate(input, *masks, projected=True)[2]  # type: ignore[return-value]

    @property
    def batch_first(self) -> bool:
        return self._batch_first

    @property
    def scaling(self) -> float | Tensor:
        scaling = self._scaling
        return scaling.clone() if isinstance(scaling, Tensor) else scaling

    @property
    def separation(self) -> str | Normalizer:
        return self.association_core.separation

    @property
    def stored_pattern_dim(self) -> int | None:
        return self.association_core.kdim

    @property
    def state_pattern_dim(self) -> int | None:
        return self.association_core.embed_dim

    @property
    def pattern_projection_dim(self) -> int | None:
        return self.association_core.vdim

    @property
    def input_size(self) -> int | None:
        return self.association_core.embed_dim

    @property
    def hidden_size(self) -> int | None:
        return self.association_core.head_dim

    @property
    def output_size(self) -> int | None:
        return self.association_core.out_dim

    @property
    def pattern_size(self) -> int | None:
        return self.association_core.pattern_dim

    @property
    def update_steps_max(self) -> int | Tensor | None:
        steps = self._update_steps_max
        return steps.clone() if isinstance(steps, Tensor) else steps

    @property
    def update_steps_eps(self) -> float | Tensor:
        eps = self._update_steps_eps
        return eps.clone() if isinstance(eps, Tensor) else eps

    @property
    def stored_pattern_as_static(self) -> bool:
        return self.association_core.key_as_static

    @property
    def state_pattern_as_static(self) -> bool:
        return self.association_core.query_as_static

    @property
    def pattern_projection_as_static(self) -> bool:
        return self.association_core.value_as_static

    @property
    def normalize_stored_pattern(self) -> bool:
        return self.norm_stored_pattern is not None

    @property
    def normalize_stored_pattern_affine(self) -> bool:
        return self.norm_stored_pattern is not None and self.norm_stored_pattern.elementwise_affine

    @property
    def normalize_state_pattern(self) -> bool:
        return self.norm_state_pattern is not None

    @property
    def normalize_state_pattern_affine(self) -> bool:
        return self.norm_state_pattern is not None and self.norm_state_pattern.elementwise_affine

    @property
    def normalize_pattern_projection(self) -> bool:
        return self.norm_pattern_projection is not None

    @property
    def normalize_pattern_projection_affine(self) -> bool:
        norm = self.norm_pattern_projection
        return norm is not None and norm.elementwise_affine

    @property
    def normalize_hopfield_space(self) -> bool:
        return self.association_core.normalize_pattern

    @property
    def normalize_hopfield_space_affine(self) -> bool:
        return self.association_core.normalize_pattern_affine


def _read_through(name: str) -> property:
    return property(lambda self: getattr(self.hopfield, name), doc=f"``Hopfield.{name}``.")


class _Wrapped(nn.Module):
    """A Hopfield association some of whose inputs are learned; it has its settings."""

    hopfield: Hopfield

    def __init__(self, quantity: int, **hopfield: Any) -> None:
        super().__init__()
        checks.positive_int("quantity", quantity)
        self.hopfield = Hopfield(**hopfield)
        self._quantity = quantity

    def _learned(self, size: int, trainable: bool) -> nn.Parameter:
        shape = (1, self.quantity) if self.batch_first else (self.quantity, 1)
        return nn.Parameter(torch.empty(*shape, size), requires_grad=trainable)

    def _expanded(self, x: Tensor, like: Tensor) -> Tensor:
        dim = 0 if self.batch_first else 1
        sizes = [-1, -1, -1]
        sizes[dim] = like.shape[dim]
        return x.expand(sizes)

    @property
    def quantity(self) -> int:
        """Learned patterns."""
        return self._quantity

    batch_first = _read_through("batch_first")
    scaling = _read_through("scaling")
    separation = _read_through("separation")
    stored_pattern_dim = _read_through("stored_pattern_dim")
    state_pattern_dim = _read_through("state_pattern_dim")
    pattern_projection_dim = _read_through("pattern_projection_dim")
    input_size = _read_through("input_size")
    hidden_size = _read_through("hidden_size")
    output_size = _read_through("output_size")
    pattern_size = _read_through("pattern_size")
    update_steps_max = _read_through("update_steps_max")
    update_steps_eps = _read_through("update_steps_eps")
    stored_pattern_as_static = _read_through("stored_pattern_as_static")
    state_pattern_as_static = _read_through("state_pattern_as_static")
    pattern_projection_as_static = _read_through("pattern_projection_as_static")
    normalize_stored_pattern = _read_through("normalize_stored_pattern")
    normalize_stored_pattern_affine = _read_through("normalize_stored_pattern_affine")
    normalize_state_pattern = _read_through("normalize_state_pattern")
    normalize_state_pattern_affine = _read_through("normalize_state_pattern_affine")
    normalize_pattern_projection = _read_through("normalize_pattern_projection")
    normalize_pattern_projection_affine = _read_through("normalize_pattern_projection_affine")
    normalize_hopfield_space = _read_through("normalize_hopfield_space")
    normalize_hopfield_space_affine = _read_through("normalize_hopfield_space_affine")


# hflayers' order of the arguments after input_size, up to where the wrappers differ
_FIRST = (
    "hidden_size",
    "output_size",
    "pattern_size",
    "num_heads",
    "scaling",
    "update_steps_max",
    "update_steps_eps",
)


def positional(args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments after input_size, added to the named ones."""
    if len(args) > len(_FIRST):
        raise TypeError(f"at most {len(_FIRST) + 1} positional arguments; name the others")
    for name, value in zip(_FIRST, args, strict=False):
        if name in named:
            raise TypeError(f"got multiple values for argument {name!r}")
        named[name] = value
    return named


def _size(*candidates: int | None) -> int:
    known = [size for size in candidates if size is not None]
    if not known:
        checks.fail("input_size", "be given", None)
    return known[0]


class HopfieldPooling(_Wrapped):
    """Pool patterns with ``quantity`` learned states: (B, S, ·) -> (B, quantity, out).

    Args:
        input_size: size of the learned state patterns and of the input.
        quantity: learned state patterns. trainable: they get a gradient.
        flatten: return (B, quantity * out) as hflayers does.
        **hopfield: every argument of :class:`Hopfield`.

    Example:
        >>> HopfieldPooling(input_size=8)(torch.randn(3, 20, 8)).shape
        torch.Size([3, 1, 8])
    """

    def __init__(
        self,
        input_size: int | None,
        *args: Any,
        quantity: int = 1,
        trainable: bool = True,
        flatten: bool = False,
        **hopfield: Any,
    ) -> None:
        super().__init__(quantity, input_size=input_size, **positional(args, hopfield))
        core = self.hopfield
        size = _size(
            core.hidden_size if core.state_pattern_as_static else core.input_size, input_size
        )
        self.flatten = flatten
        self.pooling_weights = self._learned(size, trainable)
        nn.init.normal_(self.pooling_weights, mean=0.0, std=0.02)

    def reset_parameters(self) -> None:
        """The association's, and state patterns N(0, 0.02)."""
        self.hopfield.reset_parameters()
        nn.init.normal_(self.pooling_weights, mean=0.0, std=0.02)

    def _prepare(self, input: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        pair = (input, input) if isinstance(input, Tensor) else input
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            checks.fail(
                "input",
                "be one tensor or the tuple (stored, projection)",
                type(input).__name__,
                error=TypeError,
            )
        stored, projection = pair
        checks.floating("stored", stored)
        return stored, self._expanded(self.pooling_weights, stored), projection

    def forward(
        self,
        input: Tensor | tuple[Tensor, Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """input (B, S, ·), or (stored, projection) -> (B, quantity, out)."""
        out = self.hopfield(self._prepare(input), stored_pattern_padding_mask, association_mask)
        return out.flatten(1) if self.flatten else out

    def get_association_matrix(
        self,
        input: Tensor | tuple[Tensor, Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, quantity, S)."""
        return self.hopfield.get_association_matrix(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )

    def get_projected_pattern_matrix(
        self,
        input: Tensor | tuple[Tensor, Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, S, ·)."""
        return self.hopfield.get_projected_pattern_matrix(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )


class HopfieldLayer(_Wrapped):
    """Look state patterns up in ``quantity`` learned stored patterns: (B, L, ·) -> (B, L, out).

    Args:
        input_size: size of the state patterns.
        lookup_weights_as_separated: learn projections of their own, not those of the stored
        patterns.
        lookup_targets_as_trainable: they get a gradient.
        quantity: learned stored patterns; ``num_pattern_repetitions`` is another name for it.
        trainable: the stored patterns get a gradient.
        **hopfield: every argument of :class:`Hopfield`.

    Example:
        >>> HopfieldLayer(input_size=8, quantity=16)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        input_size: int | None,
        *args: Any,
        lookup_weights_as_separated: bool = False,
        lookup_targets_as_trainable: bool = True,
        quantity: int | None = None,
        num_pattern_repetitions: int | None = None,
        trainable: bool = True,
        **hopfield: Any,
    ) -> None:
        if quantity is None:
            quantity = 1 if num_pattern_repetitions is None else num_pattern_repetitions
        elif num_pattern_repetitions not in (None, quantity):
            checks.fail(
                "num_pattern_repetitions",
                f"equal quantity={quantity} when both are given",
                num_pattern_repetitions,
            )
        super().__init__(quantity, input_size=input_size, **positional(args, hopfield))
        core = self.hopfield
        size = _size(
            core.hidden_size if core.stored_pattern_as_static else core.stored_pattern_dim,
            input_size,
        )
        self.lookup_weights = self._learned(size, trainable)
        self.register_parameter("target_weights", None)
        if lookup_weights_as_separated:
            wanted = hopfield.get("pattern_projection_size")
            self.target_weights = self._learned(
                size if wanted is None else wanted, lookup_targets_as_trainable
            )
        self._reset_memory()

    def _reset_memory(self) -> None:
        for weights in (self.lookup_weights, self.target_weights):
            if weights is not None:
                nn.init.normal_(weights, mean=0.0, std=0.02)

    def reset_parameters(self) -> None:
        """The association's, and stored patterns N(0, 0.02)."""
        self.hopfield.reset_parameters()
        self._reset_memory()

    def _prepare(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checks.floating("state", input)
        stored = self._expanded(self.lookup_weights, input)
        if self.target_weights is None:
            return stored, input, stored
        return stored, input, self._expanded(self.target_weights, input)

    def forward(
        self,
        input: Tensor,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """input (B, L, input_size) -> (B, L, out)."""
        return self.hopfield(self._prepare(input), stored_pattern_padding_mask, association_mask)

    def get_association_matrix(
        self,
        input: Tensor,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, L, quantity)."""
        return self.hopfield.get_association_matrix(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )

    def get_projected_pattern_matrix(
        self,
        input: Tensor,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, quantity, ·)."""
        return self.hopfield.get_projected_pattern_matrix(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )
