#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-30
# expected: the interpreter's option sanitize_overflow is on, so an int32 sum, difference or product that overflows stops a kernel under TRITON_INTERPRET=1, or else nothing is spent on finding it
# seen: every int32 operation is done again in interpreted int64 operations and compared with the range of int32; the overflow is found, and the answer is thrown away, because device_assert looks at another option, debug, which is off and which no knob turns on. The kernel goes on with wrapped numbers, silently, and integer arithmetic costs a multiple of what it costs in int64, where nothing is looked for
# ours: shared_kernels.testing.interpreter.check_overflow finds it with NumPy and stops the kernel; attention kernels run in less than two thirds of the time (shared-kernels/tests/test_triton_interpreter.py, docs/shared-kernels/compiled.md)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1 torch==2.13.0 numpy

cat >"$work/overflow.py" <<'PY'
import time

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def square(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, x * x)


@triton.jit
def add_often(x_ptr, n):
    x = tl.load(x_ptr)
    for _ in range(n):
        x = x + x
    tl.store(x_ptr, x)


semantic = interpreter.interpreter_semantic
assert semantic.builder.options.sanitize_overflow and not semantic.builder.options.debug

asserted = []
device_assert = semantic.device_assert


def noting(cond, msg, mask):
    asserted.append((bool(cond.handle.data), msg))
    return device_assert(cond, msg, mask)


semantic.device_assert = noting
x = torch.tensor([2**20], dtype=torch.int32)
square[(1,)](x)
del semantic.device_assert
print(f"2^20 squared in int32: {x.item()}; found on the way: {asserted}")
assert x.item() == 0 and asserted == [(False, "int32 overflow detected for operation mul")]


def cost(dtype):
    zero = torch.zeros(1, dtype=dtype)
    add_often[(1,)](zero, 10)
    start = time.process_time()
    add_often[(1,)](zero, 2000)
    return time.process_time() - start


narrow, wide = (min(cost(dtype) for _ in range(5)) for dtype in (torch.int32, torch.int64))
print(f"2000 additions: int32 {narrow * 1e3:.0f} ms, int64 {wide * 1e3:.0f} ms")
assert narrow > 3 * wide
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/overflow.py"
