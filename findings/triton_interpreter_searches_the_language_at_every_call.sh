#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-29
# expected: TRITON_INTERPRET=1 replaces the functions of triton.language once for a launch; a device function (tl.sum is one) costs what its operations cost
# seen: every call of a device function searches all of triton.language again for functions to replace, and finds none: four scans of about 200 names, about a millisecond, so that 1000 calls of a function that adds 1 take a multiple of the time of 1000 additions
# ours: shared_kernels.testing.interpreter remembers what a launch has replaced; the interpreted tests of adasplash take less than half the time (test_triton.py, test_the_language_is_replaced_once_per_launch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1 torch==2.13.0 numpy

cat >"$work/calls.py" <<'PY'
import inspect
import time

import torch
import triton
import triton.language as tl


@triton.jit
def plus_one(x):
    return x + 1.0


@triton.jit
def called(x_ptr, n):
    x = tl.load(x_ptr)
    for _ in range(n):
        x = plus_one(x)
    tl.store(x_ptr, x)


@triton.jit
def written_out(x_ptr, n):
    x = tl.load(x_ptr)
    for _ in range(n):
        x = x + 1.0
    tl.store(x_ptr, x)


searches = 0
getmembers = inspect.getmembers


def counting(*args, **kwargs):
    global searches
    searches += 1
    return getmembers(*args, **kwargs)


def run(kernel, n):
    global searches
    x = torch.zeros(1)
    kernel[(1,)](x, 1)
    inspect.getmembers, searches = counting, 0
    kernel[(1,)](x, n)
    found, inspect.getmembers = searches, getmembers
    start = time.process_time()
    kernel[(1,)](x, n)
    return found, time.process_time() - start


many, long = run(called, 1000)
few, short = run(written_out, 1000)
print(f"1000 additions written out: {few} searches; in a device function: {many} searches")
print(f"times: {long / short:.1f} to 1")
assert few < 10 and many > 3000 and long > 2 * short
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/calls.py"
