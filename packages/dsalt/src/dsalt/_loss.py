"""Cross-entropy of a linear head in chunks of tokens: all logits never exist at once.

The gradient of a chunk is made together with its loss, while the chunk's logits are there, so
nothing is computed twice: three matrix products per training step, as with all logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared_kernels import ops

IGNORE_INDEX = -100
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
        graph = torch.is_grad_enabled()
        wanted = (graph and h.requires_grad, graph and w.requires_grad)
        return _sum(h, w, labels, chunk, *wanted)[0] / count
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
        head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    )  # fmt: skip
    return not any(hooks)


def total(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label]; logits of a half type are widened first."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def _of_module(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return total(head(hidden), labels)


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_hidden: bool, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients in hidden and weight (empty where not wanted)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    d_hidden = torch.zeros_like(hidden) if with_hidden else hidden.new_zeros(0)
    d_weight = torch.zeros_like(weight, dtype=wide) if with_weight else weight.new_zeros(0).to(wide)
    for first in range(0, hidden.shape[0], chunk):
        rows = slice(first, first + chunk)
        h, y = hidden[rows], labels[rows]
        valid = (y != IGNORE_INDEX)[:, None]
        index = y.clamp(min=0)[:, None]
        logits = (h @ weight.T).to(wide)
        logits.sub_(logits.amax(-1, keepdim=True))
        right = logits.gather(-1, index)
        z = logits.exp_().sum(-1, keepdim=True)
        loss += torch.where(valid, z.log() - right, 0).sum()
        if with_hidden or with_weight:
            # softmax - one at the label; a token without a label has none
            g = logits.mul_(torch.where(valid, z.reciprocal(), 0))
            g.scatter_add_(-1, index, torch.where(valid, -1.0, 0.0).to(wide))
            g = g.to(hidden.dtype)
            if with_hidden:
                torch.mm(g, weight, out=d_hidden[rows])
            if with_weight and weight.dtype == wide:
                d_weight.addmm_(g.T, h)
            elif with_weight:
                d_weight += g.T @ h
    return loss, d_hidden, d_weight


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_hidden: bool,
    with_weight: bool, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if with_hidden else (0,)),
        weight.new_empty(weight.shape if with_weight else (0,), dtype=wide),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.wanted = inputs[1].dtype, inputs[4:6]


def _backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple:
    d_hidden, d_weight = ctx.saved_tensors
    d_hidden = (d_hidden * d_loss).to(d_hidden.dtype) if ctx.wanted[0] else None
    d_weight = (d_weight * d_loss).to(ctx.dtype) if ctx.wanted[1] else None
    return d_hidden, d_weight, None, None, None, None, None


_sum = ops.register_op(
    "dsalt::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, int chunk, bool with_hidden, bool with_weight, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)",
    implementations={"torch": "dsalt._loss:forward"},
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
