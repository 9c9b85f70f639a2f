"""Every public module with parameters under FSDP's `fully_shard`: same results, same gradients.

`fully_shard` takes no parameter without dimensions; a module that learns one number keeps it in
shape (1,). One process is a mesh of its own, so that each shard is whole.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed

from shared_kernels.testing import assert_close

from .callables import MODULES

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="needs torch.distributed, gloo",
    ),
    pytest.mark.system,
]
CASES = [case for case in MODULES if any(True for _ in case.module().parameters())]


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sharded_modules_give_the_same(case, mesh):
    from torch.distributed.fsdp import fully_shard

    exact, tensors = case.module(), case.tensors()
    sharded = fully_shard(copy.deepcopy(exact), mesh=mesh)
    found = []
    for module in (exact, sharded):
        torch.manual_seed(3)
        out = case.run(module, **tensors)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append(out)
    assert_close(found[1], found[0])
    wanted = dict(exact.named_parameters())
    assert wanted.keys() == dict(sharded.named_parameters()).keys()
    for name, parameter in sharded.named_parameters():
        assert parameter.dim() > 0, name
        if wanted[name].grad is not None:
            assert_close(parameter.grad.full_tensor(), wanted[name].grad, "gradient")
