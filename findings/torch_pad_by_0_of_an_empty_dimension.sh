#!/usr/bin/env bash
# package: torch 2.7.0
# date: 2026-11-30
# expected: F.pad with a pair of zeros for a dimension leaves that dimension as it is, also where its size is 0
# seen: an error that speaks of a negative size ("The input size 0, plus negative padding 0 and 0 resulted in a negative output size"), as soon as another dimension is padded; without the pair of zeros, or with zeros alone, the same tensor is padded. torch 2.13 pads it
# ours: flashdiffusion's kernels for no points copy into zeros instead (flashdiffusion/_triton/forward.py, test_triton.py, test_empty)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.7.0 numpy

cat >"$work/pad.py" <<'PY'
import torch
import torch.nn.functional as F

empty = torch.zeros(0, 3)
assert F.pad(empty, (0, 1)).shape == (0, 4)
assert F.pad(empty, (0, 0, 0, 0)).shape == (0, 3)
assert F.pad(empty, (0, 1, 0, 2)).shape == (2, 4)
try:
    F.pad(empty, (0, 1, 0, 0))
except RuntimeError as error:
    print(f"torch {torch.__version__}: {error}")
    assert "resulted in a negative output size" in str(error)
else:
    raise AssertionError("it was padded")
PY
"$work/venv/bin/python" "$work/pad.py"
