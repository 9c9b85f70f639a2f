#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-30
# expected: torch.distributed.all_reduce sums a tensor over the ranks in place, whatever its strides, or refuses it as NCCL does ("Tensors must be contiguous"); broadcast gives every rank the values of the source
# seen: with gloo a view is taken for numel() numbers that stand side by side from its first one. all_reduce of a column of a matrix sums one element of the column, leaves the rest as each rank had it, and sums elements of other columns that the caller never named; broadcast of a transposed matrix puts its values at other places. Neither says a word. all_gather of the same view is right
# ours: collectives get contiguous tensors; under FSDP dsalt sent a buffer that is a view as memory (packages/dsalt/tests/test_context.py, test_every_rank_starts_from_what_rank_0_has_in_any_layout)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/view.py" <<'PY'
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.full((4, 4), 10.0)
    x[:, 1] = rank + 1.0
    dist.all_reduce(x[:, 1])
    if rank == 0:
        print("column 1 must be 3 and the others 10, on rank 0:", x.tolist(), sep="\n")
    expected = torch.full((4, 4), 10.0)
    expected[:, 1] = rank + 1.0
    # the four numbers from x[0, 1] on in memory: one of the column, three of other columns
    expected[0, 1] = 3.0
    expected[0, 2:] = 20.0
    expected[1, 0] = 20.0
    assert torch.equal(x, expected)

    source = torch.arange(6.0).view(3, 2)
    x = source.clone() if rank == 0 else torch.zeros(2, 3).t()
    dist.broadcast(x, 0)
    if rank == 1:
        print("broadcast into a transposed matrix:", x.tolist())
    assert torch.equal(x, source) == (rank == 0)
    assert torch.equal(x.sort().values.sum(), source.sum())

    parts = [torch.zeros(3) for _ in range(2)]
    dist.all_gather(parts, (torch.arange(6.0) + 100 * rank)[::2])
    assert [part.tolist() for part in parts] == [[0, 2, 4], [100, 102, 104]]
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    mp.spawn(run, (sys.argv[1],), nprocs=2)
PY
"$work/venv/bin/python" "$work/view.py" "$work/meet"
