#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-29
# expected: torch.inference_mode(False) leaves inference mode and changes nothing else, so that inside torch.no_grad() still no gradient is recorded
# seen: it also turns gradients on: a result made inside torch.no_grad(), torch.inference_mode(False) requires a gradient and keeps its graph alive
# ours: difflayers enters no_grad after inference_mode(False) to build what it keeps (difflayers/_kept.py, tests/test_in_training.py)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

weight = torch.ones(3, requires_grad=True)
with torch.no_grad():
    assert not torch.is_grad_enabled()
    with torch.inference_mode(False):
        inside = torch.is_grad_enabled()
        kept = weight * 2
    assert not torch.is_grad_enabled()
with torch.inference_mode(False), torch.no_grad():
    other_order = weight * 2
print(f"no_grad, then inference_mode(False): gradients {inside}, result requires {kept.requires_grad}")
print(f"inference_mode(False), then no_grad: result requires {other_order.requires_grad}")
assert inside and kept.requires_grad and not other_order.requires_grad
PYTHON
