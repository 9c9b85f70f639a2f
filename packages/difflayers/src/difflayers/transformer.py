"""Encoder and decoder layers with Hopfield associations, for torch's transformer stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _checks
from .hopfield import Hopfield, setting


def _activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(activation):
        return activation
    found = getattr(torch, activation, None) or getattr(nn.functional, activation, None)
    if not callable(found):
        checks.fail("activation", "name a torch function or be callable", repr(activation))
    function: Callable[[Tensor], Tensor] = found
    return function


def _association(d_model: Any, nhead: Any, dropout: float, batch_first: bool) -> Hopfield:
    d_model, nhead = _checks.positive("d_model", d_model), _checks.positive("nhead", nhead)
    return Hopfield(d_model, num_heads=nhead, dropout=dropout, batch_first=batch_first)


def _causal(
    mask: Tensor | None, is_causal: bool, x: Tensor, other: Tensor, first: bool
) -> Tensor | None:
    """torch's rule: is_causal is a hint that goes with a mask; without one it makes the mask."""
    if mask is not None or not is_causal:
        return mask
    L, S = (t.shape[1 if first else 0] for t in (x, other))
    return torch.ones(L, S, dtype=torch.bool, device=x.device).triu(1)


class _Layer(nn.Module):
    """What both layers have: the two linear maps behind the associations, and settings."""

    linear_residual: nn.Linear
    dropout_residual: nn.Dropout
    linear_output: nn.Linear
    norm_output: nn.LayerNorm
    dropout_output: nn.Dropout
    activation_residual: Callable[[Tensor], Tensor]
    _size: int
    _batch_first: bool

    def reset_parameters(self) -> None:
        """Initialise all parameters anew."""
        for child in self.children():
            for module in child.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                    break

    def _mapped(self, x: Tensor) -> Tensor:
        """LN(x + W_2 act(W_1 x))."""
        inner = self.dropout_residual(self.activation_residual(self.linear_residual(x)))
        out: Tensor = self.norm_output(x + self.dropout_output(self.linear_output(inner)))
        return out

    @property
    def self_attn(self) -> Hopfield:
        """The association of the input with itself, under the name of torch's own layers."""
        raise NotImplementedError

    @property
    def batch_first(self) -> bool:
        return self._batch_first

    @property
    def input_size(self) -> int | None:
        size: int | None = setting(self.self_attn, "input_size")
        return size

    @property
    def output_size(self) -> int:
        return self._size


def _associations(association: Hopfield, input: Any) -> Tensor:
    associate: Callable[[Any], Tensor] = setting(association, "get_association_matrix")
    return associate(input)


class HopfieldEncoderLayer(_Layer):
    """x <- LN(x + Hopfield(x)), x <- LN(x + W_2 act(W_1 x)).

    Two ways to make one: ``HopfieldEncoderLayer(d_model, nhead, dim_feedforward, dropout,
    activation, batch_first)``, or with a Hopfield instance first (it is copied and initialised
    anew), ``HopfieldEncoderLayer(hopfield, dim_feedforward, dropout, activation)``.

    Args:
        d_model: size of the patterns, or a :class:`Hopfield`.
        nhead: association heads.
        dim_feedforward: size between the two linear maps.
        dropout: after the association, inside and after the linear maps (in the first form, of the
            associations too).
        activation: name of a torch function, or a callable.
        batch_first: (batch, N, d_model); torch's own layers default to False, these to True.

    Example:
        >>> layer = HopfieldEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
        >>> nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        d_model: int | Hopfield | None = None,
        nhead: Any = None,
        dim_feedforward: Any = None,
        dropout: Any = None,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        batch_first: bool = True,
        *,
        hopfield_association: Hopfield | None = None,
    ) -> None:
        super().__init__()
        first = d_model if hopfield_association is None else hopfield_association
        if isinstance(first, Hopfield):
            if nhead is not None:
                # hflayers' order: (hopfield, dim_feedforward, dropout, activation)
                if isinstance(dropout, str) or callable(dropout):
                    activation, dropout = dropout, None
                if dim_feedforward is not None and dropout is None:
                    dropout, dim_feedforward = dim_feedforward, None
                dim_feedforward = nhead if dim_feedforward is None else dim_feedforward
            association = copy.deepcopy(first)
            association.reset_parameters()
        else:
            association = _association(d_model, nhead, _default(dropout, 0.1), batch_first)
        dropout, dim_feedforward = _default(dropout, 0.1), _default(dim_feedforward, 2048)
        self._size = size = association.state_pattern_dim or 0
        self.hopfield_association = association
        self.linear_residual = nn.Linear(size, dim_feedforward)
        self.dropout_residual = nn.Dropout(dropout)
        self.linear_output = nn.Linear(dim_feedforward, size)
        self.norm_residual = nn.LayerNorm(size)
        self.norm_output = nn.LayerNorm(size)
        self.dropout_hopfield_association = nn.Dropout(dropout)
        self.dropout_output = nn.Dropout(dropout)
        self._batch_first = association.batch_first
        self.activation_residual = _activation(activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src like the association's input; masks as in `Hopfield.forward`."""
        mask = _causal(src_mask, is_causal, src, src, self._batch_first)
        found = self.hopfield_association(src, src_key_padding_mask, mask)
        return self._mapped(self.norm_residual(src + self.dropout_hopfield_association(found)))

    def get_association_matrix(self, input: Any) -> Tensor:
        """Associations (B, H, L, S) of the layer's Hopfield on ``input``."""
        return _associations(self.hopfield_association, input)

    @property
    def self_attn(self) -> Hopfield:
        """The association, under the name by which torch reads ``batch_first``."""
        return self.hopfield_association


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


class HopfieldDecoderLayer(_Layer):
    """x <- LN(x + Hopfield(x)), LN(x + Hopfield(memory, x, memory)), LN(x + W_2 act(W_1 x)).

    ``HopfieldDecoderLayer(d_model, nhead, dim_feedforward, dropout, activation, batch_first)``, or
    with two Hopfield instances, ``HopfieldDecoderLayer(own, cross, dim_feedforward, dropout,
    activation)``; they are copied and initialised anew. Arguments as `HopfieldEncoderLayer`.

    Example:
        >>> layer = HopfieldDecoderLayer(d_model=8, nhead=2, dim_feedforward=16)
        >>> nn.TransformerDecoder(layer, 2)(torch.randn(3, 5, 8), torch.randn(3, 7, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        d_model: int | Hopfield | None = None,
        nhead: Any = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        batch_first: bool = True,
        *,
        hopfield_association_self: Hopfield | None = None,
        hopfield_association_cross: Hopfield | None = None,
    ) -> None:
        super().__init__()
        own = d_model if hopfield_association_self is None else hopfield_association_self
        cross = nhead if hopfield_association_cross is None else hopfield_association_cross
        if isinstance(own, Hopfield):
            if not isinstance(cross, Hopfield):
                checks.fail(
                    "hopfield_association_cross",
                    "be a Hopfield when the first is one",
                    type(cross).__name__,
                    error=TypeError,
                )
            own, cross = copy.deepcopy(own), copy.deepcopy(cross)
            own.reset_parameters()
            cross.reset_parameters()
        else:
            own = _association(d_model, nhead, dropout, batch_first)
            cross = _association(d_model, nhead, dropout, batch_first)
        self._size = size = own.state_pattern_dim or 0
        self.hopfield_association_self = own
        self.hopfield_association_cross = cross
        self.linear_residual = nn.Linear(size, dim_feedforward)
        self.dropout_residual = nn.Dropout(dropout)
        self.linear_output = nn.Linear(dim_feedforward, size)
        self.norm_residual_self = nn.LayerNorm(size)
        self.norm_residual_cross = nn.LayerNorm(size)
        self.norm_output = nn.LayerNorm(size)
        self.dropout_hopfield_association_self = nn.Dropout(dropout)
        self.dropout_hopfield_association_cross = nn.Dropout(dropout)
        self.dropout_output = nn.Dropout(dropout)
        self._batch_first = own.batch_first
        self.activation_residual = _activation(activation)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt (B, L, d_model), memory (B, S, ·), in the associations' layout."""
        mask = _causal(tgt_mask, tgt_is_causal, tgt, tgt, self._batch_first)
        found = self.hopfield_association_self(tgt, tgt_key_padding_mask, mask)
        tgt = self.norm_residual_self(tgt + self.dropout_hopfield_association_self(found))
        mask = _causal(memory_mask, memory_is_causal, tgt, memory, self._batch_first)
        found = self.hopfield_association_cross(
            (memory, tgt, memory), memory_key_padding_mask, mask
        )
        tgt = self.norm_residual_cross(tgt + self.dropout_hopfield_association_cross(found))
        return self._mapped(tgt)

    def get_association_matrix_self(self, input: Any) -> Tensor:
        """Associations (B, H, L, S) of the self-association on ``input``."""
        return _associations(self.hopfield_association_self, input)

    def get_association_matrix_cross(self, input: Any) -> Tensor:
        """Associations (B, H, L, S) of the cross-association on ``input``."""
        return _associations(self.hopfield_association_cross, input)

    @property
    def self_attn(self) -> Hopfield:
        """The self-association, under the name by which torch reads ``batch_first``."""
        return self.hopfield_association_self
