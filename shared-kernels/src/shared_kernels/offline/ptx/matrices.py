"""What tensor cores compute, and how their matrices lie in registers and shared memory.

Fragments (ISA, "Matrix Fragments"): a lane is 4 * g + t. In a 16 x K tile of A register r holds
row g + 8 (r & 1); in a tile of half types its two elements are the columns 2 t and 2 t + 1, plus
8 (r >> 1). In B register r holds column g and rows 2 t, 2 t + 1, plus 8 r. In C and D register r
holds row g + 8 (r >> 1), column 2 t + (r & 1). Products are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import FaultError
from .semantics import from_bf16

Array = np.ndarray


def _cut_tf32(x: Array) -> Array:
    """Tensor cores read the upper 19 bits of a float32."""
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


# kind -> (bytes of an element, columns of A in one instruction, raw integers to float32)
KINDS: dict[str, tuple[int, int, Callable[[Array], Array]]] = {
    "bf16": (2, 16, from_bf16),
    "f16": (2, 16, lambda x: x.view(np.float16).astype(np.float32)),
    "tf32": (4, 8, _cut_tf32),
}


def _elements(registers: Array, size: int) -> Array:
    """(..., lanes) 32-bit registers as (..., 8, 4, elements of a register)."""
    return (
        np.ascontiguousarray(registers)
        .view(f"u{size}")
        .reshape(*registers.shape[:-1], 8, 4, 4 // size)
    )


def a_tiles(registers: Array, kind: str) -> Array:
    """(n, 4, warps, 32) registers -> (n, warps, 16, K) float32."""
    size, deep, widen = KINDS[kind]
    x = _elements(registers, size)  # n, 4, warps, g, t, e
    n, _, warps = x.shape[:3]
    x = x.reshape(n, 2, 2, warps, 8, 4, 4 // size).transpose(0, 3, 2, 4, 1, 5, 6)
    return widen(np.ascontiguousarray(x)).reshape(n, warps, 16, deep)


def b_tiles(registers: Array, kind: str) -> Array:
    """(n, 2, warps, 32) registers -> (n, warps, K, 8) float32."""
    size, deep, widen = KINDS[kind]
    x = _elements(registers, size)  # n, 2, warps, g, t, e
    n, _, warps = x.shape[:3]
    x = x.transpose(0, 2, 1, 4, 5, 3)
    return widen(np.ascontiguousarray(x)).reshape(n, warps, deep, 8)


def c_registers(product: Array) -> Array:
    """(n, warps, 16, 8) float32 -> (n, 4, warps, 32): what each lane's registers hold."""
    n, warps = product.shape[:2]
    x = product.reshape(n, warps, 2, 8, 4, 2).transpose(0, 2, 5, 1, 3, 4)
    return x.reshape(n, 4, warps, 32)


def ldmatrix(rows: Array, is_transposed: bool) -> Array:
    """(warps, matrices, 8, 8) halves -> (matrices, warps, 32) words of two."""
    if is_transposed:
        rows = rows.swapaxes(2, 3)
    warps, matrices = rows.shape[:2]
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(warps, matrices, 32)
    return words.swapaxes(0, 1)


def stmatrix(words: Array, is_transposed: bool) -> Array:
    """(matrices, warps, 32) words -> (warps, matrices, 8, 8) halves: what ldmatrix reads."""
    matrices, warps = words.shape[:2]
    halves = np.ascontiguousarray(words.swapaxes(0, 1)).view(np.uint16)
    halves = halves.reshape(warps, matrices, 8, 8)
    return halves.swapaxes(2, 3) if is_transposed else halves


# Bytes of a swizzled row, and the bits of the address that are mixed, by the descriptor's mode.
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def operand_bytes(descriptor: Array, rows: int, deep: int, is_transposed: bool, size: int) -> Array:
    """The shared addresses of a wgmma operand: (...,) descriptors -> (..., rows, deep).

    A descriptor has, in units of 16 bytes, the start (bits 0-13), the leading (16-29) and the
    stride (32-45) byte offset, and the swizzle mode (62-63). With K contiguous, eight rows of a
    swizzled span make an atom; the stride leads to the next eight rows, the leading offset to the
    next span along K. Transposed, a span lies along M or N and eight steps of K make an atom.
    """
    fields = [
        ((descriptor >> np.uint64(b)) & np.uint64(0x3FFF)).astype(np.int64) * 16
        for b in (0, 16, 32)
    ]
    start, leading, stride = (x[..., None, None] for x in fields)
    modes = np.unique(descriptor >> np.uint64(62))
    if len(modes) != 1:
        raise FaultError("wgmma: the threads' descriptors have several swizzle modes")
    if ((descriptor >> np.uint64(49)) & np.uint64(7)).any():
        raise FaultError("wgmma: a descriptor with a base offset is not modelled")
    span, mixed = _SWIZZLES[int(modes[0])]
    row, k = np.arange(rows)[:, None], np.arange(deep)[None]
    per = span // size
    if is_transposed:
        within = (row % per) * size + (k % 8) * span
        address = start + within + (row // per) * leading + (k // 8) * stride
    else:
        within = (row % 8) * span + (k % per) * size
        address = start + within + (row // 8) * stride + (k // per) * leading
    return address ^ (((address >> 7) & mixed) << 4)


def wgmma_a(registers: Array, kind: str) -> Array:
    """(4, groups, 4 warps, 32) registers -> (groups, 64, K) float32."""
    groups = registers.shape[1]
    tiles = a_tiles(registers.reshape(1, 4, groups * 4, 32), kind)[0]
    return tiles.reshape(groups, 64, -1)


def wgmma_registers(product: Array) -> Array:
    """(groups, 64, N) float32 -> (N / 2, groups, 128): what each lane's registers hold."""
    groups, _, n = product.shape
    x = product.reshape(groups, 4, 2, 8, n // 8, 4, 2)  # group, warp, r1, g, column tile, t, r0
    return np.ascontiguousarray(x.transpose(4, 2, 6, 0, 1, 3, 5)).reshape(n // 2, groups, 128)
