"""Batches of every accepted form."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, distributed, packed

from . import _labels
from ._context import Chunk
from ._labels import IGNORE_INDEX

__all__: list[str] = []


class Batch(NamedTuple):
    input_ids: Tensor  # (B, N)
    labels: Tensor  # (B, N), aligned with the logits, -100 is ignored
    extras: dict[str, Any]  # further keyword arguments of the model

    def valid(self) -> int:
        """How many labels count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        extras = {k: move(v) for k, v in self.extras.items()}
        return Batch(move(self.input_ids), move(self.labels), extras)


def as_batch(item: Any, shift_labels: bool = False) -> Batch:
    """A loader's item as a Batch: ids, (x,), (x, y) or a dict; without labels, the next token.

    With ``shift_labels`` given labels are the inputs themselves and are moved by one here.
    """
    extras: dict[str, Any] = {}
    labels = None
    if isinstance(item, Tensor):
        ids = item
    elif isinstance(item, Mapping):
        extras = dict(item)
        if "input_ids" not in extras:
            checks.fail("batch", 'have the key "input_ids"', sorted(map(str, extras)))
        ids, labels = extras.pop("input_ids"), extras.pop("labels", None)
    elif isinstance(item, Sequence) and 1 <= len(item) <= 2:
        ids, labels = item[0], item[1] if len(item) == 2 else None
    else:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sequence) else type(item)
        checks.fail("batch", "be ids, (ids,), (ids, labels) or a dict", got, error=TypeError)
    checks.integer("batch", ids)
    checks.shape("batch", ids, (None, None), "(B, N)")
    # token files hold uint16, in which -100 is a token and nothing is computed
    ids = ids.long()
    if labels is not None:
        checks.integer("labels", labels)
        labels = labels.long()
    mask = extras.get("attention_mask")
    if labels is None or shift_labels:
        cu_seqlens = extras.get("cu_seqlens")
        labels = _labels.next_tokens(ids if labels is None else labels, mask, cu_seqlens)
        if cu_seqlens is None:
            # the last position has no next token: it need not be computed
            ids, labels = ids[:, :-1], labels[:, :-1]
            if mask is not None:
                extras["attention_mask"] = mask[:, :-1]
    else:
        if labels.shape != ids.shape:
            checks.fail("labels", f"have the ids' shape {tuple(ids.shape)}", tuple(labels.shape))
        labels = _labels.without_padding(labels, mask)
    return Batch(ids, labels, extras)


def chunk_of(batch: Batch, team: distributed.Ranks | None) -> Batch:
    """This rank's tokens of a batch that its team has read; refused on all ranks or on none."""
    if team is None:
        return batch
    ids, labels, extras = batch
    B, n = ids.shape
    with distributed.agreement(team) as agreed:
        mask = extras.get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            checks.fail(
                "attention_mask",
                "be all ones with context_parallel",
                "padding",
                "pack sequences into one row and give `cu_seqlens`",
                NotImplementedError,
            )
        width = -(-n // team.size)
        if width * (team.size - 1) >= n:
            checks.fail(
                "batch",
                f"hold a token for each of the {team.size} ranks of context_parallel",
                f"{n} per row in chunks of {width}",
            )
        agreed.equal["train_loader"] = distributed.fingerprint(ids.numpy(), labels.numpy())
    starts = [min(n, width * rank) for rank in range(team.size + 1)]
    bounds = extras.get("cu_seqlens")
    if bounds is not None:
        packed.check(bounds, n, B=B)
    whole = sorted({0, n, *(() if bounds is None else bounds.tolist())})
    own = slice(*starts[team.rank : team.rank + 2])
    extras = {name: x for name, x in extras.items() if name != "attention_mask"}
    extras["group"] = Chunk(team, starts, whole)
    return Batch(ids[:, own].contiguous(), labels[:, own].contiguous(), extras)


def warn_if_copy(batch: Batch) -> None:
    """Labels that equal the inputs teach copying: most often a missing shift."""
    counted = batch.labels != IGNORE_INDEX
    if bool(counted.any()) and bool((batch.labels == batch.input_ids)[counted].all()):
        warnings.warn(
            "the labels equal the inputs at every position, so the model learns to copy; "
            "give next-token labels, or shift_labels=True",
            stacklevel=4,
        )
