"""The loss of a batch: the model's own, that of its logits, or a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from . import _adapters, _loss
from ._config import TrainConfig
from ._data import Batch
from .model import DSALTLMHeadModel

MAX_LOGITS = 2**24  # with more, a model that can do so computes its loss in chunks
_SHIFT_TRIALS = 5  # batches on which a module's own loss is compared with ours


class Objective:
    """The loss that a run descends.

    Args:
        model: the model itself, without wrappers.
        config: the settings of the run.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.inside: Any = _adapters.inside(model)
        if callable(config.loss) and not hasattr(self.inside, "loss"):
            checks.fail(
                "loss",
                'be "model" or "cross_entropy" for a model without an attribute `loss`',
                "a function",
                "DSALTLMHeadModel has one",
            )
        accepted = inspect.signature(model.forward).parameters
        self._takes_labels = config.loss != "cross_entropy" and (
            "labels" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        )
        self._may_skip_logits = self._takes_labels and "return_logits" in accepted
        # the argument shift_labels of our own model says what it does
        own = isinstance(self.inside, DSALTLMHeadModel)
        self._trials = 0 if own or config.loss is not None else _SHIFT_TRIALS

    def __call__(
        self, run: nn.Module, batch: Batch, count: int, config: TrainConfig
    ) -> tuple[Tensor, Tensor | None]:
        """(mean loss over the ``count`` valid labels, window regulariser or None).

        ``run`` is the model in its wrappers.
        """
        given = dict(batch.extras)
        if self._takes_labels:
            given["labels"] = batch.labels
            logits = batch.input_ids.numel() * int(getattr(self.model, "vocab_size", 0))
            many = callable(config.loss) or logits >= MAX_LOGITS
            if self._may_skip_logits and many and count:
                given["return_logits"] = False
        with self._given_loss(config):
            out = run(batch.input_ids, **given)
        part: Callable[..., Any] = out.get if isinstance(out, Mapping) else partial(getattr, out)
        reg = part("window_reg", None)
        if config.window_reg_coef and reg is None:
            needs = "be 0 for a model without window_reg"
            checks.fail("window_reg_coef", needs, config.window_reg_coef)
        loss = None if config.loss == "cross_entropy" else part("loss", None)
        logits = part("logits", out)
        if isinstance(out, tuple):
            loss, logits = (out[0], out[1]) if self._takes_labels else (None, out[0])
        if loss is None or not count:  # the mean over no label may be NaN: here it is 0
            with torch.autocast(batch.labels.device.type, enabled=False):
                loss = _loss.mean(logits, batch.labels)
        elif self._trials and isinstance(logits, Tensor):
            self._trials -= 1
            _check_shift(loss.detach(), logits.detach(), batch.labels)
        return loss, reg

    @contextmanager
    def _given_loss(self, config: TrainConfig) -> Iterator[None]:
        """The model computes the function that was given as ``loss`` in place of its own."""
        if not callable(config.loss):
            yield
            return
        own, self.inside.loss = self.inside.loss, config.loss
        try:
            yield
        finally:
            self.inside.loss = own


def _check_shift(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Refuse a module that moves the labels itself, as Hugging Face's do."""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        return
    aligned = _loss.mean(logits, labels)
    moved = _loss.mean(logits[:, :-1], labels[:, 1:])
    found, off = float((loss - moved).abs()), float((loss - aligned).abs())
    close = 1e-3 * max(1.0, abs(float(loss)))
    if found < close and off > 10.0 * found and off > 1e-5:
        checks.fail(
            "model",
            "score its logits against the labels of the same place",
            "a module that shifts the labels itself: they would be shifted twice",
            'set loss="cross_entropy": the trainer computes the loss from the logits',
        )
