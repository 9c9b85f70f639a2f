#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-30
# expected: all_reduce with ReduceOp.MAX or MIN treats NaN as torch.maximum does: a NaN on any rank is a NaN on every rank, so that the largest loss or gradient norm of all ranks shows that one of them is lost
# seen: with gloo the answer depends on which rank has the NaN: on rank 0 it reaches every rank, on rank 1 every rank gets the other number, and rank 1 loses its own NaN, too. SUM and PRODUCT carry it from everywhere
# ours: diffmax_linear_loss of a vocabulary over several ranks asks which maxima are NaN beside them; a NaN on one rank had given finite losses (packages/diffmax/tests/test_sharded_loss.py, test_a_logit_of_any_rank_that_is_no_number_is_seen_on_every_rank)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/nan.py" <<'PY'
import math
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for lost in (0, 1):
        for name in ("MAX", "MIN", "SUM", "PRODUCT"):
            x = torch.tensor([math.nan if rank == lost else 2.0])
            dist.all_reduce(x, op=getattr(dist.ReduceOp, name))
            if rank == lost:
                print(f"NaN on rank {lost}, 2 on the other: {name} is {x.item()}", flush=True)
            assert x.isnan().item() == (lost == 0 or name in ("SUM", "PRODUCT"))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert torch.maximum(torch.tensor(2.0), torch.tensor(math.nan)).isnan()
    mp.spawn(run, (sys.argv[1],), nprocs=2)
PY
"$work/venv/bin/python" "$work/nan.py" "$work/meet"
