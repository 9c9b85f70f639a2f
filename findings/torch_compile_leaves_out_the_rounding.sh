#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-30
# expected: x.bfloat16().float() rounds x to bfloat16 in a compiled function as it does without: torch.compile may keep intermediate results in higher precision, but a conversion that the program asks for, and whose result it returns, is one of its numbers
# seen: inductor drops the rounding of float32 to a half type and back. What a sum has lost by the rounding is then exactly 0: a weight kept as bfloat16 plus a compensation forgets every update below half of its last place, as if there were no compensation. A conversion by way of float8 or int32, and of float64 by way of any type, is kept. The option emulate_precision_casts brings it back
# ours: nothing: what our ops round, they round inside of themselves, where the compiler does not look
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/rounding.py" <<'PY'
import torch

torch._dynamo.config.recompile_limit = 64


def through(dtype):
    return lambda x: x.to(dtype).to(x.dtype)


for wide in (torch.float32, torch.float64):
    x = torch.linspace(-3, 3, 101, dtype=wide)
    for narrow in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32):
        eager = (through(narrow)(x) - x).abs().max().item()
        compiled = (torch.compile(through(narrow))(x) - x).abs().max().item()
        print(f"{wide} by way of {narrow}: rounds by {eager:.2g}, compiled by {compiled:.2g}")
        is_dropped = wide == torch.float32 and narrow in (torch.float16, torch.bfloat16)
        assert eager > 0 and compiled == (0 if is_dropped else eager)


def update(weight, lost):
    total = weight.float() + lost + 1e-3
    weight = total.bfloat16()
    return weight, total - weight.float()


def train(step):
    weight, lost = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4)
    for _ in range(1000):
        weight, lost = step(weight, lost)
    return weight[0].item()


eager, compiled = train(update), train(torch.compile(update))
with torch._inductor.config.patch(emulate_precision_casts=True):
    torch._dynamo.reset()
    emulated = train(torch.compile(update))
print(f"1 + 1000 updates of 0.001: {eager}, compiled {compiled}, emulate_precision_casts {emulated}")
assert abs(eager - 2) < 0.01 and compiled == 1 and emulated == eager
PY
"$work/venv/bin/python" "$work/rounding.py"
