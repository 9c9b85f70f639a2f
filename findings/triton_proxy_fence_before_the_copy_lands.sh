#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-29
# expected: on sm_90 shared memory that cp.async filled is made visible to wgmma by a fence.proxy.async behind the wait for the copy; Triton puts one there in a plain product, and PTX asks for it, because wgmma reads through another proxy
# seen: where a branch stands between the two products of an attention loop, the only fence stands before the second wait: the copy of v may land after it, and wgmma reads v with no fence in between. Without the branch both copies are waited for at once, before the fence
# ours: the sanitizer of the compiled leg tells it (docs/shared-kernels/compiled.md); the leg lists the kernels that have it
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1

cat >"$work/fences.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def attend(q, k, v, o, n, N: tl.constexpr, D: tl.constexpr, BRANCH: tl.constexpr):
    columns, d = tl.arange(0, N), tl.arange(0, D)
    at = columns[:, None] * D + d
    b_q = tl.load(q + at)
    b_o = tl.zeros((N, D), tl.float32)
    for first in range(0, n, N):
        b_s = tl.dot(b_q, tl.trans(tl.load(k + first * D + at)))
        if BRANCH:
            if first + N > n:
                b_s = tl.where(first + columns < n, b_s, 0.0)
        b_o = tl.dot(tl.maximum(b_s, 0.0).to(tl.bfloat16), tl.load(v + first * D + at), b_o)
    tl.store(o + at, b_o)


types = {name: "*bf16" for name in "qkv"} | {"o": "*fp32", "n": "i32"}
types |= {name: "constexpr" for name in ("N", "D", "BRANCH")}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
PLACES = {
    "cp.async.wait_group": "wait",
    "fence.proxy.async": "fence",
    "wgmma.mma_async": "wgmma",
}


def order(branch):
    source = ASTSource(attend, types, {"N": 64, "D": 64, "BRANCH": branch}, aligned)
    options = {"num_warps": 4, "num_stages": 2}
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = [PLACES[x] for x in re.findall("|".join(map(re.escape, PLACES)), text)]
    return " ".join(x for i, x in enumerate(found) if i == 0 or x != found[i - 1])


plain, parted = order(False), order(True)
print("without a branch:", plain)
print("with a branch:   ", parted)
assert "wait wgmma" not in plain
# The product of q and k has its fence behind its wait, that of the weights and v has none.
assert "wait wgmma" in parted and "wait fence wgmma" in parted
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/fences.py"
