#!/usr/bin/env bash
# package: torch 2.13.0 (2.15.0 does the same)
# date: 2026-11-30
# expected: inside of one torch.autocast region a layer computes with the weights that it has, rounded to the lower type; a step of an optimizer, load_state_dict or averaged weights that are copied in are seen by the next call, as they are outside of the region
# seen: the region keeps the rounded copy of each weight from its first use until it ends, and never looks whether the weight has changed. A training loop inside of one region learns nothing: the loss of a linear layer is the same number at every step; after load_state_dict the model still answers as before it. A region with enabled=False around the usual `with autocast` of each step does the same, since copies go when the outermost region ends. With cache_enabled=False, or torch.clear_autocast_cache() after each change, all is right
# ours: DSALTTrainer clears these copies after each step and where averaged weights are swapped in (packages/dsalt/tests/test_training.py, test_a_region_of_autocast_around_it_changes_nothing)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/region.py" <<'PY'
from contextlib import nullcontext

import torch
from torch import nn


def region(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


def losses(around, each):
    torch.manual_seed(0)
    layer, x, y = nn.Linear(16, 16), torch.randn(8, 16), torch.randn(8, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    found = []
    with around:
        for _ in range(6):
            with each:
                loss = (layer(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(round(loss.item(), 3))
    return found


usual = losses(nullcontext(), region())
inside = losses(region(), nullcontext())
beneath = losses(region(enabled=False), region())
without = losses(region(cache_enabled=False), nullcontext())
print("a region for each step:   ", usual)
print("one region around all:    ", inside)
print("and one that is off:      ", beneath)
print("without the kept weights: ", without)
assert usual[-1] < 0.8 * usual[0] and abs(without[-1] - usual[-1]) < 0.02
assert len(set(inside)) == 1 and len(set(beneath)) == 1

model, other, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(1, 4)
with region():
    before = model(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), before)
    torch.clear_autocast_cache()
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), before)
PY
"$work/venv/bin/python" "$work/region.py"
