"""A moving average of weights beside those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import _checkpoint
from ._files import plain_name

__all__: list[str] = []


class Average:
    """a <- d a + (1 - d) p after each step, for every trained parameter p.

    With d = min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            plain_name(name): p.detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, p in model.named_parameters():
            if p.requires_grad:
                yield self.values[plain_name(name)], p.detach()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        for average, p in self._pairs(model):
            average.lerp_(p, weight)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with the averaged weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for module in model.modules():
            reshard: Any = getattr(module, "reshard", None)  # of FSDP2: parameters are shards again
            if reshard is not None:
                reshard()
        for average, p in self._pairs(model):
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)
        torch.clear_autocast_cache()  # a region around this keeps casts of the other weights

    def state(self, model: nn.Module, weights: dict[str, Any], keep: bool) -> dict[str, Any]:
        """The model's state dict with the average in place of its parameters, whole tensors."""
        whole = {name: _checkpoint.full(value, keep) for name, value in self.values.items()}
        first = {id(p): plain_name(name) for name, p in model.named_parameters()}
        tied = {
            plain_name(name): whole[first[id(p)]]
            for name, p in model.named_parameters(remove_duplicate=False)
            if first[id(p)] in whole
        }
        return {**weights, **tied}

    def load(self, path: Path, model: nn.Module) -> None:
        """Take the average of a checkpoint; without one it begins at the present weights."""
        if path.is_file():
            try:
                saved = load_file(str(path))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        else:
            saved = {}
        for name, p in model.named_parameters():
            name = plain_name(name)
            if name in self.values:
                value = saved.get(name)
                self.values[name] = (
                    p.detach().clone()
                    if value is None
                    else _checkpoint.sharded_as(value, p).to(p.dtype)
                )
