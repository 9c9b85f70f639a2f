"""Triton device functions that at least two packages use.

Import the modules and call through them inside a kernel::

    from shared_kernels.triton import dot, threshold, tiles

    b_k = tiles.load_tile(p_k, i_k * BLOCK_K, n_k, stride_kn, BLOCK_K, D, BLOCK_D)
    b_s = dot.dot(b_q, tl.trans(b_k)) * scale

This package needs triton; nothing imports it until a Triton launch is wanted. The rules all of
it follows: arithmetic in fp32, a NaN stays a NaN, and under the interpreter (TRITON_INTERPRET=1)
nothing is done in bf16, because the interpreter keeps bf16 as raw 16-bit integers and its bf16
arithmetic is wrong without saying so.
"""

from . import dot, math, threshold, tiles
from .math import INTERPRET

__all__ = ["INTERPRET", "dot", "math", "threshold", "tiles"]
