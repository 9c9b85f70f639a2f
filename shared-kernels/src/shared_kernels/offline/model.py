"""What the inner loop of a compiled kernel is made of, which unit bounds it, and how long it takes.

The inner loop: of the loops that contain no other, the one with most matrix instructions, then with
most instructions; a kernel without a loop counts as a whole.

The model: every unit works at its peak rate, all units overlap, nothing waits. A unit's cycles for
one pass of one warp are the sum over the loop's instructions of what each occupies; the unit with
most cycles bounds the pass, and a program's pass takes these cycles times its warps over the four
quarters of a processor, at the card's boost clock. So a time is a lower bound, and the tensor
unit's share of it an upper bound on how much of the peak the kernel can reach. Memory is counted as
traffic between a processor and its caches: hits, waits and the main memory's own limit are not in
it. Rates are those of the vendors' tables of throughput for A100, H100, RTX PRO 6000 (Blackwell)
and MI300X.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .targets import Row

QUARTERS = 4  # schedulers of a streaming multiprocessor, SIMDs of a compute unit
SHORTEST = 4  # a loop of fewer instructions is padding or a trap


@dataclass(frozen=True)
class Rates:
    """Cycles that one instruction of one warp occupies a quarter of the processor.

    Attributes:
        clock: boost clock in GHz.
        fma: multiply-adds in fp16 or bf16 per cycle and quarter, by matrix instruction.
        fp: cycles of an fp32 instruction.
        special: cycles of exp2, log2, rcp, sqrt and conversions between integer and float.
        integer: cycles of an integer or logic instruction.
        shared_bytes, global_bytes: per cycle of the whole processor.
        lanes: threads per warp.
    """

    clock: float
    fma: dict[str, int]
    fp: float
    special: float
    integer: float
    shared_bytes: int = 128
    global_bytes: int = 64
    lanes: int = 32


RATES = {
    "sm_80": Rates(1.41, {"HMMA": 256}, fp=2, special=8, integer=2),
    "sm_90": Rates(1.83, {"HGMMA": 512, "HMMA": 256}, fp=1, special=8, integer=2),
    "sm_120": Rates(2.6, {"HMMA": 128}, fp=1, special=8, integer=1),
    "gfx942": Rates(2.1, {"mfma": 256}, fp=4, special=16, integer=4, lanes=64),
}

_FP = re.compile(
    r"(I2FP|FFMA|FMUL|FADD|FMNMX|FSET|FSEL|FCHK|HFMA|HADD|HMUL|HMNMX|HSET|F2FP|DFMA|DADD|DMUL"
    r"|v_(pk_)?(fma|mul|add|sub|max|min|mac|cndmask|cvt_pk|cmp\w*)_?\w*f(16|32|64))"
)
_SPECIAL = re.compile(
    r"(MUFU|I2F(?!P)|F2I|F2F(?!P)|I2I|v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_cvt_(f32_[iu]|[iu]32_f))"
)
_TENSOR = re.compile(r"(HGMMA|HMMA|v_mfma)")
_SHARED = re.compile(r"(LDSM|LDS|STSM|STS|ATOMS|SHFL|ds_)")
_GLOBAL = re.compile(
    r"(LDGSTS|LDG\b|STG|LDL|STL|RED\b|ATOMG|global_(load|store)|buffer_(load|store))"
)
_WAIT = re.compile(
    r"(BAR|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|SYNCS|MEMBAR|FENCE|NOP|BRA|BSYNC|BSSY|EXIT|s_waitcnt"
    r"|s_barrier|s_nop|s_cbranch|s_branch|s_endpgm|s_sleep|s_setprio|s_sched)"
)
KINDS = ("tensor", "fp", "special", "integer", "shared", "global", "wait")
_KINDS = (
    ("tensor", _TENSOR),
    ("wait", _WAIT),
    ("shared", _SHARED),
    ("global", _GLOBAL),
    ("special", _SPECIAL),
    ("fp", _FP),
)


def _kind(opcode: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.match(opcode)), "integer")


def _width(opcode: str) -> int:
    """Bytes per lane of a load, a store or a shuffle."""
    if opcode.startswith(("LDSM", "STSM")):  # .4: four matrices of 8 x 8 halves for a warp
        found = re.search(r"\.([124])$", opcode)
        return 4 * int(found[1]) if found else 4
    if opcode[0].islower():
        if found := re.search(r"dwordx(\d)", opcode):
            return 4 * int(found[1])
        if found := re.search(r"(2)?(?:st64)?_b(\d+)", opcode):
            return int(found[2]) // 8 * (2 if found[1] else 1)
        return 2 if re.search(r"short|byte|_[ui](8|16)", opcode) else 4
    if found := re.search(r"\.[US]?(128|64|16|8)\b", opcode):
        return int(found[1]) // 8
    return 4


def _products(opcode: str) -> tuple[str, float]:
    """The matrix instruction's name, and its multiply-adds for one warp as if they were bf16's."""
    pattern = r"\.(16)(8)(\d+)" if opcode.startswith("HMMA") else r"[._](\d+)x(\d+)x(\d+)"
    found = re.search(pattern, opcode)
    if found is None:
        raise ValueError(f"the shape of {opcode} is not known")
    m, n, k = map(int, found.groups())
    slower = 2 if "TF32" in opcode or "xf32" in opcode else 1
    if opcode.startswith("v_mfma"):
        full = re.search(r"x\d+_?f32", opcode) is not None and slower == 1  # fp32 operands
        return "mfma", m * n * k * (8 if full else slower)
    if opcode.startswith("HGMMA"):  # four warps issue it together
        return "HGMMA", m * n * k * slower / 4
    return "HMMA", m * n * k * slower


_SASS = re.compile(
    r"^\s*(?:(?P<label>\.L_\w+):)|/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.x]*)(?P<rest>[^;]*)"
)
_GCN = re.compile(
    r"^(?P<label>\.LBB\w+):|^\s+(?P<opcode>(?:[vs]_|ds_|global_|buffer_)\w+)(?P<rest>[^\n;]*)"
)


def read(code: str, nvidia: bool) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in order, and (first, last) of each loop: a branch back to a label."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    pattern, label = (_SASS, r"\.L_\w+") if nvidia else (_GCN, r"\.LBB\w+")
    for line in code.splitlines():
        found = pattern.search(line)
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(opcodes)
            continue
        opcodes.append(found["opcode"])
        if opcodes[-1].startswith(("BRA", "s_cbranch", "s_branch")):
            to = re.search(label, found["rest"])
            if to is not None and to[0] in labels:
                loops.append((labels[to[0]], len(opcodes) - 1))
    return opcodes, [(a, b) for a, b in loops if b - a >= SHORTEST]


def inner_loop(code: str, nvidia: bool) -> list[str]:
    """The opcodes of the inner loop; of the whole kernel if it has none."""
    opcodes, loops = read(code, nvidia)
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    bodies = [opcodes[a : b + 1] for a, b in inner]
    return max(
        bodies, key=lambda body: (sum(_kind(op) == "tensor" for op in body), len(body)),
        default=opcodes,
    )  # fmt: skip


def units(target: str, opcodes: list[str]) -> dict[str, float]:
    """Cycles of each unit for one pass of one warp."""
    rates = RATES[target]
    used = dict.fromkeys(("tensor", "fp", "special", "integer", "shared", "global", "issue"), 0.0)
    for opcode in opcodes:
        kind = _kind(opcode)
        used["issue"] += 1.0
        if kind == "tensor":
            name, products = _products(opcode)
            used[kind] += products / rates.fma[name]
        elif kind in ("shared", "global"):
            per_cycle = rates.shared_bytes if kind == "shared" else rates.global_bytes
            used[kind] += QUARTERS * rates.lanes * _width(opcode) / per_cycle
        elif kind == "integer" and opcode.startswith("s_"):
            used[kind] += 1.0
        elif kind != "wait":
            used[kind] += getattr(rates, kind)
    return used


def described(target: str, code: str, num_warps: int) -> Row:
    """The report's columns: loop, mix, bound, cycles and ns of a pass, tensor_share."""
    loop = inner_loop(code, target.startswith("sm_"))
    if not loop:
        raise ValueError(f"no instruction was read from the code for {target}")
    used = units(target, loop)
    bound = max(used, key=used.__getitem__)
    cycles = used[bound] * num_warps / QUARTERS
    kinds = [_kind(op) for op in loop]
    return {
        "loop": len(loop),
        "mix": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        "bound": bound,
        "cycles": round(cycles),
        "ns": round(cycles / RATES[target].clock, 1),
        "tensor_share": round(used["tensor"] / used[bound], 3),
    }
