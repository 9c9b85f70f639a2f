#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-30
# expected: torch.as_tensor(x) of a tensor x is x, on the device of x: its page says that without a `device` the device of the data is used, and that no copy is made where dtype and device are those that are asked for
# seen: under torch.set_default_device or `with torch.device(...)` it goes to the default device: with "meta", as under the loading of a large model, the numbers of a tensor on the CPU are gone without a word; torch.asarray and torch.tensor of a tensor do the same. from_numpy, new_tensor, nn.Parameter and as_nested_tensor of the same data stay where it is
# ours: tensors are taken as they are, and what is made beside them has their device (tests-integration/test_every_callable.py, test_torchs_defaults_change_no_result)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/moved.py" <<'PY'
import warnings

import numpy as np
import torch

warnings.simplefilter("ignore")
x, y = torch.ones(2), np.ones(2)
makers = {
    "as_tensor(tensor)": lambda: torch.as_tensor(x),
    "asarray(tensor)": lambda: torch.asarray(x),
    "tensor(tensor)": lambda: torch.tensor(x),
    "as_tensor(tensor, device=its own)": lambda: torch.as_tensor(x, device=x.device),
    "from_numpy": lambda: torch.from_numpy(y),
    "new_tensor": lambda: x.new_tensor([1.0]),
    "nn.Parameter": lambda: torch.nn.Parameter(x),
    "as_nested_tensor": lambda: torch.nested.as_nested_tensor([x]),
}
assert torch.as_tensor(x) is x
with torch.device("meta"):
    found = {name: make().device.type for name, make in makers.items()}
for name, place in found.items():
    print(f"{name:36s} {place}")
assert [name for name, place in found.items() if place == "meta"] == [
    "as_tensor(tensor)",
    "asarray(tensor)",
    "tensor(tensor)",
]
PY
"$work/venv/bin/python" "$work/moved.py"
