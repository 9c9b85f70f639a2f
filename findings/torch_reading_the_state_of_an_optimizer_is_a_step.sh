#!/usr/bin/env bash
# package: torch 2.13.0 (2.15.0 does the same)
# date: 2026-11-30
# expected: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which returns the state of an optimizer under the names of the parameters, leaves the optimizer as it is: a training that saves a checkpoint before its first step ends at the same weights as one that saves none
# seen: an optimizer that has not stepped yet takes a step with gradients of zeros and a learning rate of 0, and what the step leaves stays. Adam, AdamW, NAdam, RAdam, Adamax and Adafactor go on as if at step 2, with another correction; SGD with dampening has a momentum of zeros, so that its first gradient is dampened, too; with Adam's weight_decay the first moments hold decay. Their weights differ for the rest of the training. After a first step, and with RMSprop, Adadelta and plain SGD, reading changes nothing
# ours: nothing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/reading.py" <<'PY'
import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def trained(kind, options, read_before=None):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(8, 4).double()
    optimizer = kind(model.parameters(), **options)
    for step in range(4):
        if step == read_before:
            get_optimizer_state_dict(model, optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters())


damped = {"momentum": 0.9, "dampening": 0.5}
changed = [(optim.SGD, damped), (optim.Adam, {"weight_decay": 0.1})]
changed += [(x, {}) for x in (optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adafactor)]
kept = [(optim.SGD, {"momentum": 0.9}), (optim.RMSprop, {}), (optim.Adadelta, {})]
for kind, options in changed + kept:
    options = {"lr": 0.1, **options}
    plain = trained(kind, options)
    off = [float((trained(kind, options, step) - plain).abs().max()) for step in (0, 2)]
    print(f"{kind.__name__:9} {options}: read before step 0, weights off by {off[0]:.2g}")
    assert off[1] == 0
    assert (off[0] > 1e-3) == ((kind, {k: v for k, v in options.items() if k != "lr"}) in changed)
PY
"$work/venv/bin/python" -W ignore "$work/reading.py"
