"""A memory whose patterns are spread over ranks: what one process retrieves, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from difflayers import GraphBuilder, apply_diffusion, retrieve
from difflayers.graph import RankLaplacian
from shared_kernels.testing.ranks import BOUNDS, needs_ranks, on_ranks, refused

pytestmark = [*needs_ranks, pytest.mark.system]
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
    return {
        "patterns": found.patterns.detach(),
        "steps": found.steps,
        "query": grads[1],
        "memory": grads[0],
    }


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
        "certified": lambda: retrieve(x, x, separation="sparsemax", certified=True, group=world),
        "group": lambda: retrieve(x, x, group=7),
    }
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


MODES = ("simple", "factored", "iterative", "ppr", "heat")
GRAPHS = {
    f"{mode} {normalized}": (mode, normalized) for mode in MODES for normalized in (True, False)
}


def patterns(dtype):
    """Some of them equal, one zero, and neighbours that tie: on different ranks."""
    x = torch.randn(sum(SPLIT), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[35], x[3] = x[2], 0.0
    return x.to(dtype)


def smoothed(name, dtype, part=slice(None), group=None):
    mode, normalized = GRAPHS[name]
    X = patterns(dtype)[part].clone()
    if group is None:
        builder = GraphBuilder(X).knn(4)
        L = (builder.normalized_laplacian() if normalized else builder.laplacian()).build().L
    else:
        L = RankLaplacian(X, 4, group, normalized)
    x = torch.stack((X, X.square()), 1).requires_grad_()
    out = apply_diffusion(x, L, 0.05, mode, 3)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=dtype == torch.float64)
    found = {"out": out.detach(), "grad": grad.detach()}
    if dtype == torch.float64:
        found["second"] = torch.autograd.grad(grad.pow(3).sum(), x)[0]
    return found


def diffused(rank):
    world, before = dist.group.WORLD, sum(SPLIT[:rank])
    part = slice(before, before + SPLIT[rank])
    found = {
        (name, dtype): smoothed(name, dtype, part, world)
        for name in GRAPHS
        for dtype in (torch.float64, torch.float32)
    }
    X = patterns(torch.float32)[part]
    L = RankLaplacian(X, 4, world)
    # a memory larger than one machine: smoothed, then asked
    found["retrieved"] = retrieve(apply_diffusion(X, L, 0.3), patterns(X.dtype)[:3], group=world)[0]
    bad = torch.full((SPLIT[rank], 6), float("nan"))
    calls = {
        "k": lambda: RankLaplacian(X, 40, world),
        "other k": lambda: RankLaplacian(X, 4 + rank, world),
        "columns": lambda: RankLaplacian(X[:, : 6 - rank], 4, world),
        "nan": lambda: RankLaplacian(bad if rank == 2 else X, 4, world),
        "group": lambda: RankLaplacian(X, 4, None),
        "length": lambda: apply_diffusion(X[: len(X) - (rank == 2)], L, 0.1),
        "eta": lambda: apply_diffusion(X, L, 0.1 + rank),
        "spectral": lambda: apply_diffusion(X, L, 0.1, "spectral"),
        "gradient": lambda: apply_diffusion(X.clone().requires_grad_(rank == 1), L, 0.1),
    }
    found["refused"] = refused(calls)
    return found


def test_ranks_smooth_their_patterns_as_one_process_smooths_all():
    ranks = on_ranks(len(SPLIT), diffused)
    for name in GRAPHS:
        for dtype in (torch.float64, torch.float32):
            for key, whole in smoothed(name, dtype).items():
                joined = torch.cat([rank[name, dtype][key] for rank in ranks])
                error = float((joined - whole).abs().max() / whole.abs().max().clamp(min=1.0))
                assert error <= BOUNDS[dtype], (name, dtype, key, error)
    X = patterns(torch.float32)
    L = GraphBuilder(X).knn(4).normalized_laplacian().build().L
    exact = retrieve(apply_diffusion(X, L, 0.3), X[:3])[0]
    zero = ranks[0]["refused"]
    for rank in ranks:
        assert float((rank["retrieved"] - exact).abs().max()) <= BOUNDS[torch.float32]
        said = rank["refused"]
        assert said["k"].startswith("`k` must be less than the number of patterns, 40")
        assert said["other k"].startswith("`X.dtype, its columns, k and normalized` must be")
        assert said["columns"].startswith("`X.dtype, its columns, k and normalized` must be")
        assert said["group"].startswith("`group` must be a process group")
        assert said["eta"].startswith("`X but for its length, eta, mode and steps` must be")
        assert said["spectral"].startswith("`mode` must not be 'spectral' where ranks share")
        assert said["gradient"].startswith("`requires_grad of X` must be the same on every rank")
    assert zero["nan"].startswith("rank 2 has refused its input: ValueError: `X` must be finite")
    assert zero["length"].startswith(
        "rank 2 has refused its input: ValueError: `X` must have shape"
    )


def test_a_group_of_one_has_all_patterns():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world, name = dist.group.WORLD, "heat True"
        pairs = [(smoothed(name, torch.float64, group=world), smoothed(name, torch.float64))]
        name = "entmax15 4.0 3"
        pairs.append((result(name, torch.float64, group=world), result(name, torch.float64)))
    finally:
        dist.destroy_process_group()
    for found, exact in pairs:
        for key, whole in exact.items():
            assert float((found[key] - whole).abs().max()) <= BOUNDS[torch.float64], key
