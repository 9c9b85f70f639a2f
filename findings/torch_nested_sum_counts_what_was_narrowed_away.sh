#!/usr/bin/env bash
# package: torch 2.13.0 (2.15.0 does the same)
# date: 2026-11-30
# expected: torch.nested.narrow takes a part of each row of a padded tensor; sum(), mean() and max() of the result are those of its parts, as its sum over the last dimension and its unbind() are
# seen: sum(), mean() and max() without a dimension are those of the whole padded tensor: padding that was narrowed away is counted, silently, and a NaN in it is the result. numel(), unbind() and sum(-1) leave it out; sum(1) and to_padded_tensor() are refused. A nested tensor that was made of the same parts, and contiguous(), are right
# ours: nested tensors are refused (packages/adasplash/tests/test_drop_ins.py, test_bad_calls_of_the_module_are_named)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/narrow.py" <<'PY'
import torch

padding = 1000.0
lengths = torch.tensor([3, 1, 4])
x = torch.arange(1.0, 25.0).view(3, 4, 2)
x[torch.arange(4) >= lengths[:, None]] = padding
part = torch.nested.narrow(x, 1, torch.zeros(3, dtype=torch.int64), lengths, layout=torch.jagged)
exact = torch.cat(part.unbind())
assert part.numel() == exact.numel() == 16 and float(exact.max()) < padding
assert torch.equal(part.sum(-1).contiguous().values(), exact.sum(-1))
for name in ("sum", "mean", "max"):
    found, right = (float(getattr(t, name)()) for t in (part, exact))
    print(f"{name}(): {found:.0f}, of its parts {right:.0f}, of all that was given")
    assert found == float(getattr(x, name)()) != right
    assert float(getattr(part.contiguous(), name)()) == right
x[1, 3, 0] = torch.nan
assert part.sum().isnan() and torch.cat(part.unbind()).isfinite().all()
try:
    part.sum(1)
except RuntimeError as error:
    print(f"sum(1): {str(error)[:70]}")
else:
    raise AssertionError("sum(1) is not refused")
PY
"$work/venv/bin/python" -W ignore "$work/narrow.py"
