"""The interpreter without what it repeats or throws away (shared_kernels.testing.interpreter)."""

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("holds Triton's interpreter", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from shared_kernels.testing.interpreter import READ  # noqa: E402


@triton.jit
def _square_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o_n)
    tl.store(y_ptr + o_n, b_x * b_x)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.int8, 7), (torch.int16, 15), (torch.int32, 31)])
def test_an_integer_that_overflows_stops_an_interpreted_kernel(dtype, bits):
    largest = math.isqrt(2**bits - 1)
    x = torch.full((4,), largest, dtype=dtype)
    y = torch.empty_like(x)
    _square_kernel[(1,)](x, y, BLOCK=4)
    assert y.tolist() == [largest**2] * 4
    if not triton.__version__.startswith(READ):
        pytest.skip(f"left as it is with Triton {triton.__version__}")
    x[2] += 1
    with pytest.raises(InterpreterError, match=f"mul of int{bits + 1} does not fit"):
        _square_kernel[(1,)](x, y, BLOCK=4)


IN_TWO_WAYS = """
import sys
import torch, triton
import triton.language as tl
from shared_kernels.testing.interpreter import hasten_interpreter

if sys.argv[1] == "hastened":
    hasten_interpreter()

@triton.jit
def kernel(x_ptr, w_ptr, y_ptr, kind_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o[:, None] * BLOCK + o[None, :], mask=o[:, None] < 13, other=1.5)
    b_w = tl.load(w_ptr + o)
    b_p = tl.dot(b_x.to(tl.float32), tl.trans(b_x).to(tl.float32), input_precision="ieee") * b_w
    b_y = tl.sum(tl.where(b_p > 0, b_p, -o[:, None]), 1) / 3 + tl.max(b_x, 0).to(tl.int32)
    tl.store(y_ptr + o, b_y)
    tl.store(kind_ptr + o, (o * 2 - 7) % 5 // 2)

torch.manual_seed(0)
y, kind = torch.empty(16), torch.empty(16, dtype=torch.int8)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    kernel[(1,)](torch.randn(16, 16).to(dtype), torch.randn(16), y, kind, BLOCK=16)
    print(y.view(torch.int32).tolist(), kind.tolist())
"""


def test_the_hastened_interpreter_gives_the_same_bits(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(IN_TWO_WAYS)
    said = [
        subprocess.run([sys.executable, program, how], capture_output=True, text=True, check=True)
        for how in ("hastened", "as it is")
    ]
    assert len(said[0].stdout.splitlines()) == 4
    assert said[0].stdout == said[1].stdout


@pytest.mark.parametrize("shape", [[1], [4, 8], [2, 1, 16]])
@pytest.mark.parametrize("element", ["int1", "float32", "pointer"])
def test_the_types_of_blocks_are_what_triton_says(shape, element):
    kind = tl.pointer_type(tl.float32) if element == "pointer" else getattr(tl, element)
    block = tl.block_type(kind, [tl.constexpr(size) for size in shape])
    assert list(block.shape) == shape and block.numel == math.prod(shape) and block.scalar == kind
    assert block == tl.block_type(kind, shape) and block.with_element_ty(kind) == block
    assert block != tl.block_type(kind, [32, *shape[1:]]) and block != kind
    assert block != block.with_element_ty(tl.int8) and str(block).endswith(f", {kind}>")
    value = tl.tensor(None, block)
    assert [size.value for size in value.shape] == shape and value.numel.value == block.numel
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(kind, [3])
