"""Processes: the group, the device of a rank, DDP and FSDP2 around a model, small reductions."""

from __future__ import annotations

import atexit
import copy
import os
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shared_kernels import checks, distributed

__all__: list[str] = []


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device of this process; on several GPUs that of LOCAL_RANK."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "meta":
        checks.fail("device", "be one that computes", device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            checks.fail("device", "be a device of this machine", device, "PyTorch sees no GPU here")
        index = chosen.index
        if index is None:
            local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
            if local >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                checks.fail("LOCAL_RANK", f"be below the number of GPUs ({count})", local)
            index = local
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    return chosen


class World:
    """This process among its peers. Without a group: rank 0 of 1, and every method is trivial.

    ``context`` ranks in a row share each sequence: the data is split over ``data.size`` such teams.
    """

    def __init__(self, wanted: bool, device: torch.device, context: int = 1) -> None:
        self.rank, self.size = 0, 1
        self.device = device
        self.context = context
        self.team: distributed.Ranks | None = None  # the ranks that share this one's sequences
        self._control: Any = None
        started = dist.is_available() and dist.is_initialized()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if not wanted:
            if launched > 1 and not started:
                checks.fail(
                    "ddp or fsdp",
                    f"be True with WORLD_SIZE={launched}",
                    "both False",
                    "torchrun started several processes",
                )
            return
        if not started and launched > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend)
            atexit.register(_leave)
            started = True
        if started:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                # a host-side group: counting tokens must not wait for the GPU
                gloo = dist.get_backend() == "gloo"
                self._control = dist.group.WORLD if gloo else dist.new_group(backend="gloo")
        if self.size % context or context > self.size:
            checks.fail(
                "context_parallel",
                f"divide the number of processes ({self.size})",
                context,
                "start them with torchrun --nproc-per-node",
            )
        if context > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shape = (self.size // context, context)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp"))
            self.team = distributed.resolve(mesh["cp"])

    @property
    def data(self) -> World:
        """The ranks as those that read data see them: a team is one of them."""
        if self.context == 1:
            return self
        seen = copy.copy(self)
        seen.rank, seen.size = self.rank // self.context, self.size // self.context
        return seen

    @property
    def is_main(self) -> bool:
        return self._control is None or dist.get_rank() == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all ranks."""
        if self._control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(total, group=self._control)
        return tuple(total.tolist())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        if self._control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order, on rank 0; elsewhere an empty list."""
        if self._control is None:
            return [value]
        out: list[Any] = [None] * self.size
        dist.gather_object(value, out if self.is_main else None, group=self._control)
        return out if self.is_main else []

    def naming_the_lost(self) -> AbstractContextManager[None]:
        """A block in which an error of any collective names the rank that has died."""
        if self._control is None:
            return nullcontext()
        return distributed.naming_the_lost(distributed.Ranks(self._control))

    def barrier(self) -> None:
        self.sum(0.0)

    def ensure_group(self) -> None:
        """A group of one, for sharding in a single process."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_ddp(model: nn.Module) -> bool:
    return isinstance(model, DistributedDataParallel)


def wrap_ddp(model: nn.Module, device: torch.device, find_unused: bool) -> nn.Module:
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )


def shard(model: nn.Module, world: World, cpu_offload: bool) -> None:
    """Shard the parameters in place: each element of a ModuleList, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    world.ensure_group()
    with torch.no_grad():
        # every rank starts from rank 0's values, as DDP does
        for tensor in [*model.parameters(), *model.buffers()]:
            # gloo sends the memory of a view, whatever its strides
            there = tensor.data.to(world.device).contiguous()
            dist.broadcast(there, 0)
            tensor.data.copy_(there)
    kind = world.device.type
    mesh = init_device_mesh(kind, (world.size,))
    policy = CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy()
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ModuleLists that share no parameter with anything else.

    A shared parameter has to be gathered with all its users: it stays with the whole model.
    """
    blocks: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            for block in module:
                blocks[id(block)] = block
                inside.update(id(m) for m in block.modules())
    users = Counter(id(p) for block in blocks.values() for p in block.parameters())
    for module in model.modules():
        if id(module) not in inside:
            users.update(id(p) for p in module.parameters(recurse=False))
    alone = [b for b in blocks.values() if all(users[id(p)] == 1 for p in b.parameters())]
    return [b for b in alone if any(True for _ in b.parameters())]


def shard_mesh(model: nn.Module) -> Any:
    """The mesh that the parameters are sharded over, None if each process has all of them."""
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)
        if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
            return mesh
    return None


def anywhere(flag: bool, mesh: Any) -> bool:
    """Whether the flag is set on this process or on one that shares its weights."""
    if mesh is None:
        return flag
    box = torch.tensor(float(flag), device=mesh.device_type)
    dist.all_reduce(box, group=mesh.get_group(mesh.ndim - 1))
    return bool(box)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are averaged over the ranks in the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    set_sync: Any = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)
    return nullcontext()
