"""What the inner loop of a compiled kernel is made of, which unit bounds it, and how long it takes.

The inner loop: of the loops that contain no other, the one with most matrix instructions, then with
most instructions, found in the graph of jumps; each instruction of it counts once, whatever branch
it is on. A kernel without a loop counts as a whole, and its row says so (``looped`` is false).

The model: every unit works at its peak rate, all units overlap, nothing waits. A unit's cycles for
one pass of one warp are the sum over the loop's instructions of what each occupies; the unit with
most cycles bounds the pass, and a program's pass takes these cycles times its warps over the four
quarters of a processor, at the card's boost clock. So a time is a lower bound, and the tensor
unit's share of it an upper bound on how much of the peak the kernel can reach. Memory is counted as
traffic between a processor and its caches: hits, waits, conflicts, what HGMMA reads from shared
memory, subroutines and the main memory's own limit are not in it. A pass is one of the compiled
loop, which may be an unrolled one.

The units are those of the vendors. NVIDIA: ``fma`` (multiply, add, integer multiply-add), ``alu``
(integers, logic, comparison, choice, minimum, packing), ``special``, ``fp64``, ``tensor``,
``shared``, ``global``, and ``issue``, one instruction a cycle. AMD: ``vector`` does all
arithmetic, ``scalar`` what is the same for a whole wave; each takes an instruction every fourth
cycle.

Source: peak rates and boost clocks of the data sheets of A100 and H100 (SXM), RTX PRO 6000
(Blackwell) and MI300X: 312, 989, 504 and 1307 TFLOP/s in bf16 at 1.41, 1.83, 2.6 and 2.1 GHz over
108, 132, 188 and 304 processors. HMMA on Hopper reaches five eighths of HGMMA's rate: Luo et al.,
arXiv:2402.13499. NVIDIA, CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions": a clock and processor of 8.0, 9.0 and 12.0 gives 64, 128 and 128 results in fp32, 32,
64 and 2 in fp64, 64 by integer multiply-add, 16 special ones, 32 shuffled. What goes to which unit:
Nsight Compute, Kernel Profiling Guide, "Pipelines"; that ``alu`` does 128 on 12.0 and 64 before:
RTX Blackwell GPU Architecture (2025). gfx942: passes of four cycles in LLVM's ``SISchedule.td``, 1
for arithmetic, 4 for transcendentals and conversions; ROCm Compute Profiler, "Compute unit".
Shared memory: 32 banks of four bytes on all. Global memory: 64 bytes a cycle between a processor
and the second-level cache (Jia et al., arXiv:1804.06826), on AMD from the vector cache.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .targets import Row

QUARTERS = 4  # schedulers of a streaming multiprocessor, SIMDs of a compute unit
SHORTEST = 4  # a loop of fewer instructions is padding, a trap or a wait
SHARED_BYTES, GLOBAL_BYTES = 128, 64  # per cycle of a processor


@dataclass(frozen=True)
class Rates:
    """Cycles that one instruction of one warp occupies a quarter of the processor.

    Attributes:
        clock: boost clock in GHz.
        products: multiply-adds in fp16 or bf16 per cycle and quarter, by matrix instruction.
        cycles: by the name in the third column of the instruction table below.
        lanes: threads per warp.
    """

    clock: float
    products: dict[str, int]
    cycles: dict[str, float]
    lanes: int = 32


def _nvidia(fma: float, alu: float, fp64: float) -> dict[str, float]:
    return {"fma": fma, "imad": 2, "alu": alu, "special": 8, "fp64": fp64, "issue": 1}


RATES = {
    "sm_80": Rates(1.41, {"HMMA": 256}, _nvidia(2, 2, 4)),
    "sm_90": Rates(1.83, {"HGMMA": 512, "HMMA": 320}, _nvidia(1, 2, 2)),
    "sm_120": Rates(2.6, {"HMMA": 128}, _nvidia(1, 1, 64)),
    "gfx942": Rates(2.1, {"mfma": 256}, {"vector": 4, "special": 16, "scalar": 4}, lanes=64),
}

KINDS = ("tensor", "fp", "fp64", "special", "integer", "scalar", "shared", "global", "wait")

# (opcodes, kind in the mix, what it costs in Rates.cycles, unit), the first that matches.
# Bytes, products and the uniform datapath's instructions have no cycles of their own here.
_NVIDIA: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("HGMMA|HMMA|QMMA|DMMA", "tensor", None, "tensor"),
    (
        "BAR|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|SYNCS|MEMBAR|FENCE|ERRBAR|CCTL|NOP|BRA|BRX|BREAK"
        "|BSYNC|BSSY|BMOV|CALL|RET|EXIT|NANOSLEEP|YIELD",
        "wait",
        None,
        None,
    ),
    ("LDSM|LDS|STSM|STS|ATOMS|SHFL", "shared", None, "shared"),
    (r"LDGSTS|LDG\b|STG|LDL|STL|RED\b|ATOMG|ATOM\b", "global", None, "global"),
    ("U[A-Z]|R2UR|S2UR|S2R|CS2R|LDC|VOTEU", "scalar", None, None),
    ("D(FMA|ADD|MUL|SET|MNMX)", "fp64", "fp64", "fp64"),
    ("MUFU|I2F(?!P)|F2I|F2F(?!P)|I2I|FRND|POPC|FLO|BREV|REDUX", "special", "special", "special"),
    ("FFMA|FMUL|FADD|HFMA|HADD|HMUL|FHADD|FHFMA", "fp", "fma", "fma"),
    ("IMAD|IMUL|IDP", "integer", "imad", "fma"),
    ("F|H|I2FP", "fp", "alu", "alu"),
    ("", "integer", "alu", "alu"),
)
_AMD: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("v_mfma|v_smfmac", "tensor", None, "tensor"),
    (
        "s_(waitcnt|barrier|nop|cbranch|branch|endpgm|sleep|setprio|sched|setpc|swappc|getpc|trap)",
        "wait",
        None,
        None,
    ),
    ("ds_", "shared", None, "shared"),
    ("(global|buffer|flat|scratch)_", "global", None, "global"),
    ("s_", "scalar", "scalar", "scalar"),
    (r"v_\w+_f64|v_cvt_f64", "fp64", "vector", "vector"),
    ("v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_cvt_(?!pk)", "special", "special", "vector"),
    (r"v_\w+_(b?f16|f32)", "fp", "vector", "vector"),
    ("", "integer", "vector", "vector"),
)
_NVIDIA_ENTRIES, _AMD_ENTRIES = (
    [(re.compile(pattern), (kind, cost, unit)) for pattern, kind, cost, unit in table]
    for table in (_NVIDIA, _AMD)
)


@functools.cache
def _entry(opcode: str) -> tuple[str, str | None, str | None]:
    """(kind, cost, unit) of an instruction; NVIDIA's are written in capitals."""
    entries = _NVIDIA_ENTRIES if opcode[0].isupper() else _AMD_ENTRIES
    return next(entry for pattern, entry in entries if pattern.match(opcode))


def _kind(opcode: str) -> str:
    return _entry(opcode)[0]


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
        return 2 if "short" in opcode or "16" in opcode else 1 if re.search("byte|8", opcode) else 4
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
        full = re.search(r"x\d+_?f(32|64)", opcode) is not None and slower == 1  # its operands
        return "mfma", m * n * k * (8 if full else slower)
    if opcode.startswith("HGMMA"):  # four warps issue it together
        return "HGMMA", m * n * k * slower / 4
    return "HMMA", m * n * k * slower


_SASS = re.compile(
    r"^\s*(?:(?P<label>\.L_\w+):)|/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?P<if>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.x]*)(?P<rest>[^;]*)"
)
_GCN = re.compile(
    r"^(?P<label>\.LBB\w+):|^\s+(?P<if>)(?P<opcode>(?:[vs]_|ds_|global_|buffer_|flat_|scratch_)\w+)"
    r"(?P<rest>[^\n;]*)"
)
_TARGET = re.compile(r"\.L(?:_|BB)\w+")
_ENDS = ("EXIT", "RET", "BRX", "s_endpgm", "s_setpc")


def _blocks(code: str, nvidia: bool) -> tuple[list[str], list[tuple[int, int]], list[list[int]]]:
    """Opcodes in order, the blocks (begin, end) they fall into, and who follows each block."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, tuple[str | None, bool]] = {}  # at -> (label, may also go on)
    pattern = _SASS if nvidia else _GCN
    for line in code.splitlines():
        found = pattern.search(line)
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(opcodes)
            continue
        opcode = found["opcode"]
        if opcode.startswith(("BRA", "s_cbranch", "s_branch")):
            to = _TARGET.search(found["rest"])
            # "BRA.U !UP0, `(.L_x_1)" and "BRA.DIV" ask as well, without a predicate in front
            asks = found["if"] or "," in found["rest"] or "cbranch" in opcode or ".DIV" in opcode
            jumps[len(opcodes)] = (to[0] if to else None, bool(asks))
        elif opcode.startswith(_ENDS):
            jumps[len(opcodes)] = (None, bool(found["if"]))
        opcodes.append(opcode)
    starts = {0, len(opcodes), *labels.values(), *(at + 1 for at in jumps)}
    edges = sorted(starts)
    blocks = [(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    number = {a: i for i, (a, _) in enumerate(blocks)}
    following = []
    for _, end in blocks:
        label, goes_on = jumps.get(end - 1, (None, True))
        after = [labels[label]] if label in labels else []
        after += [end] if goes_on else []
        following.append([number[a] for a in after if a in number])
    return opcodes, blocks, following


def _loops(following: list[list[int]]) -> list[set[int]]:
    """The blocks of each natural loop: those between a block and the dominator it jumps back to."""
    before: list[list[int]] = [[] for _ in following]
    reached, left = {0}, [0]
    while left:
        i = left.pop()
        for j in following[i]:
            before[j].append(i)
            if j not in reached:
                reached.add(j)
                left.append(j)
    everything = (1 << len(following)) - 1
    dominators = [1] + [everything] * (len(following) - 1)
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            common = everything
            for j in before[i]:
                common &= dominators[j]
            if (found := common | 1 << i) != dominators[i]:
                dominators[i], changed = found, True
    loops: dict[int, set[int]] = {}
    for i in reached:
        for head in following[i]:
            if not dominators[i] >> head & 1:
                continue
            body, left = loops.setdefault(head, {head}), [i]
            while left:
                block = left.pop()
                if block not in body:
                    body.add(block)
                    left += before[block]
    return list(loops.values())


def inner_loop(code: str, nvidia: bool) -> tuple[list[str], bool]:
    """The opcodes of the inner loop, and True; of the whole kernel if it has none, and False."""
    opcodes, blocks, following = _blocks(code, nvidia)
    if not opcodes:
        return [], False
    loops = [
        body
        for body in _loops(following)
        if sum(b - a for a, b in (blocks[i] for i in body)) > SHORTEST
    ]
    bodies = [
        [op for i in sorted(body) for op in opcodes[slice(*blocks[i])]]
        for body in loops
        if not any(other < body for other in loops)
    ]
    if not bodies:
        whole = len(opcodes)
        while opcodes[whole - 1].startswith(("NOP", "BRA", "s_nop", "s_code_end")) and whole > 1:
            whole -= 1  # padding behind the end
        return opcodes[:whole], False
    most = max(bodies, key=lambda body: (sum(_kind(op) == "tensor" for op in body), len(body)))
    return most, True


def units(target: str, opcodes: list[str]) -> dict[str, float]:
    """Cycles of each unit that is used for one pass of one warp."""
    rates = RATES[target]
    used: dict[str, float] = {}
    for opcode in opcodes:
        _, cost, unit = _entry(opcode)
        if "issue" in rates.cycles:
            used["issue"] = used.get("issue", 0.0) + rates.cycles["issue"]
        if unit is None:
            continue
        if unit == "tensor":
            name, products = _products(opcode)
            cycles = products / rates.products[name]
        elif unit in ("shared", "global"):
            per_cycle = SHARED_BYTES if unit == "shared" else GLOBAL_BYTES
            cycles = QUARTERS * rates.lanes * _width(opcode) / per_cycle
        else:
            cycles = rates.cycles[str(cost)]
        used[unit] = used.get(unit, 0.0) + cycles
    return used


def described(target: str, code: str, num_warps: int) -> Row:
    """The report's columns: loop, looped, mix, bound, cycles and ns of a pass, tensor_share."""
    loop, looped = inner_loop(code, target.startswith("sm_"))
    if not loop:
        raise ValueError(f"no instruction was read from the code for {target}")
    used = units(target, loop)
    bound = max(used, key=used.__getitem__, default="issue")
    slowest = used.get(bound, 0.0)
    cycles = slowest * num_warps / QUARTERS
    kinds = [_kind(op) for op in loop]
    return {
        "loop": len(loop),
        "looped": looped,
        "mix": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        "bound": bound,
        "cycles": round(cycles),
        "ns": round(cycles / RATES[target].clock, 1),
        "tensor_share": round(used.get("tensor", 0.0) / slowest, 3) if slowest else 0.0,
    }
