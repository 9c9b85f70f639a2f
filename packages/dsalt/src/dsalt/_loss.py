"""Cross-entropy of a linear head in chunks of tokens: all logits never exist at once.

The gradient of a chunk is computed right after its loss, from the same logits, so that nothing is
computed twice: three matrix products per training step, as many as with all logits at once.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared_kernels import ops
from shared_kernels.rows import wide

from . import _ops
from ._call import LinearCrossEntropy, LossGradients
from ._labels import IGNORE_INDEX

CHUNK = 1 << 25  # logits that exist at once


def linear_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, vocab: int) -> Tensor:
    r"""Mean of -log softmax(head(h))[label] over the labels that are not -100; 0 without any.

    Args:
        hidden: (T, d).
        head: module from (T, d) to logits (T, vocab). A plain ``nn.Linear`` without bias takes the
            registered operator; any other module is called chunk by chunk, again in the backward
            pass.
        labels: (T,) int64.
        vocab: number of logits, sizes the chunks.
    """
    count = (labels != IGNORE_INDEX).sum().clamp(min=1)
    chunk = max(64, CHUNK // vocab)
    if is_plain(head):
        weight = cast(Tensor, head.weight)
        h, w = (x for x in ops.autocast_lower(hidden, weight) if x is not None)
        wanted = (ops.wants_gradient(h), ops.wants_gradient(w))
        call = LinearCrossEntropy(h, w, labels, chunk, *wanted)
        return _ops.linear_cross_entropy(call) / count
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    if torch.is_grad_enabled():
        sums = [checkpoint(_of_module, head, h, y, use_reentrant=False) for h, y in parts]
    else:
        sums = [_of_module(head, h, y) for h, y in parts]
    return torch.stack(sums).sum() / count


def is_plain(head: nn.Module) -> bool:
    """Whether calling the module is h W^T and nothing else: no subclass, no hook, no bias."""
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    hooks = (
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    )
    return not any(hooks)


def total(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label]; logits of a half type are widened first."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log softmax(logits (..., V))[label] over the labels that count; 0 without any."""
    labels = labels.reshape(-1)
    count = (labels != IGNORE_INDEX).sum().clamp(min=1)
    return total(logits.reshape(-1, logits.shape[-1]), labels) / count


def _of_module(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return total(head(hidden), labels)


def forward(call: LinearCrossEntropy) -> tuple[Tensor, LossGradients]:
    """The sum of the losses, and its gradients in hidden and weight where they will be wanted."""
    hidden, weight = call.hidden, call.weight
    dtype = wide(hidden)
    loss = hidden.new_zeros((), dtype=dtype)
    d_hidden = torch.zeros_like(hidden) if call.with_hidden else hidden.new_zeros(0)
    d_weight = (
        torch.zeros_like(weight, dtype=dtype) if call.with_weight else weight.new_zeros(0).to(dtype)
    )
    for first in range(0, hidden.shape[0], call.chunk):
        rows = slice(first, first + call.chunk)
        h, y = hidden[rows], call.labels[rows]
        valid = (y != IGNORE_INDEX)[:, None]
        index = y.clamp(min=0)[:, None]
        logits = (h @ weight.T).to(dtype)
        logits.sub_(logits.amax(-1, keepdim=True))
        right = logits.gather(-1, index)
        z = logits.exp_().sum(-1, keepdim=True)
        loss += torch.where(valid, z.log() - right, 0).sum()
        if call.with_hidden or call.with_weight:
            # softmax - one at the label; a token without a label has none
            g = logits.mul_(torch.where(valid, z.reciprocal(), 0))
            g.scatter_add_(-1, index, torch.where(valid, -1.0, 0.0).to(dtype))
            g = g.to(hidden.dtype)
            if call.with_hidden:
                torch.mm(g, weight, out=d_hidden[rows])
            if call.with_weight and weight.dtype == dtype:
                d_weight.addmm_(g.T, h)
            elif call.with_weight:
                d_weight += g.T @ h
    return loss, LossGradients(d_hidden, d_weight)


def backward(
    call: LinearCrossEntropy, saved: LossGradients, d_loss: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    dtype = saved.d_hidden.dtype  # weight has hidden's
    found = {"hidden": saved.d_hidden, "weight": saved.d_weight}
    return {field: (found[field] * d_loss).to(dtype) for field in needs}
