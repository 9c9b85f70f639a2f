"""The type of the language model's result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class LMOutput:
    """What the language model returns: one object for three styles of use.

    Without labels it behaves as its logits: ``out.shape``, ``out[:, -1]``, ``out.argmax(-1)``.
    With labels it unpacks: ``loss, logits = model(ids, labels=labels)``. Always: ``out.logits``,
    ``out.loss`` (None without labels), ``out.window_sizes`` (one (B, H, N) tensor per layer),
    ``out.window_reg`` (scalar; None when no layer has windows) and ``out.past_key_values`` (None
    unless ``use_cache=True``).
    """

    logits: Tensor
    loss: Tensor | None = None
    window_sizes: Any = None
    window_reg: Tensor | None = None
    past_key_values: Any = None

    def _sequence(self) -> Any:
        return self.logits if self.loss is None else (self.loss, self.logits)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._sequence())

    def __len__(self) -> int:
        return len(self._sequence())

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._sequence()[_logits_of(index)]
        return part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:
            raise AttributeError(name)
        if self.loss is not None:
            raise AttributeError(
                f"LMOutput with a loss has no attribute {name!r}: it stands for (loss, logits); "
                f"use .loss or .logits"
            )
        return getattr(self.logits, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_logits_of(args), **_logits_of(kwargs or {}))

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss.detach().item():.4f}"
        return f"LMOutput(logits={tuple(self.logits.shape)}{loss})"

    __hash__ = object.__hash__


_FIELDS = tuple(field.name for field in dataclasses.fields(LMOutput))


def _logits_of(tree: Any) -> Any:
    """The tree with every LMOutput replaced by its logits."""

    def one(x: Any) -> Any:
        return x.logits if isinstance(x, LMOutput) else x

    return pytree.tree_map(one, tree, is_leaf=lambda x: isinstance(x, LMOutput))


def _operator(name: str) -> Any:
    def method(self: LMOutput, *args: Any) -> Any:
        if self.loss is not None and name in ("__eq__", "__ne__"):
            return NotImplemented
        return getattr(self.logits, name)(*_logits_of(args))

    method.__name__ = name
    return method


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg abs lt le gt ge eq ne"
).split():
    setattr(LMOutput, f"__{_name}__", _operator(f"__{_name}__"))

# Sharding and compilers look for the tensors inside an output: tell them where they are.
pytree.register_pytree_node(
    LMOutput,
    lambda out: ([getattr(out, name) for name in _FIELDS], None),
    lambda values, _: LMOutput(**dict(zip(_FIELDS, values, strict=True))),
    serialized_type_name="dsalt.model.LMOutput",
)
