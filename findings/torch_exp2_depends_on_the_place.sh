#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-29
# expected: an elementwise function of one number has the same bits wherever that number stands in a tensor on the CPU, as torch.exp, log, log1p and expm1 have
# seen: torch.exp2 and torch.pow of an element change by a unit in the last place with the number of elements that follow it: whole vector registers and the rest of a tensor are computed by different code. A row of a batch then has other bits than the same row alone
# ours: shared_kernels.qexp takes exp of a logarithm instead, so that a row's bits do not depend on the rows beside it (tests-integration/test_rows.py, test_bits_of_a_row_alone_and_among_others)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/place.py" <<'PY'
import torch

torch.manual_seed(0)
x = torch.rand(1000) * 0.9 + 0.1
functions = {
    "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "expm1": torch.expm1,
    "exp2": torch.exp2, "pow": lambda x: x.pow(1.7),
}
for name, f in functions.items():
    whole = f(x)
    alone = torch.cat([f(part.clone()) for part in x.split(3)])
    changed = int((alone != whole).sum())
    print(f"{name}: {changed} of 1000 numbers have other bits in tensors of 3 than in one of 1000")
    assert (changed > 0) == (name in ("exp2", "pow")), name
PY
"$work/venv/bin/python" "$work/place.py"
