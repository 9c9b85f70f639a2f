#!/usr/bin/env bash
# package: torch 2.13.0
# date: 2026-11-29
# expected: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s) is the same call with the triangle as attn_mask, for every s: with s = 0 the mean of the values so far, with s < 0 a preference for unlike keys
# seen: on the CPU, four-dimensional inputs (the fused kernel) give NaN in every row but the last ones for s = 0 and s < 0, silently: the future is set to -inf before the scores are scaled, and 0 * -inf is NaN. The same call with the mask, with three dimensions, or under sdpa_kernel(SDPBackend.MATH) is right
# ours: adasplash.scaled_dot_product_attention scales first; its grid at alpha = 1 compares such calls with the masked one (packages/adasplash/tests/test_torch_grids.py)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy

cat >"$work/scale.py" <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 20, 8)
past = torch.ones(20, 20, dtype=torch.bool).tril()
for scale in (0.5, 0.0, -0.5):
    exact = attention(q, k, v, past, scale=scale)
    assert exact.isfinite().all()
    fused = attention(q, k, v, is_causal=True, scale=scale)
    print(f"scale {scale}: {fused.isnan().any(-1).double().mean():.0%} of the rows are NaN")
    assert bool(fused.isnan().any()) == (scale <= 0)
    torch.testing.assert_close(attention(q[0], k[0], v[0], is_causal=True, scale=scale), exact[0])
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(attention(q, k, v, is_causal=True, scale=scale), exact)
PY
"$work/venv/bin/python" "$work/scale.py"
