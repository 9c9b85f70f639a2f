"""Powers and logarithms to base 2, and casts that mean the same under the interpreter.

FAST is the constexpr that lets NVIDIA's one-instruction logarithm replace the ~28-instruction
exact one (relative error 2e-7 becomes an absolute error of 2e-7 in the logarithm). A launcher
passes ``FAST=math.fast(target)``: true on CUDA alone. The interpreter never takes it.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from shared_kernels import device

# Read once: a kernel is interpreted or compiled from the moment it is decorated.
INTERPRET = tl.constexpr(device.interpreting())
# The smallest normal fp32 number: logarithms start here, so no denormal reaches the hardware.
TINY = tl.constexpr(1.1754943508222875e-38)
TINY_WIDE = tl.constexpr(1e-300)  # for fp64


def fast(target: device.Target) -> bool:
    """Whether the fast logarithm exists on `target` (a `shared_kernels.device.Target`)."""
    return target.backend == "cuda"


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to the nearest value of dtype (the interpreter's own bf16 cast truncates)."""
    if INTERPRET and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN must not carry over into the exponent.
        bits = tl.where(x == x, rounded, bits) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def relu(x):
    """max(x, 0) in which a NaN stays a NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp2(x):
    """2^x in fp32 (fp64 for fp64); 2^-inf = 0."""
    if x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        return tl.exp2(x.to(tl.float32))


@triton.jit
def log2(x, FAST: tl.constexpr = False):
    """log2 x in fp32 (fp64 for fp64), for x > 0 and not denormal; log2 0 = -inf."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    elif FAST and not INTERPRET:
        return libdevice.fast_log2f(x.to(tl.float32))
    else:
        return tl.log2(x.to(tl.float32))


@triton.jit
def power(u, e, FAST: tl.constexpr = False):
    """u^e for u >= 0 and any real e, in fp32 (fp64 for fp64); exactly 0 at u = 0, whatever e is."""
    if u.dtype == tl.float64:
        x = tl.maximum(u, TINY_WIDE, propagate_nan=tl.PropagateNan.ALL)
    else:
        u = u.to(tl.float32)
        x = tl.maximum(u, TINY, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(u <= 0.0, 0.0, tl.exp2(e * log2(x, FAST)))
