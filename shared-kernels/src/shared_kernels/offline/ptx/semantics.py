"""What each arithmetic instruction computes: one table on arrays, a lane per thread.

A row is keyed by the instruction's whole form and its number of source operands, so that an
unknown modifier, or a third operand that a newer target allows, is missing from the table rather
than guessed. Source: NVIDIA, Parallel Thread Execution ISA, "Instruction Set". What touches memory
or other lanes stands in `instructions.py`; matrices stand in `matrices.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .parser import BITS

Array = np.ndarray
_FLOATS = {"f16": "f2", "f32": "f4", "f64": "f8", "tf32": "f4", "pred": "?"}


def dtype_of(kind: str) -> np.dtype:
    """The NumPy type that holds a PTX type: bit and packed types are unsigned integers."""
    letter = "i" if kind[0] == "s" else "u"
    return np.dtype(_FLOATS.get(kind) or f"{letter}{BITS[kind] // 8}")


class Form(NamedTuple):
    """One row: the type of the result, those of the source operands, and the function."""

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Any]


TABLE: dict[tuple[str, int], Form] = {}


def _define(
    pattern: str, kinds: str, result: str, sources: str, compute: Callable[..., Any]
) -> None:
    """Rows for each of `kinds`; a T in the pattern, the result and the sources stands for it."""
    for kind in kinds.split():
        operands = tuple(s.replace("T", kind) for s in sources.split())
        key = (pattern.replace("T", kind), len(operands))
        TABLE[key] = Form(result.replace("T", kind), operands, compute)


# ------------------------------------------------------------------------------- floating point

_TINY = np.float32(2.0**-126)
_HALF_OF_F32 = np.uint64(1 << 28)  # of a float64: exactly between two float32
_BELOW_F32 = np.uint64((1 << 29) - 1)


def flushed(x: Array) -> Array:
    """Subnormal float32 become zeros of their sign (.ftz)."""
    small = np.abs(x) < _TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def _ftz(compute: Callable[..., Array]) -> Callable[..., Array]:
    """With .ftz, inputs are flushed, and so is the result."""
    return lambda *x: flushed(compute(*(flushed(y) for y in x)))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(s, e): s = a + b rounded, s + e = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _to_odd(a: Array, b: Array) -> Array:
    """a + b rounded to odd, so that a second rounding to fewer bits is right (Boldo, Melquiond)."""
    s, e = _two_sum(a, b)
    even = (np.ascontiguousarray(s).view(np.uint64) & np.uint64(1)) == 0
    off = (e != 0) & even & np.isfinite(e)
    return np.where(off, np.nextafter(s, np.where(e > 0, np.inf, -np.inf)), s)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once: exact in float64 but where the sum lies between two float32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    bits = total.view(np.uint64) & _BELOW_F32
    doubtful = (bits == _HALF_OF_F32) | ((np.abs(total) < 2.0**-125) & (bits != 0))
    if doubtful.any():
        total = np.where(doubtful, _to_odd(product, np.float64(1) * c), total)
    return total.astype(np.float32)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once, from error-free products and sums."""
    product = a * b
    big = np.float64(134217729)  # 2^27 + 1 cuts a float64 into halves (Veltkamp)
    a_high = big * a - (big * a - a)
    b_high = big * b - (big * b - b)
    a_low, b_low = a - a_high, b - b_high
    low = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    high, rest = _two_sum(c, low)
    total, carried = _two_sum(product, high)
    out = total + _to_odd(rest, carried)
    return np.where(np.isfinite(out), out, product + c)


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float16)


def _max(a: Array, b: Array) -> Array:
    """The larger number; a NaN only where both are; +0 is above -0."""
    out = np.fmax(a, b)
    zeros = (out == 0) & (a == b)
    return np.where(zeros, a + b, out) if zeros.any() else out


def _min(a: Array, b: Array) -> Array:
    out = np.fmin(a, b)
    zeros = (out == 0) & (a == b)
    return np.where(zeros, -(-a - b), out) if zeros.any() else out


def _or_nan(compute: Callable[..., Array]) -> Callable[..., Array]:
    """With .NaN, a NaN among the operands gives NaN."""
    return lambda a, b: np.where(
        np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), compute(a, b)
    )


def _thrice(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b, c: compute(compute(a, b), c)


def _pairs(compute: Callable[..., Array]) -> Callable[..., Array]:
    """The same for both float32 of a 64-bit register (.f32x2)."""

    def both(*x: Array) -> Array:
        halves = (np.ascontiguousarray(y)[..., None].view(np.float32) for y in x)
        return np.ascontiguousarray(compute(*halves)).view(np.uint64)[..., 0]

    return both


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even; every NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + up) >> np.uint32(16)).astype(np.uint16)


def to_f16(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Array) -> Array:
    """To the nearest of 10 bits, ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    out = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), out.view(np.float32), x)


def _relu(x: Array) -> Array:
    return np.where(x > 0, x, np.where(np.isnan(x), x, np.zeros((), x.dtype)))


def _two_of(
    convert: Callable[[Array], Array], relu: bool = False
) -> Callable[[Array, Array], Array]:
    """The first operand in the upper half, the second in the lower one."""

    def both(high: Array, low: Array) -> Array:
        if relu:
            high, low = _relu(high), _relu(low)
        return (convert(high).astype(np.uint32) << np.uint32(16)) | convert(low)

    return both


def _to_integer(kind: str, rounded: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Values beyond the integers become the nearest one, NaN becomes 0."""
    dtype = dtype_of(kind)
    limits = np.iinfo(dtype)

    def convert(x: Array) -> Array:
        whole = rounded(np.where(np.isnan(x), 0, x).astype(np.float64))
        low, high = whole <= float(limits.min), whole >= float(limits.max)
        inside = np.where(low | high, 0, whole).astype(dtype)
        return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))

    return convert


# -------------------------------------------------------------------------------- approximations


class Approximations:
    """How approximate instructions err; `errs_as_allowed` moves results by up to the ISA's bound.

    The direction and size of an error are drawn from the bits of the result, so that two runs have
    the same errors. Where the result is a power of two or zero it stays as it is.
    """

    errs_as_allowed = False


def _drawn(x: Array) -> Array:
    """A number in [-1, 1] for each element, the same each time; half of them at the ends."""
    bits = np.ascontiguousarray(x).view(np.uint32) * np.uint32(2654435769)
    unit = (bits >> np.uint32(8)).astype(np.float64) / 2.0**23 - 1.0
    return np.clip(2.0 * unit, -1.0, 1.0)


def _approximate(
    compute: Callable[..., Array], relative: float, absolute: float = 0.0
) -> Callable[..., Array]:
    """The right result, or one that is off by max(relative * |result|, absolute) at most."""

    def approximate(*x: Array) -> Array:
        out = compute(*x)
        if not Approximations.errs_as_allowed:
            return out
        mantissa = np.ascontiguousarray(out).view(np.uint32) & np.uint32(0x7FFFFF)
        bound = np.maximum(relative * np.abs(out.astype(np.float64)), absolute)
        moved = (out + bound * _drawn(out)).astype(np.float32)
        fixed = (mantissa == 0) | ~np.isfinite(out) | (np.abs(out) < _TINY)
        return np.where(fixed, out, moved)

    return approximate


# The largest errors that the ISA documents, for each of its approximate instructions.
LG2_ERROR = 2.0**-22  # absolute for an operand in (0.5, 2), relative elsewhere
EX2_ERROR = 2.0**-22  # relative
RCP_ERROR = 2.0**-23  # relative
SQRT_ERROR = 2.0**-23  # relative
RSQRT_ERROR = 2.0**-22.9  # relative
DIV_ERROR = 2.0**-22  # 2 units in the last place
TANH_ERROR = 2.0**-11  # relative


def _log2(x: Array) -> Array:
    return np.log2(x.astype(np.float64)).astype(np.float32)


def _lg2(x: Array) -> Array:
    out = _log2(x)
    if not Approximations.errs_as_allowed:
        return out
    near = np.abs(out) < 1
    bound = LG2_ERROR * np.where(near, 1.0, np.abs(out.astype(np.float64)))
    moved = (out + bound * _drawn(out)).astype(np.float32)
    return np.where((out == 0) | ~np.isfinite(out), out, moved)


def _exp2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def _tanh(x: Array) -> Array:
    return np.tanh(x.astype(np.float64)).astype(np.float32)


def _rcp(x: Array) -> Array:
    return np.ones((), x.dtype) / x


def _rcp_f64_seed(x: Array) -> Array:
    """The upper half of 1 / x: a start for Newton's iteration."""
    bits = np.ascontiguousarray(1.0 / x).view(np.uint64)
    return (bits & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _rsqrt(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


# -------------------------------------------------------------------------------------- integers


def _divided(a: Array, b: Array) -> Array:
    """Towards zero."""
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def _wide(kind: str) -> np.dtype:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 4}")


def _upper(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8")
        return (a.astype(wide) * b >> wide.type(32)).astype(a.dtype)
    half, low = a.dtype.type(32), a.dtype.type(0xFFFFFFFF)
    a_low, b_low, a_high, b_high = a & low, b & low, a >> half, b >> half
    lowest = (a_low.view("u8") * b_low.view("u8")) >> np.uint64(32)
    middle = a_high * b_low + lowest.view(a.dtype)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


def _shifted_left(a: Array, by: Array) -> Array:
    """A shift by the word's width or more gives 0."""
    width = 8 * a.dtype.itemsize
    inside = a << np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by >= width, a.dtype.type(0), inside) if (by >= width).any() else inside


def _shifted_right(a: Array, by: Array) -> Array:
    """As for a shift by the width less one where a sign is kept; else 0."""
    width = 8 * a.dtype.itemsize
    inside = a >> np.minimum(by, width - 1).astype(a.dtype)
    if a.dtype.kind == "i" or not (by >= width).any():
        return inside
    return np.where(by >= width, a.dtype.type(0), inside)


def _funnel(direction: str, mode: str) -> Callable[[Array, Array, Array], Array]:
    def shift(low: Array, high: Array, by: Array) -> Array:
        by = (np.minimum(by, 32) if mode == "clamp" else by & np.uint32(31)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        if direction == "l":
            return ((both << by) >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return shift


def _low_mask(n: Array, dtype: np.dtype) -> Array:
    """The lowest n bits set."""
    width = 8 * dtype.itemsize
    every = dtype.type(np.iinfo(dtype).max)
    return np.where(n > 0, every >> np.clip(width - n, 0, width - 1).astype(dtype), dtype.type(0))


def _extracted(a: Array, position: Array, length: Array) -> Array:
    """Bits of a from `position` on; above them zeros, or the field's sign (bfe)."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    width = 8 * unsigned.itemsize
    bits = np.ascontiguousarray(a).view(unsigned)
    position, length = (
        (position & np.uint32(255)).astype(np.int64),
        (length & np.uint32(255)).astype(np.int64),
    )
    mask = _low_mask(np.minimum(length, width - position), unsigned)
    moved = np.where(
        position < width, bits >> np.minimum(position, width - 1).astype(unsigned), unsigned.type(0)
    )
    field = moved & mask
    if a.dtype.kind == "u":
        return field
    top = np.clip(position + length - 1, 0, width - 1).astype(unsigned)
    negative = ((bits >> top) & unsigned.type(1)).astype(bool) & (length > 0)
    return np.where(negative, field | ~mask, field).view(a.dtype)


def _inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with its bits from `position` on taken from the lowest of a (bfi)."""
    position, length = (
        (position & np.uint32(255)).astype(np.int64),
        (length & np.uint32(255)).astype(np.int64),
    )
    width = 8 * a.dtype.itemsize
    by = np.minimum(position, width - 1).astype(a.dtype)
    mask = np.where(
        position < width, _low_mask(np.minimum(length, width), a.dtype) << by, a.dtype.type(0)
    )
    return (b & ~mask) | ((a << by) & mask)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of the eight of b:a; bit 3 of a selector spreads the byte's sign (prmt)."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.uint32(0)
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte).astype(np.uint32)
        out = out | (byte << np.uint32(8 * k))
    return out


def _looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, by its truth table (lop3)."""
    out = np.zeros((1, 1), np.uint32)
    number = int(table.flat[0])
    for k in range(8):
        if number >> k & 1:
            out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return out


def _reversed_bits(a: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1)
    return np.packbits(bits[..., ::-1], axis=-1).view(a.dtype)[..., 0]


def _bit_length(a: Array) -> Array:
    """Bits up to the highest one that is set."""
    out = np.zeros(a.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        if step < 8 * a.dtype.itemsize:
            high = a >> a.dtype.type(step)
            out = np.where(high != 0, out + np.uint32(step), out)
            a = np.where(high != 0, high, a)
    return out + (a != 0)


# ----------------------------------------------------------------------------------- comparisons

_ORDERED: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """True also where an operand is NaN."""
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _comparisons(kind: str) -> dict[str, Callable[[Array, Array], Array]]:
    if kind[0] in "sub" and kind != "bf16":
        found: dict[str, Callable[..., Any]] = dict(_ORDERED, ne=np.not_equal)
        if kind[0] == "u":
            found.update(lo=np.less, ls=np.less_equal, hi=np.greater, hs=np.greater_equal)
        return {k: f for k, f in found.items() if kind[0] != "b" or k in ("eq", "ne")}
    found = dict(_ORDERED, ne=lambda a, b: (a < b) | (a > b))
    found.update({f"{name}u": _unordered(f) for name, f in found.items()})
    found["num"] = lambda a, b: ~(np.isnan(a) | np.isnan(b))
    found["nan"] = lambda a, b: np.isnan(a) | np.isnan(b)
    return found


def _widened(compute: Callable[..., Array], *narrow: int) -> Callable[..., Array]:
    """The operands at these places are bfloat16."""
    return lambda *x: compute(*(from_bf16(y) if k in narrow else y for k, y in enumerate(x)))


def _halves(compare: Callable[[Array, Array], Array]) -> Callable[..., tuple[Array, Array]]:
    """A comparison of two bfloat16 each: of the lower halves, of the upper halves."""
    upper, by = np.uint32(0xFFFF0000), np.uint32(16)

    def both(a: Array, b: Array) -> tuple[Array, Array]:
        return (
            compare((a << by).view(np.float32), (b << by).view(np.float32)),
            compare((a & upper).view(np.float32), (b & upper).view(np.float32)),
        )

    return both


def _then(
    compare: Callable[..., Array], join: Callable[..., Array]
) -> Callable[..., tuple[Array, Array]]:
    """(compared join c, not compared join c): the two predicates of setp with a third operand."""

    def both(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        compared = compare(a, b)
        return join(compared, c), join(~compared, c)

    return both


# -------------------------------------------------------------------------------------- the table

_INTEGERS = "s16 u16 s32 u32 s64 u64"
_compute: Callable[..., Any]
_convert: Callable[[Array], Array]
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

for _name, _compute in (("add", np.add), ("sub", np.subtract)):
    _define(f"{_name}.T", _INTEGERS, "T", "T T", _compute)
for _name, _compute in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    _define(f"{_name}.T", "f16 f32 f64", "T", "T T", _compute)
    _define(f"{_name}.rn.T", "f16 f32 f64", "T", "T T", _compute)
    _define(f"{_name}.ftz.f32", "f32", "f32", "f32 f32", _ftz(_compute))
    _define(f"{_name}.rn.ftz.f32", "f32", "f32", "f32 f32", _ftz(_compute))
    _define(f"{_name}.f32x2", "f32x2", "T", "T T", _pairs(_compute))
    _define(f"{_name}.rn.f32x2", "f32x2", "T", "T T", _pairs(_compute))
for _name, _compute in (("add", np.add), ("sub", np.subtract)):
    # a narrow first operand, from sm_100 on
    _define(f"{_name}.f32.bf16", "f32", "T", "b16 T", _widened(_compute, 0))
    _define(f"{_name}.rn.f32.bf16", "f32", "T", "b16 T", _widened(_compute, 0))
    _define(f"{_name}.f32.f16", "f32", "T", "f16 T", lambda a, b, f=_compute: f(a.astype("f4"), b))
    _define(
        f"{_name}.rn.f32.f16", "f32", "T", "f16 T", lambda a, b, f=_compute: f(a.astype("f4"), b)
    )
_define("mul.lo.T", _INTEGERS, "T", "T T", np.multiply)
_define("mul.hi.T", "s32 u32 s64 u64", "T", "T T", _upper)
for _kind in ("s16", "u16", "s32", "u32"):
    _to, _twice = _wide(_kind), f"{_kind[0]}{2 * BITS[_kind]}"
    _define("mul.wide.T", _kind, _twice, "T T", lambda a, b, w=_to: a.astype(w) * b)
    _define(
        "mad.wide.T", _kind, _twice, f"T T {_twice}", lambda a, b, c, w=_to: a.astype(w) * b + c
    )
_define("mad.lo.T", _INTEGERS, "T", "T T T", lambda a, b, c: a * b + c)
_define("mad.hi.T", "s32 u32", "T", "T T T", lambda a, b, c: _upper(a, b) + c)
_define("fma.rn.f32", "f32", "T", "T T T", fma_f32)
_define("fma.rn.ftz.f32", "f32", "T", "T T T", _ftz(fma_f32))
_define("fma.rn.f64", "f64", "T", "T T T", fma_f64)
_define("fma.rn.f16", "f16", "T", "T T T", fma_f16)
_define("fma.rn.f32x2", "f32x2", "T", "T T T", _pairs(fma_f32))
_define("fma.rn.f32.bf16", "f32", "T", "b16 b16 T", _widened(fma_f32, 0, 1))
_define("div.T", _INTEGERS, "T", "T T", _divided)
_define("rem.T", _INTEGERS, "T", "T T", np.fmod)
_define("div.rn.T", "f32 f64", "T", "T T", np.divide)
_define("div.full.f32", "f32", "T", "T T", _approximate(np.divide, DIV_ERROR))
_define("div.approx.f32", "f32", "T", "T T", _approximate(np.divide, DIV_ERROR))
_define("div.full.ftz.f32", "f32", "T", "T T", _ftz(_approximate(np.divide, DIV_ERROR)))
_define("div.approx.ftz.f32", "f32", "T", "T T", _ftz(_approximate(np.divide, DIV_ERROR)))

for _name, _whole, _real in (("min", np.minimum, _min), ("max", np.maximum, _max)):
    _define(f"{_name}.T", _INTEGERS, "T", "T T", _whole)
    _define(f"{_name}.relu.T", "s32", "T", "T T", lambda a, b, f=_whole: np.maximum(f(a, b), 0))
    _define(f"{_name}.T", "f16 f32 f64", "T", "T T", _real)
    _define(f"{_name}.ftz.f32", "f32", "T", "T T", _ftz(_real))
    _define(f"{_name}.NaN.T", "f16 f32", "T", "T T", _or_nan(_real))
    _define(f"{_name}.f32", "f32", "T", "T T T", _thrice(_real))  # three operands: from sm_100 on
    _define(f"{_name}.NaN.f32", "f32", "T", "T T T", _thrice(_or_nan(_real)))
    _narrow = lambda a, b, f=_real: to_bf16(f(from_bf16(a), from_bf16(b)))  # noqa: E731
    _define(f"{_name}.bf16", "b16", "T", "T T", _narrow)

_define("neg.T", "s16 s32 s64 f16 f32 f64", "T", "T", np.negative)
_define("neg.ftz.f32", "f32", "T", "T", _ftz(np.negative))
_define("abs.T", "s16 s32 s64 f16 f32 f64", "T", "T", np.abs)
_define("abs.ftz.f32", "f32", "T", "T", _ftz(np.abs))
_define("sqrt.rn.T", "f32 f64", "T", "T", np.sqrt)
_define("rcp.rn.T", "f32 f64", "T", "T", _rcp)
_define("rcp.approx.ftz.f64", "f64", "T", "T", _rcp_f64_seed)
for _name, _compute in (
    ("ex2", _approximate(_exp2, EX2_ERROR)),
    ("lg2", _lg2),
    ("rcp", _approximate(_rcp, RCP_ERROR)),
    ("sqrt", _approximate(np.sqrt, SQRT_ERROR)),
    ("rsqrt", _approximate(_rsqrt, RSQRT_ERROR)),
):
    _define(f"{_name}.approx.f32", "f32", "T", "T", _compute)
    _define(f"{_name}.approx.ftz.f32", "f32", "T", "T", _ftz(_compute))
_define("tanh.approx.f32", "f32", "T", "T", _approximate(_tanh, TANH_ERROR))

for _name, _compute in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    _define(f"{_name}.T", "pred b16 b32 b64", "T", "T T", _compute)
_define("not.T", "pred b16 b32 b64", "T", "T", np.invert)
_define("shl.T", "b16 b32 b64", "T", "T u32", _shifted_left)
_define("shr.T", "b16 b32 b64 u16 u32 u64 s16 s32 s64", "T", "T u32", _shifted_right)
for _direction in "lr":
    for _mode in ("clamp", "wrap"):
        _define(f"shf.{_direction}.{_mode}.b32", "b32", "T", "T T u32", _funnel(_direction, _mode))
_define("bfe.T", "s32 u32 s64 u64", "T", "T u32 u32", _extracted)
_define("bfi.T", "b32 b64", "T", "T T u32 u32", _inserted)
_define("prmt.b32", "b32", "T", "T T T", _permuted)
_define("lop3.b32", "b32", "T", "T T T u32", _looked_up)
_define("popc.T", "b32 b64", "u32", "T", lambda a: np.bitwise_count(a).astype(np.uint32))
_define("clz.T", "b32 b64", "u32", "T", lambda a: np.uint32(8 * a.dtype.itemsize) - _bit_length(a))
_define("brev.T", "b32 b64", "T", "T", _reversed_bits)
_define(
    "selp.T",
    "b16 s16 u16 b32 s32 u32 f32 b64 s64 u64 f64",
    "T",
    "T T pred",
    lambda a, b, p: np.where(p, a, b),
)
_define("mov.T", "pred b16 s16 u16 b32 s32 u32 f32 b64 s64 u64 f64", "T", "T", lambda a: a)

for _kind in ("b16", "b32", "b64", *_INTEGERS.split(), "f16", "f32", "f64"):
    for _name, _compute in _comparisons(_kind).items():
        _define(f"setp.{_name}.T", _kind, "pred", "T T", _compute)
        for _join, _joined in _JOINS.items():
            _define(
                f"setp.{_name}.{_join}.T", _kind, "pred pred", "T T pred", _then(_compute, _joined)
            )
for _name, _compute in _comparisons("bf16").items():
    _define(f"setp.{_name}.bf16", "bf16", "pred", "b16 b16", _widened(_compute, 0, 1))
    _define(f"setp.{_name}.bf16x2", "bf16", "pred pred", "b32 b32", _halves(_compute))

for _to_kind in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
    for _from in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        _to = dtype_of(_to_kind)
        _define(f"cvt.{_to_kind}.T", _from, _to_kind, "T", lambda a, t=_to: a.astype(t))
for _from in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
    _define("cvt.rn.f32.T", _from, "f32", "T", lambda a: a.astype(np.float32))
    _define("cvt.rn.f64.T", _from, "f64", "T", lambda a: a.astype(np.float64))
_define("cvt.f64.f32", "f64", "T", "f32", lambda a: a.astype(np.float64))
_define("cvt.rn.f32.f64", "f32", "T", "f64", lambda a: a.astype(np.float32))
_define("cvt.f32.f16", "f32", "T", "f16", lambda a: a.astype(np.float32))
_define("cvt.f32.bf16", "f32", "T", "b16", from_bf16)
_define("cvt.rn.f16.f32", "f16", "b16", "f32", to_f16)
_define("cvt.rn.bf16.f32", "bf16", "b16", "f32", to_bf16)
_define("cvt.rna.tf32.f32", "tf32", "f32", "f32", to_tf32)
for _name, _convert in (("f16x2", to_f16), ("bf16x2", to_bf16)):
    _define(f"cvt.rn.{_name}.f32", _name, "b32", "f32 f32", _two_of(_convert))
    _define(f"cvt.rn.relu.{_name}.f32", _name, "b32", "f32 f32", _two_of(_convert, relu=True))
for _name, _compute in (("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc)):
    _define(f"cvt.{_name}.T.T", "f32 f64", "T", "T", _compute)
    _define(f"cvt.{_name}.ftz.f32.f32", "f32", "T", "T", _ftz(_compute))
    for _to_kind in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        _integer = _to_integer(_to_kind, _compute)
        _define(f"cvt.{_name}.{_to_kind}.T", "f32 f64", _to_kind, "T", _integer)
        _define(
            f"cvt.{_name}.ftz.{_to_kind}.f32",
            "f32",
            _to_kind,
            "T",
            lambda a, f=_integer: f(flushed(a)),
        )
