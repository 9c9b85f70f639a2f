"""The only way to tl.dot: fp32 sums on every backend, and right under the interpreter.

The half types run on the tensor cores. For fp32 operands PRECISION says how: "ieee" (exact fp32
products; on NVIDIA without tensor cores), "tf32x3" (NVIDIA: three tensor-core passes, about fp32)
or "tf32" (three digits). fp32 tiles of 64 x 64 spill on NVIDIA: stream 32 rows, with 8 warps.
The shape rules of the hardware are the caller's: M, N and K at least 16, and on sm_90 M at least
64 with four warps or more, or the dot falls back to the slow instruction.
"""

import triton
import triton.language as tl

from .math import INTERPRET

# A string by default must be a constexpr itself: Triton 3.6 wraps only numbers.
IEEE = tl.constexpr("ieee")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = IEEE):
    """a @ b in fp32. a [M, K], b [K, N] of one dtype -> [M, N]."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_acc(a, b, acc, PRECISION: tl.constexpr = IEEE):
    """acc + a @ b in fp32. a [M, K], b [K, N] of one dtype, acc [M, N] fp32 -> [M, N]."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
