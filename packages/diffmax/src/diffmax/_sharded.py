"""A vocabulary that is sharded as a DTensor: what is allowed, and the shards of this rank."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from torch import Tensor

from shared_kernels import checks


class Local(NamedTuple):
    """The mesh of a loss over a sharded vocabulary, and each tensor's part on this rank."""

    mesh: Any
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor


def is_distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor. Nobody has one before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in tensors)


def local(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, group: Any) -> Local:
    """The parts on this rank.

    Raises:
        ValueError: on every rank alike: placements that are not those of a vocabulary sharded by
            rows, a group beside them, a mesh of more dimensions, or a rank without a class.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    hint = (
        "under FSDP, call the loss inside the forward pass of the module that is fully sharded; of "
        "other layouts pass weight.full_tensor(), or weight.to_local() with `group`"
    )
    if group is not None:
        checks.fail("group", "be None beside DTensors, whose mesh is the group", "a group", hint)
    mesh: Any = getattr(weight, "device_mesh", None)
    for name, x, wanted in (
        ("weight", weight, Shard(0)),
        ("hidden", hidden, Replicate()),
        ("bias", bias, Shard(0)),
        ("target", target, Replicate()),
    ):
        if x is None or (name == "target" and not isinstance(x, DTensor)):
            continue
        got = x.placements if isinstance(x, DTensor) else "a plain tensor"
        if got != (wanted,):
            checks.fail(name, f"be a DTensor placed as ({wanted},)", got, hint)
        if x.device_mesh != mesh:  # type: ignore[attr-defined]
            checks.fail(name, f"be on the mesh of `weight` {mesh}", x.device_mesh, hint)  # type: ignore[attr-defined]
    V, ranks = weight.shape[0], mesh.size()
    if math.ceil(V / ranks) * (ranks - 1) >= V:
        checks.fail("weight", f"have a class for each of {ranks} ranks", f"{V} classes", hint)
    return Local(
        mesh,
        hidden.to_local(),  # type: ignore[attr-defined]
        weight.to_local(),  # type: ignore[attr-defined]
        None if bias is None else bias.to_local(),  # type: ignore[attr-defined]
        target.to_local() if isinstance(target, DTensor) else target,
    )


def replicated(loss: Tensor, mesh: Any) -> Tensor:
    """The loss that every rank of the mesh has, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(loss, mesh, [Replicate()], run_check=False)
