"""Every row of the table of instructions against a scalar model in integers and fractions.

The models follow the text of NVIDIA's PTX ISA, "Instruction Set", one lane at a time.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from shared_kernels.offline.ptx import Approximations, semantics
from shared_kernels.offline.ptx.parser import BITS

pytestmark = pytest.mark.tools

# kind -> (bits of the significand, smallest and largest exponent)
FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}
NAN, INF = math.nan, math.inf


def is_float(kind):
    return kind in FORMATS or kind == "tf32"


def fields(kind):
    p, low, high = FORMATS[kind]
    return p, low, high, BITS[kind] - p  # exponent bits


def number(bits, kind):
    """The value of an encoding: a Fraction, or a float for NaN, infinities and zeros."""
    if not is_float(kind):
        return bits - (1 << BITS[kind]) if kind[0] == "s" and bits >> (BITS[kind] - 1) else bits
    p, low, high, wide = fields("f32" if kind == "tf32" else kind)
    sign = -1 if bits >> (p + wide - 1) else 1
    exponent, rest = bits >> (p - 1) & ((1 << wide) - 1), bits & ((1 << (p - 1)) - 1)
    if exponent == (1 << wide) - 1:
        return NAN if rest else sign * INF
    if exponent == 0:
        return sign * Fraction(rest) * Fraction(2) ** (low - p + 1) if rest else sign * 0.0
    return sign * (rest + (1 << (p - 1))) * Fraction(2) ** (exponent + low - 1 - p + 1)


def encoded(value, kind):
    """To the nearest encoding, ties to even; None stands for any NaN."""
    if not is_float(kind):
        return int(value) & ((1 << BITS[kind]) - 1)
    p, low, high, wide = fields(kind)
    top = ((1 << wide) - 1) << (p - 1)
    negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
    sign = int(negative) << (p + wide - 1)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return sign | (top if math.isinf(value) else 0)
    if value == 0:
        return sign
    x = abs(value)
    exponent = max(low, x.numerator.bit_length() - x.denominator.bit_length() - 1)
    while x >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = x / Fraction(2) ** (exponent - p + 1)
    whole = round(units)  # ties to even
    if whole >> p:
        whole, exponent = whole >> 1, exponent + 1
    if exponent > high:
        return sign | top
    if whole < 1 << (p - 1):
        return sign | whole
    return sign | ((exponent - low + 1) << (p - 1)) | (whole & ((1 << (p - 1)) - 1))


def flush(value, kind):
    if isinstance(value, Fraction) and kind == "f32" and abs(value) < Fraction(2) ** -126:
        return -0.0 if value < 0 else 0.0
    return value


def special(*values):
    return any(isinstance(v, float) for v in values)


def plus(a, b):
    if not special(a, b):
        return a + b if a + b else 0.0
    if a == 0 and b == 0:
        return math.copysign(0.0, math.copysign(1, a) + math.copysign(1, b) or 1)
    if a == 0 or b == 0:
        return b if a == 0 else a
    return (a if isinstance(a, float) else 0.0) + (b if isinstance(b, float) else 0.0)


def negated(a):
    return -a


def times(a, b):
    if not special(a, b):
        return a * b
    sign = (math.copysign(1, a) if isinstance(a, float) else (1 if a > 0 else -1)) * (
        math.copysign(1, b) if isinstance(b, float) else (1 if b > 0 else -1)
    )
    if a != a or b != b or (a == 0 and abs(b) == INF) or (b == 0 and abs(a) == INF):
        return NAN
    return sign * (INF if INF in (abs(a), abs(b)) else 0.0)


def over(a, b):
    sign = math.copysign(1, a) * math.copysign(1, b)
    if a != a or b != b or (a == 0 and b == 0) or (abs(a) == INF and abs(b) == INF):
        return NAN
    if b == 0 or abs(a) == INF:
        return sign * INF
    if a == 0 or abs(b) == INF:
        return sign * 0.0
    return a / b


def truncated(a, b):
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def lesser(a, b):
    if a != a or b != b:
        return b if a != a else a
    if a == 0 and b == 0:
        return a if math.copysign(1, a) < 0 else b
    return min(a, b)


def greater(a, b):
    if a != a or b != b:
        return b if a != a else a
    return -lesser(-a, -b)


def field(a, position, length, kind):
    wide, position, length = BITS[kind], position & 255, length & 255
    bits = a & ((1 << wide) - 1)
    top = min(position + length - 1, wide - 1)
    sign = bits >> top & 1 if kind[0] == "s" and length else 0
    out = 0
    for k in range(wide):
        inside = k < length and position + k < wide
        out |= (bits >> (position + k) & 1 if inside else sign) << k
    return out


def inserted(a, b, position, length, kind):
    wide, position, length = BITS[kind], position & 255, length & 255
    for k in range(length):
        if position + k < wide:
            bit = a >> k & 1 if k < wide else 0
            b = b & ~(1 << position + k) | bit << position + k
    return b


def permuted(a, b, selector):
    out = 0
    for k in range(4):
        pick = selector >> 4 * k & 15
        byte = (a | b << 32) >> 8 * (pick & 7) & 255
        if pick & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * k
    return out


def root(x):
    """The nearest float64 for a float64, else exact enough to round once more."""
    if isinstance(x, float):
        return NAN if x < 0 and x else x
    if x < 0:
        return NAN
    return Fraction(math.isqrt(int(x * Fraction(2) ** 2400)), 1) / Fraction(2) ** 1200


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
COMPARE.update(lo=COMPARE["lt"], ls=COMPARE["le"], hi=COMPARE["gt"], hs=COMPARE["ge"])
JOIN = {"and": lambda p, q: p and q, "or": lambda p, q: p or q, "xor": lambda p, q: p != q}


def compared(name, a, b, floats):
    unordered = a != a or b != b
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if floats and name.endswith("u") and name[:-1] in COMPARE:
        return unordered or COMPARE[name[:-1]](a, b)
    if floats and unordered:
        return False
    return COMPARE[name](a, b)


def halves(bits, kind):
    return [number(bits >> s & 0xFFFF, kind) for s in (0, 16)]


def to_tf32(bits):
    if bits >> 23 & 255 == 255:
        return bits
    return (bits + 0x1000) & 0xFFFFE000


def model(form, raw, kinds):
    """The results of one lane as encodings, or None where any NaN will do; raw: encodings."""
    opcode, *mods = form.split(".")
    kind = mods[-1]
    ftz = "ftz" in mods
    x = [flush(number(b, k), k) if ftz else number(b, k) for b, k in zip(raw, kinds, strict=True)]

    def out(value, of=None):
        of = of or kind
        if ftz and of == "f32" and isinstance(value, Fraction):
            bits = encoded(value, of)
            value = flush(number(bits, of), of)
        return [encoded(value, of)]

    if kind == "f32x2":
        low = model(form.replace("f32x2", "f32"), [b & 0xFFFFFFFF for b in raw], ["f32"] * len(raw))
        high = model(form.replace("f32x2", "f32"), [b >> 32 for b in raw], ["f32"] * len(raw))
        return [(low[0], high[0])]
    if opcode in ("add", "sub", "mul", "fma") and is_float(kind):
        narrow = mods[-2:] in (["f32", "bf16"], ["f32", "f16"])
        if narrow:
            wide_count = 2 if opcode == "fma" else 1
            x = [number(b, kind if k < wide_count else "f32") for k, b in enumerate(raw)]
        result = {
            "add": lambda a, b: plus(a, b),
            "sub": lambda a, b: plus(a, negated(b)),
            "mul": lambda a, b: times(a, b),
            "fma": lambda a, b, c: plus(times(a, b), c),
        }[opcode](*x)
        return out(result, "f32" if narrow else kind)
    if opcode in ("add", "sub"):
        return out(x[0] + x[1] if opcode == "add" else x[0] - x[1])
    if opcode in ("mul", "mad"):
        product = x[0] * x[1]
        if "hi" in mods:
            product >>= BITS[kind]
        wide = f"{kind[0]}{2 * BITS[kind]}" if "wide" in mods else kind
        return out(product + (x[2] if opcode == "mad" else 0), wide)
    if opcode == "div":
        return out(over(*x) if is_float(kind) else truncated(*x))
    if opcode == "rem":
        return out(x[0] - truncated(*x) * x[1])
    if opcode in ("min", "max"):
        choose = lesser if opcode == "min" else greater
        nan = "NaN" in mods and any(v != v for v in x)
        result = x[0]
        for y in x[1:]:
            result = choose(result, y)
        if "relu" in mods:
            result = max(result, 0)
        return out(NAN if nan else result)
    if opcode in ("neg", "abs"):
        return out(-x[0] if opcode == "neg" else abs(x[0]))
    if opcode == "sqrt":
        return out(root(x[0]))
    if opcode == "rcp":
        return out(over(Fraction(1), x[0]))
    if opcode in ("and", "or", "xor", "not"):
        mask = (1 << BITS[kind]) - 1
        a, b = raw[0], raw[-1]
        return [{"and": a & b, "or": a | b, "xor": a ^ b, "not": ~a & mask}[opcode]]
    if opcode == "shl":
        return out(raw[0] << raw[1] if raw[1] < 64 else 0)
    if opcode == "shr":
        return out(x[0] >> min(raw[1], 64))
    if opcode == "shf":
        by = min(raw[2], 32) if "clamp" in mods else raw[2] & 31
        both = raw[0] | raw[1] << 32
        return out(both >> by if mods[0] == "r" else (both << by) >> 32)
    if opcode == "bfe":
        return out(field(raw[0], raw[1], raw[2], kind))
    if opcode == "bfi":
        return out(inserted(*raw, kind))
    if opcode == "prmt":
        return out(permuted(*raw))
    if opcode == "lop3":
        bits = (
            raw[3] >> ((raw[0] >> k & 1) << 2 | (raw[1] >> k & 1) << 1 | raw[2] >> k & 1) & 1
            for k in range(32)
        )
        return out(sum(bit << k for k, bit in enumerate(bits)))
    if opcode == "popc":
        return [raw[0].bit_count()]
    if opcode == "clz":
        return [BITS[kind] - raw[0].bit_length()]
    if opcode == "brev":
        return [int(f"{raw[0]:0{BITS[kind]}b}"[::-1], 2)]
    if opcode in ("selp", "mov"):
        return [raw[0] if opcode == "mov" or raw[2] else raw[1]]
    if opcode == "setp":
        if kind == "bf16x2":
            pairs = zip(halves(raw[0], "bf16"), halves(raw[1], "bf16"), strict=True)
            return [int(compared(mods[0], a, b, True)) for a, b in pairs]
        if kind == "bf16":
            x = [number(b, "bf16") for b in raw]
        p = compared(mods[0], x[0], x[1], is_float(kind))
        if len(raw) == 3:
            return [int(JOIN[mods[1]](q, bool(raw[2]))) for q in (p, not p)]
        return [int(p)]
    if opcode == "cvt":
        to, of = mods[-2:]
        if to == "tf32":
            return [to_tf32(raw[0])]
        value = number(raw[0], of) if of != "bf16" else number(raw[0], "bf16")
        value = flush(value, "f32") if ftz else value
        if to in ("bf16x2", "f16x2"):
            low, high = x[1], x[0]
            if "relu" in mods:
                low, high = (0.0 if v <= 0 else v for v in (low, high))
            return [(encoded(low, to[:-2]), encoded(high, to[:-2]))]
        modes = {"rni": round, "rmi": math.floor, "rpi": math.ceil, "rzi": math.trunc}
        mode = next((modes[m] for m in mods if m in modes), None)
        if is_float(to):
            if mode and not special(value):
                whole = mode(value)
                value = Fraction(whole) if whole else math.copysign(0.0, value)
            elif not is_float(of):
                value = Fraction(value) if value else 0.0
            return out(value, to)
        if is_float(of):
            wide, signed = BITS[to], to[0] == "s"
            low, high = (-(1 << wide - 1), (1 << wide - 1) - 1) if signed else (0, (1 << wide) - 1)
            if value != value:
                return [0]
            whole = value if abs(value) == INF else mode(value)
            return [int(min(max(whole, low), high)) & ((1 << wide) - 1)]
        return out(value, to)
    raise AssertionError(f"no model of {form}")


INTEGERS = [0, 1, 2, 3, 5, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255]
FLOATS = ["0", "-0", "1", "-1", "0.5", "2.5", "3.5", "-2.5", "1e-3", "300", "inf", "-inf", "nan"]


def samples(kind, count, generator):
    """Encodings: special values, then random ones near each other's magnitude."""
    wide = BITS[kind]
    random = [int(v) for v in generator.integers(0, 1 << min(wide, 63), count)]
    if wide == 64:
        random = [v << 1 | 1 for v in random]
    if kind in FORMATS or kind == "tf32":
        of = "f32" if kind == "tf32" else kind
        p, low, high, _ = fields(of)
        named = [
            encoded(float(t) if not t[-1].isdigit() or float(t) == 0 else Fraction(t), of)
            for t in FLOATS
        ]
        named = [((1 << BITS[of]) - 1) >> 1 if b is None else b for b in named]
        tiny = [1, (1 << (p - 1)) - 1, 1 << (p - 1)]
        near = [
            encoded(Fraction(float(v)).limit_denominator(1 << 40) or Fraction(1), of)
            for v in generator.normal(size=count)
        ]
        found = named + tiny + near + random
    elif kind == "pred":
        found = [0, 1]
    else:
        edge = [(1 << wide) - 1, 1 << (wide - 1), (1 << (wide - 1)) - 1]
        found = [b & ((1 << wide) - 1) for b in INTEGERS] + edge + random
    return [found[int(k)] for k in generator.integers(0, len(found), count)]


def kinds_of(form, sources):
    """The types that the sources' encodings are read as."""
    kind = form.split(".")[-1]
    floats = ("f16", "bf16", "f32", "f64")
    return [kind if kind in floats and s == f"b{BITS[kind]}" else s for s in sources]


APPROXIMATE = ("ex2", "lg2", "tanh", "rsqrt")
EXACT = [
    key
    for key in semantics.TABLE
    if key[0].split(".")[0] not in APPROXIMATE and not {"approx", "full"} & set(key[0].split("."))
]


def lanes_of(result, kind):
    """What came out as encodings."""
    dtype = semantics.dtype_of(kind)
    bits = np.ascontiguousarray(np.broadcast_to(result, (1, COUNT)).astype(dtype, copy=False))
    return [
        int(v) for v in (bits if kind == "pred" else bits.view(f"u{dtype.itemsize}")).reshape(-1)
    ]


COUNT = 32


@pytest.mark.parametrize("key", EXACT, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_form_computes_what_the_isa_says(key):
    form, row = key[0], semantics.TABLE[key]
    generator = np.random.default_rng(len(form))
    kinds = kinds_of(form, row.sources)
    lanes = [samples(k, COUNT, generator) for k in kinds]
    opcode = form.split(".")[0]
    if opcode in ("div", "rem") and not is_float(kinds[0]):
        lanes[1] = [b or 3 for b in lanes[1]]  # a division by zero has no defined result
    if opcode == "lop3":
        lanes[3] = [0x6A] * COUNT  # an immediate
    arrays = []
    for bits, source in zip(lanes, row.sources, strict=True):
        dtype = semantics.dtype_of(source)
        raw = (
            np.array([bits], bool)
            if source == "pred"
            else np.array([bits], f"u{dtype.itemsize}").view(dtype)
        )
        arrays.append(raw)
    with np.errstate(all="ignore"):
        results = row.compute(*arrays)
    results = results if isinstance(results, tuple) else (results,)
    got = [lanes_of(r, k) for r, k in zip(results, row.result.split(), strict=True)]
    for lane in range(COUNT):
        expected = model(form, [bits[lane] for bits in lanes], kinds)
        for have, want in zip((g[lane] for g in got), expected, strict=True):
            same_bits(have, want, row.result.split()[0], form, [hex(b[lane]) for b in lanes])


def same_bits(have, want, kind, form, given):
    if isinstance(want, tuple):  # two halves
        half = BITS[kind] // 2
        for k, one in enumerate(want):
            part = "f32" if half == 32 else "bf16" if "bf16" in form else "f16"
            same_bits(have >> half * k & ((1 << half) - 1), one, part, form, given)
        return
    if want is None:
        of = {"b16": "bf16" if "bf16" in form else "f16", "tf32": "f32"}.get(kind, kind)
        assert math.isnan(number(have, of)), (form, given, hex(have))
    else:
        assert have == want, (form, given, hex(have), hex(want))


# form -> (the function in float64, largest relative error, largest absolute error)
BOUNDS = {
    "ex2.approx.f32": (lambda x: 2.0**x, 2.0**-22, 0.0),
    "lg2.approx.f32": (math.log2, 2.0**-22, 2.0**-22),
    "rcp.approx.f32": (lambda x: 1 / x, 2.0**-23, 0.0),
    "sqrt.approx.f32": (math.sqrt, 2.0**-23, 0.0),
    "rsqrt.approx.f32": (lambda x: x**-0.5, 2.0**-22.9, 0.0),
    "tanh.approx.f32": (math.tanh, 2.0**-11, 0.0),
}


@pytest.mark.parametrize("errs", [False, True])
@pytest.mark.parametrize("form", BOUNDS)
def test_an_approximation_stays_within_the_bound_and_errs_when_asked(form, errs, monkeypatch):
    monkeypatch.setattr(Approximations, "errs_as_allowed", errs)
    exact, relative, absolute = BOUNDS[form]
    x = np.random.default_rng(0).uniform(0.01, 20, (1, 4000)).astype(np.float32)
    out = semantics.TABLE[form, 1].compute(x).astype(np.float64)
    truth = np.array([[exact(float(v)) for v in x[0]]])
    bound = np.maximum(relative * np.abs(truth), absolute)
    rounding = np.abs(truth) * 2.0**-24
    error = np.abs(out - truth)
    assert (error <= bound + 2 * rounding).all()
    # Rounding alone is half of a bound of one unit; when asked, errors come near the bound.
    assert (error.max() > (bound + rounding).max() / 4) if errs else (error <= 2 * rounding).all()


@pytest.mark.parametrize(
    ("form", "count"), [("add.f32", 3), ("min.f64", 3), ("add.sat.f32", 2), ("cvt.rz.f32.f64", 1)]
)
def test_what_is_not_in_the_table_is_not_guessed(form, count):
    assert (form, count) not in semantics.TABLE


def test_the_fused_product_rounds_once():
    a = np.array([[1 + 2.0**-12]], np.float32)
    c = -np.array([[1 + 2.0**-11]], np.float32)
    assert float(semantics.fma_f32(a, a, c)[0, 0]) == 2.0**-24
    assert float((a * a + c)[0, 0]) == 0.0
