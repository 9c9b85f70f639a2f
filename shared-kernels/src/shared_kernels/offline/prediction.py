"""How long launches take on cards that are not there: executed instructions at peak rates.

`ptx.Counters` counts what the compiled code executes; here each instruction of PTX costs what the
unit that runs it needs, at the rates of `model`. Two times come out. The bound: all units work at
once and the slowest decides. In turn: the tensor cores, and then the slowest of the other units of
a processor, as it is where every product is waited for before anything else begins. A card's time
lies above the first, and above the second where one CTA has a processor for itself.

The assembler is not in it: it spends further instructions on addresses and copies of registers, and
drops others. Nor are latencies, the last wave of CTAs, the launch itself, and hits in the
second-level cache from one launch to the next. Bytes of main memory are those that a launch touches
for the first time.

Source: `model`, and the data sheets of A100 80 GB, H100 and H200 (SXM): 2039, 3350 and 4800 GB/s;
RTX Blackwell GPU Architecture (2025): RTX 5090, 170 processors at 2.407 GHz, 1792 GB/s, 209.5
TFLOP/s in fp16 with fp32 sums.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .model import GLOBAL_BYTES, QUARTERS, RATES
from .ptx.counters import Counters
from .targets import Row


@dataclass(frozen=True)
class Card:
    """A card of a target.

    Attributes:
        target: whose code it runs.
        processors: streaming multiprocessors.
        clock: boost clock in GHz.
        bandwidth: of the main memory, in GB/s.
        products: multiply-adds in bf16 per cycle and quarter, where they are not the target's.
    """

    target: str
    processors: int
    clock: float
    bandwidth: float
    products: Mapping[str, int] = field(default_factory=dict)


CARDS = {
    "A100 80 GB": Card("sm_80", 108, 1.41, 2039),
    "H100 SXM": Card("sm_90", 132, 1.83, 3350),
    "H200": Card("sm_90", 132, 1.83, 4800),
    "RTX 5090": Card("sm_120", 170, 2.407, 1792, {"HMMA": 64}),
}

# (forms of PTX, the unit, instructions that the assembler makes of one), the first that matches.
# Moves, conversions of width and what says only where to go on cost nothing but their issue.
_UNITS: tuple[tuple[str, str, float], ...] = (
    (r"(mov|cvta|ld\.param|ret|exit|wgmma\.(fence|commit|wait)|cp\.async\.(commit|wait))", "", 0),
    (r"(bra|bar|barrier|fence|griddepcontrol|trap)", "", 1),
    (r"(wgmma|mma)", "tensor", 1),
    (r"(ld|st)\.shared|ldmatrix|stmatrix", "shared", 1),
    (r"(shfl|vote|redux|match)", "shuffle", 1),
    (r"(ld|st|atom|red)\.global|cp\.async", "global", 1),
    (r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\.approx", "special", 1),
    (r"(div\.full|sqrt\.rn|rcp\.rn|div\.rn)\.(ftz\.)?f32", "special", 1.5),
    (r"(div|rem)\.[su]32", "alu", 16),
    (r"(div|rem)\.[su]64", "alu", 70),
    (r"\w+\.(\w+\.)*f64", "fp64", 1),
    (r"cvt\.(\w+\.)*f(16|32)\.[su]\d+|cvt\.(\w+\.)*[su]\d+\.f(16|32)", "special", 1),
    (r"cvt\.(\w+\.)*(bf16|f16)x2\.f32", "alu", 1),
    (r"cvt\.(\w+\.)*(f32\.b?f16|b?f16\.f32|tf32\.f32)", "alu", 1),
    (r"cvt\.", "", 0.5),
    (r"(fma|add|sub|mul)\.(\w+\.)*(f32x2|bf16x2|f16x2)", "fma", 1),
    (r"(fma|add|sub|mul)\.(\w+\.)*(f32|bf16|f16)", "fma", 1),
    (r"(mad|mul)\.(lo|hi)\.[su]64", "imad", 4),
    (r"(mad|mul)\.wide", "imad", 1),
    (r"(mad|mul)\.", "imad", 1),
    (r"\w+\.(\w+\.)*[subf]64", "alu", 2),
    (r"", "alu", 1),
)
_COMPILED = [(re.compile(pattern), unit, n) for pattern, unit, n in _UNITS]
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def _unit(form: str) -> tuple[str, float]:
    return next((unit, n) for pattern, unit, n in _COMPILED if pattern.match(form))


def _products(form: str) -> tuple[str, float]:
    """The matrix instruction's name, and the multiply-adds of one warp as if they were bf16's."""
    found = _SHAPE.search(form)
    if found is None:
        raise ValueError(f"the shape of {form} is not known")
    m, n, k = map(int, found.groups())
    slower = 2 if "tf32" in form else 1
    if form.startswith("wgmma"):  # four warps issue it together
        return "HGMMA", m * n * k * slower / 4
    return "HMMA", m * n * k * slower


def work(counters: Counters, target: str, products: Mapping[str, int] | None = None) -> Row:
    """What the launches cost, summed over all of them.

    Returns:
        ``instructions`` of warps; ``cycles`` of each unit of a quarter of a processor, summed over
        warps; ``dram`` in bytes; ``sectors`` moved and ``ideal`` ones; ``wavefronts`` of shared
        memory and ``accesses``; ``beside_products``: instructions issued while a wgmma ran.
    """
    rates = RATES[target]
    rate = {**rates.products, **(products or {})}
    forms: Counter[str] = Counter()
    for by_form in counters.forms().values():
        forms.update(by_form)
    cycles: dict[str, float] = defaultdict(float)
    instructions = 0.0
    for form, n in forms.items():
        unit, made = _unit(form)
        instructions += n * made
        if unit == "tensor":
            name, multiply_adds = _products(form)
            cycles["tensor"] += n * multiply_adds / rate[name]
        elif unit == "imad":
            cycles["fma"] += n * made * rates.cycles["imad"]
        elif unit == "shuffle":
            cycles["shared"] += n * QUARTERS
        elif unit not in ("", "shared", "global"):
            cycles[unit] += n * made * rates.cycles[unit]
    cycles["issue"] = instructions * rates.cycles["issue"]
    accesses, wavefronts = (sum(x[k] for x in counters.shared.values()) for k in (0, 1))
    _, sectors, ideal = (sum(x[k] for x in counters.sectors.values()) for k in (0, 1, 2))
    cycles["shared"] += QUARTERS * wavefronts
    cycles["global"] = QUARTERS * 32 * sectors / GLOBAL_BYTES
    return {
        "instructions": round(instructions),
        "cycles": {unit: round(n) for unit, n in sorted(cycles.items()) if n},
        "dram": counters.first_touched,
        "sectors": sectors,
        "ideal": ideal,
        "accesses": accesses,
        "wavefronts": wavefronts,
        "beside_products": counters.beside_products,
    }


def predicted(card: Card, counters: Counters, copies: int = 1) -> Row:
    """The two times of a card in ms, and what bounds it.

    Args:
        card: One of `CARDS`.
        counters: Of launches that ran as compiled for the card's target.
        copies: How often the card runs these launches at once, e.g. batch times heads.
    """
    done = work(counters, card.target, card.products)
    per_ms = card.processors * QUARTERS * card.clock * 1e6 / copies
    times = {unit: n / per_ms for unit, n in done["cycles"].items()}
    times["memory"] = done["dram"] * copies / card.bandwidth / 1e6
    bound = max(times, key=times.__getitem__)
    others = max((t for unit, t in times.items() if unit not in ("tensor", "memory")), default=0.0)
    in_turn = max(times["memory"], times.get("tensor", 0.0) + others)
    return {"bound_ms": times[bound], "in_turn_ms": in_turn, "bound": bound, **done}
