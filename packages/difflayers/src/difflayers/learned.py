"""HopfieldPooling and HopfieldLayer: a learned state that pools, a learned memory to look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from ._separation import Normalizer
from .hopfield import Hopfield, Setting, setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import AllHopfieldOptions


Input = TypeVar("Input")


class _Wrapped(nn.Module, Generic[Input]):
    """A Hopfield association some of whose inputs are learned; it has its settings."""

    hopfield: Hopfield

    def __init__(self, quantity: int, **hopfield: Any) -> None:
        super().__init__()
        self._quantity = _checks.positive("quantity", quantity)
        self.hopfield = Hopfield(**hopfield)
        self._batch_first = self.hopfield.batch_first

    def _learned(self, size: int, trainable: bool) -> nn.Parameter:
        shape = (1, self.quantity) if self.batch_first else (self.quantity, 1)
        return nn.Parameter(torch.empty(*shape, size), requires_grad=trainable)

    def _expanded(self, x: Tensor, like: Tensor) -> Tensor:
        dim = 0 if self._batch_first else 1
        sizes = [-1, -1, -1]
        sizes[dim] = like.shape[dim]
        return x.expand(sizes)

    def _prepare(self, input: Input) -> tuple[Tensor, Tensor, Tensor]:
        """Stored patterns, states and projections."""
        raise NotImplementedError

    def get_association_matrix(
        self,
        input: Input,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, states, stored patterns) weights; ``input`` as for ``forward``."""
        associate: Callable[..., Tensor] = setting(self.hopfield, "get_association_matrix")
        return associate(self._prepare(input), stored_pattern_padding_mask, association_mask)

    def get_projected_pattern_matrix(
        self,
        input: Input,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, H, stored patterns, ·); ``input`` as for ``forward``."""
        project: Callable[..., Tensor] = setting(self.hopfield, "get_projected_pattern_matrix")
        return project(self._prepare(input), stored_pattern_padding_mask, association_mask)

    @property
    def quantity(self) -> int:
        """Learned patterns."""
        return self._quantity

    batch_first = Setting[bool]("_batch_first")
    scaling = Setting[float | Tensor]("hopfield.scaling")
    separation = Setting[str | Normalizer]("hopfield.separation")
    stored_pattern_dim = Setting[int | None]("hopfield.stored_pattern_dim")
    state_pattern_dim = Setting[int | None]("hopfield.state_pattern_dim")
    pattern_projection_dim = Setting[int | None]("hopfield.pattern_projection_dim")
    input_size = Setting[int | None]("hopfield.input_size")
    hidden_size = Setting[int | None]("hopfield.hidden_size")
    output_size = Setting[int | None]("hopfield.output_size")
    pattern_size = Setting[int | None]("hopfield.pattern_size")
    update_steps_max = Setting[int | Tensor | None]("hopfield.update_steps_max")
    update_steps_eps = Setting[float | Tensor]("hopfield.update_steps_eps")
    stored_pattern_as_static = Setting[bool]("hopfield.stored_pattern_as_static")
    state_pattern_as_static = Setting[bool]("hopfield.state_pattern_as_static")
    pattern_projection_as_static = Setting[bool]("hopfield.pattern_projection_as_static")
    normalize_stored_pattern = Setting[bool]("hopfield.normalize_stored_pattern")
    normalize_stored_pattern_affine = Setting[bool]("hopfield.normalize_stored_pattern_affine")
    normalize_state_pattern = Setting[bool]("hopfield.normalize_state_pattern")
    normalize_state_pattern_affine = Setting[bool]("hopfield.normalize_state_pattern_affine")
    normalize_pattern_projection = Setting[bool]("hopfield.normalize_pattern_projection")
    normalize_pattern_projection_affine = Setting[bool](
        "hopfield.normalize_pattern_projection_affine"
    )
    normalize_hopfield_space = Setting[bool]("hopfield.normalize_hopfield_space")
    normalize_hopfield_space_affine = Setting[bool]("hopfield.normalize_hopfield_space_affine")


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


class HopfieldPooling(_Wrapped[Tensor | tuple[Tensor, Tensor]]):
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
        **hopfield: Unpack[AllHopfieldOptions],
    ) -> None:
        super().__init__(quantity, input_size=input_size, **positional(args, dict(hopfield)))
        core = self.hopfield
        size = _size(
            core.hidden_size if core.state_pattern_as_static else core.input_size, input_size
        )
        self.flatten = flatten
        self.pooling_weights = self._learned(size, trainable)
        nn.init.normal_(self.pooling_weights, mean=0.0, std=0.02)

    def reset_parameters(self) -> None:
        """The association's, and state patterns N(0, 0.02)."""
        setting(self.hopfield, "reset_parameters")()
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
        out: Tensor = self.hopfield(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )
        return out.flatten(1) if self.flatten else out


class HopfieldLayer(_Wrapped[Tensor]):
    """Look state patterns up in ``quantity`` learned stored patterns: (B, L, ·) -> (B, L, out).

    Args:
        input_size: size of the state patterns.
        lookup_weights_as_separated: learn projections of their own, instead of the stored patterns.
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
        **hopfield: Unpack[AllHopfieldOptions],
    ) -> None:
        if quantity is None:
            quantity = 1 if num_pattern_repetitions is None else num_pattern_repetitions
        elif num_pattern_repetitions not in (None, quantity):
            checks.fail(
                "num_pattern_repetitions",
                f"equal quantity={quantity} when both are given",
                num_pattern_repetitions,
            )
        super().__init__(quantity, input_size=input_size, **positional(args, dict(hopfield)))
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
        setting(self.hopfield, "reset_parameters")()
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
        out: Tensor = self.hopfield(
            self._prepare(input), stored_pattern_padding_mask, association_mask
        )
        return out
