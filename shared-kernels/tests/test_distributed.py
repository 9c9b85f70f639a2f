"""Processes: collectives and their bytes, errors on every rank, the name of a rank that dies."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shared_kernels import distributed

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="needs torch.distributed, gloo",
    ),
    pytest.mark.system,
]
SIZE, VICTIM = 3, 1


def start(rank, folder, store, seconds=60):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=seconds),
    )
    return distributed.resolve("world")


def refused(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""


def collectives(rank, folder):
    ranks = start(rank, folder, "store")
    found = {"total": ranks.total(torch.full((4,), 2.0**rank))}
    found["long"] = ranks.total(torch.full((2**15,), 2.0**rank))[0]
    found["first"] = ranks.first(torch.tensor([rank + 7]))
    found["gather"] = ranks.gather(torch.tensor([rank, -rank]))
    ranks.sent = 0
    mine = [torch.full((rank, 2), float(rank)), torch.arange(rank + 1, dtype=torch.int32)]
    half = torch.full((2 * rank,), rank, dtype=torch.bfloat16)
    flags = torch.ones(rank + 1, dtype=torch.bool)
    found["swap"] = ranks.swap([flags, *mine, half], (rank + 1) % SIZE, (rank - 1) % SIZE)
    found["sent"] = ranks.sent
    ranks.sent = 0
    # of ranks 0, 1, 2: no row, 3 and 6; what follows bytes of odd number is aligned
    lengths = [0, 3, 6]
    n = lengths[rank]
    tensors = [torch.full((n, 3), rank, dtype=torch.int8), torch.full((n,), rank + 0.5)]
    tensors.append(torch.full((n, 2), float(rank), dtype=torch.float64))
    found["ring"] = [(r, [t.clone() for t in ts]) for r, ts in ranks.ring(tensors, lengths)]
    found["ring sent"] = ranks.sent
    # what has been started arrives while its sender computes, and other messages pass it
    dist.barrier()
    wait = ranks.start_swap([torch.arange(rank + 1)], (rank + 1) % SIZE, (rank - 1) % SIZE)
    if rank == VICTIM:
        time.sleep(1.0)
        found["waits at"] = time.monotonic()
    if rank == 2:
        found["under way"] = wait()
        found["arrived at"] = time.monotonic()
    passed = ranks.swap([torch.full((2,), rank)], (rank - 1) % SIZE, (rank + 1) % SIZE)
    found["passed"] = passed[0]
    if rank != 2:
        found["under way"] = wait()
    found["group"] = [
        distributed.resolve(dist.group.WORLD).size,
        distributed.resolve(None),
        refused(lambda: distributed.resolve("everyone")),
        refused(lambda: distributed.resolve(3)),
    ]
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("dp", "cp"))
    found["mesh"] = [distributed.resolve(mesh["cp"]).rank, distributed.resolve(mesh["dp"]).size]
    found["group"].append(refused(lambda: distributed.resolve(mesh)))
    other = dist.new_group([0])
    found["outside"] = refused(lambda: distributed.resolve(other))

    def refuse():
        with distributed.agreement(ranks):
            if rank == VICTIM:
                raise ValueError("`X` must be finite")

    def differ():
        with distributed.agreement(ranks) as agreed:
            agreed.equal["alpha"] = distributed.fingerprint(rank == VICTIM)

    found["refusals"] = [refused(refuse), refused(differ)]
    with distributed.agreement(ranks) as agreed:
        agreed.from_first["seed"], agreed.from_all = rank + 5, rank
    found["agreed"] = (agreed.from_first["seed"], agreed.from_all)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def losses(rank, folder):
    """Rank 1 stops answering (a timeout ends the wait), then it is killed."""
    if rank == VICTIM:
        ranks = start(rank, folder, "hang", seconds=4)
        time.sleep(12)
    else:
        ranks = start(rank, folder, "hang", seconds=4)
        before = time.monotonic()
        text = refused(lambda: ranks.total(torch.ones(3)))
        torch.save((text, time.monotonic() - before), f"{folder}/hang-{rank}.pt")
    dist.destroy_process_group()
    ranks = start(rank, folder, "kill")
    ranks.total(torch.ones(3))
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    texts = [refused(lambda: ranks.total(torch.ones(3)))]
    if rank == 2:
        texts.append(refused(lambda: ranks.swap([torch.ones(3)], VICTIM, 0)))
    torch.save(texts, f"{folder}/kill-{rank}.pt")


def in_processes(work, folder):
    # forked where that exists: seconds of imports saved
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in processes]


def test_collectives_count_their_bytes_and_errors_reach_every_rank(tmp_path):
    assert in_processes(collectives, tmp_path) == [0] * SIZE
    sender, receiver = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (VICTIM, 2))
    assert receiver["arrived at"] < sender["waits at"]
    for rank in range(SIZE):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["total"].tolist() == [7.0] * 4 and found["long"] == 7.0
        assert found["first"].tolist() == [7]
        assert found["gather"].tolist() == [[0, 0], [1, -1], [2, -2]]
        left = (rank - 1) % SIZE
        flags, pairs, counted, half = found["swap"]
        assert flags.tolist() == [True] * (left + 1) and flags.dtype == torch.bool
        assert pairs.shape == (left, 2) and (pairs == left).all()
        assert counted.tolist() == list(range(left + 1)) and counted.dtype == torch.int32
        assert half.tolist() == [left] * (2 * left) and half.dtype == torch.bfloat16
        own = rank + 1 + 8 * rank + 4 * (rank + 1) + 4 * rank
        assert found["sent"] == 4 * 8 + own  # four lengths, then the bytes
        order = [(rank - step) % SIZE for step in range(SIZE)]
        assert [r for r, _ in found["ring"]] == order
        for r, (small, single, double) in found["ring"]:
            n = 3 * r
            assert small.tolist() == [[r] * 3] * n and small.dtype == torch.int8
            assert single.tolist() == [r + 0.5] * n and single.dtype == torch.float32
            assert double.tolist() == [[float(r)] * 2] * n and double.dtype == torch.float64
        # each part filled up to 16 bytes; a rank sends all but what the next one has
        bytes_of = [0, 16 + 16 + 48, 32 + 32 + 96]
        assert found["ring sent"] == sum(bytes_of) - bytes_of[(rank + 1) % SIZE]
        assert found["under way"][0].tolist() == list(range(left + 1))
        assert found["passed"].tolist() == [(rank + 1) % SIZE] * 2
        size, none, name, kind, mesh = found["group"]
        assert size == SIZE and none is None and found["mesh"] == [rank, 1]
        assert name.startswith("`group` must be one of") or "'world'" in name
        assert "`group` must be None, 'world' or a ProcessGroup, got int" in kind
        assert "`group` must be one dimension of a mesh" in mesh and 'mesh["cp"]' in mesh
        assert ("outside" in found["outside"]) == (rank > 0)
        refusal, difference = found["refusals"]
        if rank == VICTIM:
            assert refusal == "`X` must be finite"
        else:
            assert refusal == "rank 1 has refused its input: ValueError: `X` must be finite"
        assert "`alpha` must be the same on every rank" in difference and "[1]" in difference
        assert found["agreed"] == (5, [0, 1, 2])


@pytest.mark.thorough  # it waits for the time limit of a collective
def test_a_rank_that_hangs_or_dies_is_named(tmp_path):
    codes = in_processes(losses, tmp_path)
    assert codes[VICTIM] == -signal.SIGKILL
    for rank in (0, 2):
        text, waited = torch.load(tmp_path / f"hang-{rank}.pt")
        assert text.startswith(f"rank {rank} of 3: another rank has died or left"), text
        assert "(rank 1)" in text and waited < 12
        for text in torch.load(tmp_path / f"kill-{rank}.pt"):
            assert "(rank 1)" in text, text


def test_fingerprints_are_those_of_values():
    same = distributed.fingerprint
    assert same({"a": 1, "b": [2]}) == same({"b": (2.0,), "a": True + 0})
    assert same(1) != same(2) and same("a") != same("b")


def test_a_group_of_one_and_no_group():
    with pytest.raises(ValueError, match="`group` must be None without torch.distributed"):
        distributed.resolve("world")
    with distributed.agreement(None) as agreed:
        agreed.from_all = 3
    assert agreed.from_all == [3]
