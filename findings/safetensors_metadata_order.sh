#!/usr/bin/env bash
# package: safetensors 0.8.0
# date: 2026-11-29
# expected: the same tensors and the same metadata give the same file
# seen: with two or more metadata entries their order in the header differs from call to call
# ours: dsalt's model.safetensors has one entry, so that equal runs write equal bytes
#   (packages/dsalt/tests/test_tokens.py)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet safetensors==0.8.0 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PY'
import numpy
from safetensors.numpy import save

tensors = {"a": numpy.zeros(2, numpy.float32)}
several = {"format": "pt", "run": "1", "step": "2", "seed": "3"}
files = {name: {save(tensors, meta) for _ in range(50)} for name, meta in
         (("one entry", {"format": "pt"}), ("four entries", several))}
for name, found in files.items():
    print(f"{name}: {len(found)} different files of 50")
assert len(files["one entry"]) == 1
assert len(files["four entries"]) > 1
PY
