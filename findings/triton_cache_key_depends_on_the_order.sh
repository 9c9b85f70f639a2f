#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-29
# expected: a kernel's key in Triton's cache follows from its source and from that of what it calls; and Triton, which refuses a kernel whose global constants changed since it was compiled, knows all of them
# seen: the constants of a called function are in the key, and in the list that is checked for changes, only where that function was hashed before its caller. So the key depends on which kernel of the process came first; and for a kernel that came first the list is empty: a constant of the function it calls can change unnoticed, though its machine code holds the old value
# ours: shared_kernels.offline.keys names kernels by a key of its own, the same in every order of launches (test_offline.py, test_a_key_knows_neither_order_nor_lines)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1

cat >"$work/kernels.py" <<'PY'
import triton
import triton.language as tl

FACTOR = tl.constexpr(3.0)


@triton.jit
def scaled(x):
    return x * FACTOR


@triton.jit
def first_kernel(x_ptr):
    tl.store(x_ptr, scaled(tl.load(x_ptr)))


@triton.jit
def second_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, scaled(tl.load(x_ptr)))
PY
cat >"$work/hash.py" <<'PY'
import sys

import kernels

for name in sys.argv[1:]:
    getattr(kernels, name).cache_key
kernel = kernels.first_kernel
print(kernel.cache_key)
print(sorted(name for name, _ in kernel.used_global_vals) or "none")
PY
cd "$work"
export TRITON_CACHE_DIR="$work/cache"
mapfile -t alone < <(venv/bin/python hash.py first_kernel)
mapfile -t again < <(venv/bin/python hash.py first_kernel second_kernel)
mapfile -t behind < <(venv/bin/python hash.py second_kernel first_kernel)
echo "first_kernel hashed alone:         ${alone[0]}, checked for changes: ${alone[1]}"
echo "first_kernel before second_kernel: ${again[0]}, checked for changes: ${again[1]}"
echo "first_kernel after second_kernel:  ${behind[0]}, checked for changes: ${behind[1]}"
[[ ${alone[0]} == "${again[0]}" && ${alone[1]} == none ]]
[[ ${alone[0]} != "${behind[0]}" && ${behind[1]} == "['FACTOR']" ]]
