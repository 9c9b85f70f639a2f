"""The optimizer of a run: AdamW, or the user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared_kernels import checks

from ._config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig, sharded: bool) -> torch.optim.Optimizer:
    """AdamW of the settings, or what ``config.optimizer`` is or makes."""
    given, groups = config.optimizer, decay_groups(model, config.weight_decay)
    if given is None:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if isinstance(given, torch.optim.Optimizer):
        if sharded:
            checks.fail(
                "optimizer",
                "be a function (groups) -> optimizer with fsdp",
                type(given).__name__,
                "sharding makes new parameters",
            )
        optimizer = given
    elif callable(given):
        optimizer = given(groups)
    else:
        needs = "be an optimizer or a function (groups) -> optimizer"
        checks.fail("optimizer", needs, type(given).__name__, error=TypeError)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held <= {id(p) for p in model.parameters()}:
        checks.fail("optimizer", "hold parameters of the model", "others too")
    return optimizer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices of linear and convolution layers decay; the rest does not.

    Embeddings (tied heads with them), norms and everything with fewer than two dimensions stay
    free of decay.
    """
    free: set[int] = set()
    norms = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    for module in model.modules():
        if isinstance(module, norms) or type(module).__name__.endswith("Norm"):
            free.update(id(p) for p in module.parameters(recurse=False))
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (rest if p.ndim < 2 or id(p) in free else decay).append(p)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def plain_options(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer remembers of a group beside its parameters and its learning rate."""
    plain = (str, int, float, bool, type(None), Tensor, tuple, list)
    return {k: v for k, v in group.items() if k not in ("params", "lr") and isinstance(v, plain)}
