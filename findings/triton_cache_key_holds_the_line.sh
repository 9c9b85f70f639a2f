#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-29
# expected: a kernel whose source is unchanged is found in Triton's cache; a comment elsewhere in the file changes nothing
# seen: the key holds the number of the line where the kernel begins, and that of every function that it calls. One comment line above them, and every kernel of the file is compiled again, to the same machine code
# ours: shared_kernels.offline.keys names kernels by a key of its own, without lines (test_offline.py, test_a_key_knows_neither_order_nor_lines)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1

cat >"$work/kernels.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1.0)
PY
mkdir "$work/commented"
{ echo '# One comment line.'; cat "$work/kernels.py"; } >"$work/commented/kernels.py"

cat >"$work/compile.py" <<'PY'
import sys

sys.path.insert(0, sys.argv[1])
import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(kernels.add_one, {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 128})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
code = [line for line in kernel.asm["ptx"].splitlines() if line.startswith("\t") and ".loc" not in line]
body = code[: next(i for i, line in enumerate(code) if "ret;" in line)]
print(kernel.hash)
print(hash(tuple(body)))
PY
export PYTHONHASHSEED=0 TRITON_CACHE_DIR="$work/cache"
mapfile -t plain < <("$work/venv/bin/python" "$work/compile.py" "$work")
mapfile -t again < <("$work/venv/bin/python" "$work/compile.py" "$work")
mapfile -t commented < <("$work/venv/bin/python" "$work/compile.py" "$work/commented")
echo "key:                     ${plain[0]}"
echo "key of a second run:     ${again[0]}"
echo "key under one comment:   ${commented[0]}"
echo "instructions are equal:  $([[ ${plain[1]} == "${commented[1]}" ]] && echo yes || echo no)"
[[ ${plain[0]} == "${again[0]}" ]]
[[ ${plain[0]} != "${commented[0]}" ]]
[[ ${plain[1]} == "${commented[1]}" ]]
