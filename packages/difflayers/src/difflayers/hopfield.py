"""Hopfield: an associative memory as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from ._attention import Neighbours, Transform
from ._separation import Normalizer
from .activation import HopfieldCore

if TYPE_CHECKING:
    from typing_extensions import Never

T = TypeVar("T")
Patterns = Tensor | tuple[Tensor, Tensor, Tensor]


def one_item(x: Tensor) -> Tensor:
    """The single item of a batch made by ``expand``: its work is done once, not per item."""
    return x[:1] if x.shape[0] > 1 and x.stride(0) == 0 else x


def setting(module: Any, name: str) -> Any:
    """A module's setting; where a wrapper (such as LoRA) stands for it, of whom it wraps."""
    if not hasattr(module, name) and isinstance(module, nn.Module):
        module = next((m for m in module.modules() if hasattr(m, name)), module)
    return getattr(module, name)


class Setting(Generic[T]):
    """A read-only attribute that stands elsewhere; a tensor is copied, so nobody changes it."""

    def __init__(self, path: str) -> None:
        self.names = path.split(".")
        self.__doc__ = f"``{path}``."

    @overload
    def __get__(self, module: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> T: ...

    def __get__(self, module: nn.Module | None, owner: type) -> Setting[T] | T:
        if module is None:
            return self
        value: Any = module
        for name in self.names:
            value = setting(value, name)
        return value.clone() if isinstance(value, Tensor) else value  # type: ignore[return-value]

    def __set__(self, module: nn.Module, value: Never) -> None:
        raise AttributeError(f"{self.names[-1]} of {type(module).__name__} can only be read")


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
        scaling: beta, a number or a tensor with one entry per head or of shape (1,) (a Parameter is
            learned; fully_shard wants one dimension); None is 1/sqrt(hidden_size), or 1 for purely
            static retrieval.
        update_steps_max: n >= 0 updates (n + 1 associations), one number per head, or None: until
            no head's association moves by more than ``update_steps_eps``.
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

    A row's bits follow the order of sums in torch's matrix products (the projections, and every
    association with entmax15, sparsemax or a callable) and ``scaled_dot_product_attention``
    (softmax), which follows their sizes: with another batch, padding or number of rows a row agrees
    to rounding, not to the bit. So it is in every layer that holds this one.

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
            eps = _checks.number(f"normalize_{name}_eps", eps)
            if size is None:
                checks.fail("input_size", f"be given to normalise the {name}", None)
            return nn.LayerNorm(int(size), eps=eps, elementwise_affine=affine)

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
        self._given: dict[str, Tensor] = {}
        heads = core.num_heads
        for name, value, check in (
            ("scaling", scaling, _checks.scaling),
            ("update_steps_max", update_steps_max, _checks.steps),
            ("update_steps_eps", update_steps_eps, _checks.eps),
        ):
            checked = check(value, heads)
            if not isinstance(value, Tensor):
                setattr(self, f"_{name}", checked)
                continue
            self._given[name] = value.detach().clone()
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"_{name}", value)
            else:
                # follows .to(), is in no checkpoint: hflayers' state dict
                self.register_buffer(f"_{name}", value, persistent=False)
        if isinstance(update_steps_eps, Tensor) and _checks.reads_values(update_steps_eps):
            if bool((update_steps_eps <= 0).any()):
                checks.fail("update_steps_eps", "be positive", update_steps_eps.min().item())
        self._batch_first = checks.flag("batch_first", batch_first)
        for name in ("stored_pattern", "state_pattern", "pattern_projection"):
            layer = getattr(self, f"norm_{name}")
            setattr(self, f"_normalize_{name}", layer is not None)
            is_affine = layer is not None and layer.elementwise_affine
            setattr(self, f"_normalize_{name}_affine", is_affine)
        self._sizes = (
            input_size if stored_pattern_size is None else stored_pattern_size,
            input_size,
            input_size if pattern_projection_size is None else pattern_projection_size,
        )

    def reset_parameters(self) -> None:
        """Projections N(0, 0.02), biases 0, norms 1 and 0; given tensors as they were."""
        norms = (self.norm_stored_pattern, self.norm_state_pattern, self.norm_pattern_projection)
        for module in (self.association_core, *norms):
            if module is not None:
                setting(module, "reset_parameters")()
        with torch.no_grad():
            for name, given in self._given.items():
                kept = getattr(self, f"_{name}")
                if given.is_meta and not kept.is_meta:
                    checks.fail(name, "hold values to be initialised from", "a meta tensor")
                kept.copy_(given)

    def _normalize(self, stored: Tensor, state: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        norms = (self.norm_stored_pattern, self.norm_state_pattern, self.norm_pattern_projection)
        names = ("stored", "state", "projection")
        out = []
        for name, x, norm, size in zip(
            names, (stored, state, projection), norms, self._sizes, strict=True
        ):
            if norm is not None:
                _checks.pattern_size(name, x, size)
                x = norm(x)
            out.append(x)
        return tuple(out)

    def _patterns(self, data: Any) -> tuple[Tensor, Tensor, Tensor]:
        stored, state, projection = _checks.patterns(data, self._batch_first)
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
        neighbours: Neighbours | None = None,
        backend: str = "auto",
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
            neighbours=neighbours,
            backend=backend,
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
        return out if self._batch_first else out.transpose(0, 1)

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

    batch_first = Setting[bool]("_batch_first")
    scaling = Setting[float | Tensor]("_scaling")
    update_steps_max = Setting[int | Tensor | None]("_update_steps_max")
    update_steps_eps = Setting[float | Tensor]("_update_steps_eps")
    separation = Setting[str | Normalizer]("association_core.separation")
    stored_pattern_dim = Setting[int | None]("association_core.kdim")
    state_pattern_dim = Setting[int | None]("association_core.embed_dim")
    pattern_projection_dim = Setting[int | None]("association_core.vdim")
    input_size = Setting[int | None]("association_core.embed_dim")
    hidden_size = Setting[int | None]("association_core.head_dim")
    output_size = Setting[int | None]("association_core.out_dim")
    pattern_size = Setting[int | None]("association_core.pattern_dim")
    stored_pattern_as_static = Setting[bool]("association_core.key_as_static")
    state_pattern_as_static = Setting[bool]("association_core.query_as_static")
    pattern_projection_as_static = Setting[bool]("association_core.value_as_static")
    normalize_stored_pattern = Setting[bool]("_normalize_stored_pattern")
    normalize_stored_pattern_affine = Setting[bool]("_normalize_stored_pattern_affine")
    normalize_state_pattern = Setting[bool]("_normalize_state_pattern")
    normalize_state_pattern_affine = Setting[bool]("_normalize_state_pattern_affine")
    normalize_pattern_projection = Setting[bool]("_normalize_pattern_projection")
    normalize_pattern_projection_affine = Setting[bool]("_normalize_pattern_projection_affine")
    normalize_hopfield_space = Setting[bool]("association_core.normalize_pattern")
    normalize_hopfield_space_affine = Setting[bool]("association_core.normalize_pattern_affine")
