"""Attention over keys that ranks share: what one process finds, its gradients, its messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from adasplash import EntmaxAttention, adasplash, sequence_places
from shared_kernels.testing import assert_close, assert_no_worse, others_thorough
from shared_kernels.testing.ranks import BOUNDS, needs_ranks, on_ranks

from . import sharded_ranks

pytestmark = [*needs_ranks, pytest.mark.system]


@pytest.mark.parametrize("size", others_thorough([2, 4]))
def test_ranks_with_a_part_each_find_what_one_process_finds(size):
    ranks = on_ranks(size, sharded_ranks.attention, size)
    for name, i, dtype in ranks[0]:
        of_tokens, shared = sharded_ranks.result(name, dtype)
        places = torch.cat(sharded_ranks.parts(name, size)[i])
        found = [rank[name, i, dtype] for rank in ranks]
        pairs = {}
        for what, whole in zip(("out", "q", "k", "v"), of_tokens, strict=True):
            at = len(pairs)
            together = torch.cat([of_rank[at] for of_rank, _ in found], 2)
            pairs[what] = (together, whole[:, :, places])
        for what, whole in shared.items():
            pairs[what] = (sum(of_rank[what] for _, of_rank in found), whole)
        for what, (together, whole) in pairs.items():
            error = float((together - whole).abs().max() / whole.abs().max().clamp(min=1.0))
            assert error <= BOUNDS[dtype], (name, i, what, error)


def test_what_cannot_be_split_is_refused_by_name_on_every_rank():
    zero, one = on_ranks(2, sharded_ranks.refusals, 2)
    expected = {
        "one rank's alpha": "rank 1 has refused its input: ValueError: `alpha` must be in [1, 2]",
        "alpha": "`alpha` must be the same on every rank",
        "heads": "`q, k and v` must be the same on every rank",
        "mask": "`mask` must be None with `group`",
        "bias": "`bias` must be None with `group`",
        "score_mod": "`score_mod` must be None with `group`",
        "lengths": "`is_causal` must come with as many queries as keys on each rank with `group`",
        "zigzag": "`k` must hold 5 of the 11 tokens on rank 0 in zigzag, got 6",
        "layout": "`layout` must be",
        "varlen": "`varlen` must be in [0, N=12], got 13",
        "bounds": "`cu_seqlens` must",
        "mesh": "`group` must be one dimension of a mesh",
        "backend": "`backend` must be one of 'auto', 'torch', got 'triton'",
        "gradient": "`requires_grad of q, k, v or an option` must be the same on every rank",
        "cache": "`group` must be None for a cache",
        "second": "adasplash::sharded_attention",
    }
    for name, text in expected.items():
        assert text in zero[name], (name, zero[name])
        if name != "one rank's alpha":
            assert text in one[name], (name, one[name])
    assert one["one rank's alpha"].startswith("`alpha` must be in [1, 2]")


def test_a_module_on_a_mesh_and_unusual_tensors():
    ranks = on_ranks(2, sharded_ranks.modules, 2)
    torch.manual_seed(0)
    attention = EntmaxAttention(8, 2, causal=True, learn_alpha=True).double()
    x = torch.randn(1, sharded_ranks.N, 8, dtype=torch.float64, requires_grad=True)
    out = attention(x)
    out.square().sum().backward()
    places = torch.cat([found["places"] for found in ranks])
    assert sorted(places.tolist()) == list(range(sharded_ranks.N))
    for key, whole in (("out", out.detach()), ("x", x.grad)):
        together = torch.cat([found[key] for found in ranks], 1)
        assert_close(together, whole[:, places], "gradient", scale=float(whole.abs().max()))
    for name, parameter in attention.named_parameters():
        together = sum(found["parameters"][name] for found in ranks)
        assert_close(together, parameter.grad, "gradient", scale=float(parameter.grad.abs().max()))
    q, k, v = ranks[0]["inputs"]
    exact = adasplash(q, k, v)
    assert_close(ranks[0]["few queries"], exact)
    assert ranks[1]["few queries"].shape == (1, 2, 0, 8)
    wide = adasplash(*(t.bfloat16().double() for t in (q, k, v)))
    eager = adasplash(*(t.bfloat16() for t in (q, k, v)))
    for found in ranks:
        assert found["half"].dtype == torch.bfloat16
        assert_no_worse(found["half"], eager=eager, exact=wide)
        assert found["nan"][0, 1].isnan().all()
        assert_close(found["nan"][0, 0], exact[0, 0])
        assert found["no key"].eq(0).all()
        assert torch.equal(found["again"], found["few queries"])


def test_places_are_those_of_every_layout():
    for layout in ("contiguous", "zigzag"):
        for n in (1, 7, 16, 33):
            for size in (1, 2, 3):
                every = [sequence_places(n, layout=layout, rank=r, size=size) for r in range(size)]
                assert sorted(torch.cat(every).tolist()) == list(range(n))
    # causal work: a query costs as many scores as it sees keys
    work = [int((sequence_places(64, rank=r, size=4) + 1).sum()) for r in range(4)]
    assert len(set(work)) == 1
    with pytest.raises(ValueError, match="`layout` must be"):
        sequence_places(8, layout="spiral", rank=0)
    for rank in (-1, 2, 1.0):
        with pytest.raises(ValueError, match=r"`rank` must be an int in \[0, 1\], got"):
            sequence_places(8, rank=rank, size=2)
    with pytest.raises(ValueError, match="`group` must be a group, or None with `rank`"):
        sequence_places(8)


def test_a_group_of_one_has_all_keys():
    name = "causal zigzag"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = sharded_ranks.result(name, torch.float64, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    exact = sharded_ranks.result(name, torch.float64)
    for one, whole in zip(found[0], exact[0], strict=True):
        assert float((one - whole).abs().max()) <= BOUNDS[torch.float64]
