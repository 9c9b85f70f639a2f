"""Sequences that are split over ranks: the layer of one process, its gradients, its messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dsalt import _distributed
from shared_kernels.testing import others_thorough
from shared_kernels.testing.ranks import BOUNDS, needs_ranks, on_ranks

from . import context_ranks, processes

pytestmark = [*needs_ranks, pytest.mark.system]


@pytest.mark.parametrize("size", others_thorough([2, 4]))
def test_ranks_with_a_part_each_find_what_one_process_finds(size):
    ranks = on_ranks(size, context_ranks.layers, size)
    exact = {}
    for split, name, dtype in ranks[0]:
        if (name, dtype) not in exact:
            exact[name, dtype] = context_ranks.result(name, dtype)
        of_tokens, grads = exact[name, dtype]
        found = [rank[split, name, dtype] for rank in ranks]
        pairs = {
            f"tokens {i}": (torch.cat([of_rank[i] for of_rank, _ in found], 1), whole)
            for i, whole in enumerate(of_tokens)
        }
        for key, whole in grads.items():
            pairs[key] = (sum(grads_of_rank[key] for _, grads_of_rank in found), whole)
        for key, (together, whole) in pairs.items():
            error = float((together - whole).abs().max() / whole.abs().max().clamp(min=1.0))
            assert error <= BOUNDS[dtype], (split, name, key, error)


def test_messages_do_not_grow_with_the_length():
    """A layer's bytes: halo, landmarks and sums; two counts of tokens, the same bytes."""
    size, H, K, halo = 4, 4, 3, 17
    for rank, sent in enumerate(on_ranks(size, context_ranks.traffic, size)):
        assert sent[200] == sent[800]
        # forward and backward: a rank sends its halo to the right and its gradient to the left
        neighbours = (rank < size - 1) + (rank > 0)
        of_halo = halo * (2 * context_ranks.D + H) * 4
        of_best = H * K * (2 * context_ranks.D // 4 + 1) * 4
        tokens = H * K * 8 * (rank < size - 1)
        of_sums = (size - 1) * 5 * (H + 1) * 8  # shift, two sums, their two gradients
        assert sent[800] == neighbours * (of_halo + of_best) + tokens + of_sums


@pytest.mark.parametrize(
    "moment",
    [
        "between steps",
        pytest.param("in a layer", marks=pytest.mark.thorough),
        pytest.param("in a backward pass", marks=pytest.mark.thorough),
        pytest.param("never answers", marks=pytest.mark.thorough),
        pytest.param("sharded", marks=pytest.mark.thorough),
    ],
)
def test_a_rank_that_dies_is_named_and_the_last_checkpoint_is_whole(moment, tmp_path):
    with pytest.raises(RuntimeError, match="exit codes of the ranks"):
        on_ranks(3, context_ranks.dying, moment, tmp_path, patience=8.0)
    for rank in (0, 2):
        text, seconds = torch.load(tmp_path / f"{rank}.pt")
        assert f"rank {rank} of 3: another rank has died or left" in text, text
        assert "(rank 1)" in text and seconds < 8.0 + 7.0, (text, seconds)
    # 3 steps were complete; one process goes on from what they have saved
    resumed = context_ranks.failing(tmp_path, context_parallel=1, resume_from="latest")
    resumed.train()
    context_ranks.failing(tmp_path / "whole", context_parallel=1).train()
    for key, whole in processes.weights(tmp_path / "whole" / "run", 6).items():
        found = processes.weights(tmp_path / "run", 6)[key]
        torch.testing.assert_close(found, whole, atol=processes.FLOAT64, rtol=0, msg=key)


def test_what_cannot_be_split_is_refused_by_name_on_every_rank():
    zero, one = on_ranks(2, context_ranks.refusals, 2)
    expected = {
        "empty": "rank 1 has refused its input: ValueError: `x` must hold at least one token",
        "batch": "`the batch size` must be the same on every rank, got others than rank 0's on [1]",
        "mask": "`attention_mask` must not come with `group`",
        "cache": "`use_cache` must not come with `group`",
        "global": "`landmark_mode` must be 'block_causal' with `group`",
        "bounds": "`cu_seqlens` must",
        "other bounds": "`cu_seqlens` must be the same on every rank",
        "mesh": "`group` must be one dimension of a mesh",
        "group": "`group` must be one of",
        "shift": "`shift_labels` must not come with `group`",
        "length": "`input_ids` must hold at most max_seq_len = 10 tokens per row, got 11",
    }
    for name, text in expected.items():
        assert zero[name].startswith(text) or text in zero[name], (name, zero[name])
        if name != "empty":
            assert one[name] == zero[name]
    assert one["empty"].startswith("`x` must hold at least one token on each rank, got 0; rank 1")


@pytest.mark.thorough
def test_trainings_with_any_number_of_ranks_are_that_of_one_process(tmp_path):
    processes.run(tmp_path / "one", 8)
    processes.run(tmp_path / "float32-one", 8, precision=torch.float32)
    context_ranks.packed(tmp_path / "packed-one")
    two, four = (on_ranks(n, context_ranks.train, n, tmp_path) for n in (2, 4))
    for name in ("two", "sharded", "from-one", "two-by-two", "four-from-two"):
        for key, whole in processes.weights(tmp_path / "one", 9).items():
            found = processes.weights(tmp_path / name, 9)[key]
            torch.testing.assert_close(
                found, whole, atol=processes.FLOAT64, rtol=0, msg=f"{name}: {key}"
            )
    for name in ("two", "sharded", "two-by-two"):
        processes.close(tmp_path / "one", tmp_path / name, 9, 1e-9)
    processes.close(tmp_path / "float32-one", tmp_path / "float32", 9, 1e-5)
    processes.equal(tmp_path / "two", tmp_path / "again", 9)
    for name in ("packed-two", "packed-four"):
        processes.close(tmp_path / "packed-one", tmp_path / name, 2, 1e-9)
    # one process goes on from what two have saved
    start = {"resume_from": tmp_path / "two" / "step-00000006"}
    processes.run(tmp_path / "back", 8, **start)
    for key, whole in processes.weights(tmp_path / "one", 9).items():
        found = processes.weights(tmp_path / "back", 9)[key]
        torch.testing.assert_close(found, whole, atol=processes.FLOAT64, rtol=0, msg=key)
    for said in (*two, *four):
        assert said["padding"].startswith("`attention_mask` must be all ones with context_parallel")
        assert said["short"].startswith("`batch` must hold a token for each of the")
        assert said["different"].startswith("`train_loader` must be the same on every rank")
        assert "`context_parallel` must divide the number of processes" in said["ranks"]
        assert said["model"].startswith("`model` must have a forward with an argument `group`")
        assert said["compile"].startswith("`compile` must be False with context_parallel")


def test_a_group_of_one_has_all_tokens():
    name = "packed with sinks"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = context_ranks.result(name, torch.float64, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    exact = context_ranks.result(name, torch.float64)
    for one, whole in zip(
        (*found[0], *found[1].values()), (*exact[0], *exact[1].values()), strict=True
    ):
        assert float((one - whole).abs().max()) <= BOUNDS[torch.float64] * max(1, whole.abs().max())


class Strided(torch.nn.Module):
    """A buffer of each layout; rank 0 has other values than the others."""

    def __init__(self, rank):
        super().__init__()
        numbers = torch.arange(12.0).view(3, 4) + 100 * rank
        self.weight = torch.nn.Parameter(numbers.clone())
        self.register_buffer("column", numbers.clone()[:, 1])
        self.register_buffer("transposed", numbers.clone() if rank else numbers.t().clone().t())


def of_rank_0(rank):
    world = _distributed.World(True, torch.device("cpu"))
    model = Strided(rank)
    _distributed.shard(model, world, cpu_offload=False)
    return {name: x.clone() for name, x in model.named_buffers()}


def test_every_rank_starts_from_what_rank_0_has_in_any_layout():
    """gloo's broadcast takes no heed of strides."""
    wanted = dict(Strided(0).named_buffers())
    for found in on_ranks(2, of_rank_0):
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
