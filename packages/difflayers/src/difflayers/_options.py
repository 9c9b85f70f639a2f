"""The keywords that the layers hand on to `Hopfield`, for type checkers."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from ._separation import Normalizer


class HopfieldOptions(TypedDict, total=False):
    """Keywords of `Hopfield` after ``update_steps_eps``."""

    normalize_stored_pattern: bool
    normalize_stored_pattern_affine: bool
    normalize_stored_pattern_eps: float
    normalize_state_pattern: bool
    normalize_state_pattern_affine: bool
    normalize_state_pattern_eps: float
    normalize_pattern_projection: bool
    normalize_pattern_projection_affine: bool
    normalize_pattern_projection_eps: float
    normalize_hopfield_space: bool
    normalize_hopfield_space_affine: bool
    normalize_hopfield_space_eps: float
    stored_pattern_as_static: bool
    state_pattern_as_static: bool
    pattern_projection_as_static: bool
    pattern_projection_as_connected: bool
    stored_pattern_size: int | None
    pattern_projection_size: int | None
    batch_first: bool
    association_activation: str | None
    dropout: float
    input_bias: bool
    concat_bias_pattern: bool
    add_zero_association: bool
    disable_out_projection: bool
    separation: str | Normalizer


class AllHopfieldOptions(HopfieldOptions, total=False):
    """Keywords of `Hopfield` after ``input_size``."""

    hidden_size: int | None
    output_size: int | None
    pattern_size: int | None
    num_heads: int
    scaling: float | Tensor | None
    update_steps_max: int | Tensor | None
    update_steps_eps: float | Tensor
