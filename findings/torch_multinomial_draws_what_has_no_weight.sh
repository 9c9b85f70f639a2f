#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-30
# expected: torch.multinomial(p, 1) never draws an index whose weight is exactly 0, in any dtype that it takes: with sparse weights, or behind top-k, a token that was ruled out does not appear
# seen: on the CPU in float16 it does. One draw divides each weight by an exponential random number and takes the largest quotient; in float16 that number is 0 about twice in 10^8 times, and 0/0 is a NaN, which counts as the largest. Each draw has as many chances as there are zeros: with 128 000 tokens of which 5 have a weight, about one draw in 350 is a token of weight 0. bfloat16, float32, and float16 with replacement draw none
# ours: dsalt draws in float32 whatever a normalizer returns (packages/dsalt/tests/test_generate.py, test_draws_are_made_in_fp32); docs/diffmax/how-to.md says it of weights that users draw from
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/draw.py" <<'PY'
import torch

VOCABULARY, KEPT, ROWS, TIMES = 128_000, 5, 500, 20
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    torch.manual_seed(0)
    weights = torch.zeros(VOCABULARY, dtype=dtype)
    weights[:KEPT] = 0.2
    rows = weights.expand(ROWS, VOCABULARY).contiguous()
    wrong = sum(int((torch.multinomial(rows, 1) >= KEPT).sum()) for _ in range(TIMES))
    again = int((torch.multinomial(weights, 100_000, replacement=True) >= KEPT).sum())
    print(f"{dtype}: {wrong} of {ROWS * TIMES} draws have weight 0; with replacement {again} of 100000")
    assert (wrong > 5) == (dtype == torch.float16) and (wrong == 0 or wrong > 5) and again == 0
PY
"$work/venv/bin/python" "$work/draw.py"
