"""A memory whose patterns are spread over ranks: what one process retrieves, and its gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist

from difflayers import retrieve
from shared_kernels.testing.ranks import BOUNDS, needs_ranks, on_ranks, refused

pytestmark = needs_ranks
SPLIT = (31, 0, 9)  # one rank has no pattern
CASES = {
    f"{separation} {beta} {steps}": (separation, beta, steps)
    for separation in ("softmax", "entmax15", "sparsemax")
    for beta, steps in ((1.0, 1), (4.0, 3), (30.0, None))
}


def result(name, dtype, part=slice(None), group=None):
    separation, beta, steps = CASES[name]
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(sum(SPLIT), 6, generator=generator, dtype=torch.float64)
    query = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    memory, query = (x.to(dtype).requires_grad_() for x in (memory[part].clone(), query))
    found = retrieve(memory, query, beta, steps, separation=separation, group=group)
    grads = torch.autograd.grad(found.patterns.square().sum(), (memory, query))
    return {"patterns": found.patterns.detach(), "steps": found.steps, "query": grads[1],
            "memory": grads[0]}  # fmt: skip


def work(rank):
    world, before = dist.group.WORLD, sum(SPLIT[:rank])
    part = slice(before, before + SPLIT[rank])
    found = {
        (name, dtype): result(name, dtype, part, world)
        for name in CASES
        for dtype in (torch.float64, torch.float32)
    }
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    calls = {
        "callable": lambda: retrieve(x, x, separation=torch.softmax, group=world),
        "batch": lambda: retrieve(x[None], x, group=world),
        "query": lambda: retrieve(x, x + rank, group=world),
        "beta": lambda: retrieve(x, x, 1.0 + rank, group=world),
        "certified": lambda: retrieve(
            x, x, separation="sparsemax", certified=True, group=world
        ),
        "group": lambda: retrieve(x, x, group=7),
    }  # fmt: skip
    found["refused"] = refused(calls)
    return found


def test_ranks_with_a_part_of_the_patterns_retrieve_what_one_process_does():
    ranks = on_ranks(len(SPLIT), work)
    for name in CASES:
        for dtype in (torch.float64, torch.float32):
            exact = result(name, dtype)
            found = [rank[name, dtype] for rank in ranks]
            for each in found:  # the same bits on every rank
                assert torch.equal(each["patterns"], found[0]["patterns"])
                if dtype == torch.float64:
                    assert torch.equal(each["steps"], exact["steps"])
            for key, whole in exact.items():
                if key == "steps":
                    continue
                together = found[1][key]
                if key == "memory":
                    together = torch.cat([each[key] for each in found])
                error = float((together - whole).abs().max() / whole.abs().max().clamp(min=1.0))
                assert error <= BOUNDS[dtype], (name, key, error)
    for rank in ranks:
        said = rank["refused"]
        assert said["callable"].startswith("`separation` must be one of softmax")
        assert said["batch"].startswith("`memory` must have shape (N, d) with `group`")
        assert said["query"].startswith("`query` must be the same on every rank")
        assert said["beta"].startswith("`beta, steps, eps and separation` must be the same")
        assert said["certified"].startswith("`certified` must be False with `group`")
        assert "ProcessGroup" in said["group"]
