"""Labels of a language model: which token each place is scored against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of a place that is not scored


def without_padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels (B, N) that do not count where there is no token."""
    if attention_mask is None:
        return labels
    return labels.masked_fill(attention_mask == 0, IGNORE_INDEX)


def next_tokens(ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B, N): each place is scored against the token after it in its own sequence, if any.

    Args:
        ids: (B, N) int64 inputs, or labels that stand where the inputs stand.
        attention_mask: (B, N), nonzero where there is a token.
        cu_seqlens: (S + 1,) bounds of packed sequences.
    """
    labels = without_padding(ids, attention_mask)
    if cu_seqlens is not None:
        # the first token of a packed sequence is the next token of no other; empty sequences at
        # the end begin behind the last token
        place = cu_seqlens.long()
        padded = F.pad(labels, (0, 1))
        labels = padded.index_fill(1, place.clamp(max=ids.shape[1]), IGNORE_INDEX)[:, :-1]
    labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    # padding in front does not predict the first token
    return without_padding(labels, attention_mask)
