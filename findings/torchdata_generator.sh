#!/usr/bin/env bash
# package: torchdata 0.11.0 (torch 2.13.0)
# date: 2026-11-29
# expected: StatefulDataLoader(shuffle=True, generator=g) that is saved in epoch 1 and loaded in a new
#   process gives the rest of epoch 1, and then the epoch 2 that an uninterrupted run would have given
# seen: without workers epoch 1 goes on exactly and epoch 2 has another order: the seed that every
#   epoch draws from the same generator is drawn before the generator's state is put back
# ours: dsalt's trainer saves the generators of such a loader itself and puts them back after it
#   (packages/dsalt/tests/test_extras.py, test_stateful_loaders_go_on)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps torchdata==0.11.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def make(workers):
    generator = torch.Generator().manual_seed(8)
    options = {"batch_size": 5, "shuffle": True, "num_workers": workers, "generator": generator}
    return StatefulDataLoader(list(range(30)), **options)


def ids(batches):
    return [int(i) for batch in batches for i in batch]


for workers, exact in ((0, False), (1, True)):
    loader = make(workers)
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    rest, second = ids(batches), ids(loader)

    resumed = make(workers)
    resumed.load_state_dict(state)
    assert ids(resumed) == rest  # what is left of epoch 1
    found = ids(resumed)
    print(f"num_workers={workers}: epoch 2 as without the interruption: {found == second}")
    assert (found == second) == exact
PYTHON
