"""From an instruction to a step: what touches memory, other lanes, or the flow of the program.

Arithmetic comes from the table in `semantics.py`; here are loads and stores, asynchronous copies,
barriers, shuffles and matrices, each as one method named after its opcode that returns a function
of the batch. Every method lists the forms that it knows; all others are errors that name them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import matrices
from .batch import Batch, Copy, InFlight
from .errors import FaultError, UnsupportedError
from .memory import POISON, SHARED_START
from .parser import BITS, Block, Instruction, Operand, Program
from .semantics import TABLE, dtype_of, fma_f32

Array = np.ndarray
Step = Callable[[Batch], None]
Fetch = Callable[[Batch], Array]
Put = Callable[[Batch, Array], None]

_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _unknown(i: Instruction) -> UnsupportedError:
    counts = sorted(n for form, n in TABLE if form == i.form)
    if counts:
        words = " or ".join(map(str, counts))
        return UnsupportedError(
            f"{i.form} with {len(i.operands) - 1} source operands ({words} are known): {i}"
        )
    return UnsupportedError(f"the form {i.form}: {i}")


class Decoder:
    """Decodes the blocks of one program; registers become numbers."""

    def __init__(self, program: Program, shared: int, fused: bool) -> None:
        self.program, self.fused = program, fused
        self.slots: dict[str, int] = {}
        self.parameters = {name: k for k, (name, _) in enumerate(program.parameters)}
        self.symbols, self.shared = {}, max(shared, 16)
        for name, size in program.shared:
            # Dynamic shared memory, the symbol without a size, comes first.
            self.symbols[name] = SHARED_START + (self.shared if size else 0)
            self.shared += size + -size % 128 if size else 0
        sizes = [
            BITS[i.modifiers[-1]] // 8
            for block in program.blocks
            for i in block.instructions
            if i.opcode in ("ld", "st") and i.modifiers[0].startswith("shared")
        ]
        self.grain = min([4, *sizes])
        self._reads: set[int] = set()
        self._writes: set[int] = set()

    def initial(self) -> list[Array]:
        """What registers hold before anybody writes them: a poison."""
        out: list[Any] = [None] * len(self.slots)
        for name, slot in self.slots.items():
            bits = BITS[self.program.kind(name)]
            if bits == 1:
                out[slot] = np.ones((1, 1), bool)
            else:
                out[slot] = np.array([[POISON * 0x100000001 & ((1 << bits) - 1)]], f"u{bits // 8}")
        return out

    # ------------------------------------------------------------------------------- operands

    def slot(self, register: str) -> int:
        if register not in self.slots:
            self.program.kind(register)
            self.slots[register] = len(self.slots)
        return self.slots[register]

    def _read_slot(self, register: str) -> int:
        slot = self.slot(register)
        if slot not in self._writes:
            self._reads.add(slot)
        return slot

    def source(self, operand: Operand, kind: str) -> Fetch:
        """A function that gives the operand as an array of a PTX type."""
        if not isinstance(operand, str):
            raise UnsupportedError(
                f"{self.program.name}: a vector {operand} where one operand is read"
            )
        dtype = dtype_of(kind)
        if re.match(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)\b", operand):
            return lambda S: S.special(operand).astype(dtype, copy=False)
        if operand.startswith("!"):
            inner = self.source(operand[1:], kind)
            return lambda S: ~inner(S)
        if operand.startswith("%"):
            slot, bits = self._read_slot(operand), BITS[self.program.kind(operand)]
            if bits == 8 * dtype.itemsize or bits == 1:

                def fetch(S: Batch) -> Array:
                    x = S.R[slot]
                    return x if x.dtype == dtype else x.view(dtype)

                return fetch
            if bits < 8 * dtype.itemsize:
                raise UnsupportedError(
                    f"{self.program.name}: {operand} of {bits} bits read as {kind}"
                )
            whole, part = np.dtype(f"u{bits // 8}"), np.dtype(f"u{dtype.itemsize}")
            return lambda S: S.R[slot].view(whole).astype(part).view(dtype)
        constant = self._constant(operand, kind)
        return lambda S: constant

    def _constant(self, text: str, kind: str) -> Array:
        dtype = dtype_of(kind)
        if text in self.symbols:
            return np.array([[self.symbols[text]]], dtype)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            value = np.array([[int(text[2:], 16)]], np.uint32)
        elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            value = np.array([[int(text[2:], 16)]], np.uint64)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
            if dtype.kind == "b":
                return np.array([[number != 0]])
            size = dtype.itemsize
            value = np.array([[number & ((1 << 8 * size) - 1)]], f"u{size}")
        else:
            raise UnsupportedError(f"{self.program.name}: the operand {text}")
        return value.view(dtype)

    def number(self, operand: Operand, i: Instruction) -> int:
        """An operand that has to be an immediate."""
        if not isinstance(operand, str) or not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            raise UnsupportedError(f"an operand that is not a number: {i}")
        return int(operand.rstrip("U"), 0)

    def address(self, operand: Operand, kind: str) -> Fetch:
        """[base + offset]."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", str(operand))
        if match is None:
            raise UnsupportedError(f"{self.program.name}: the address {operand}")
        base = self.source(match[1], kind)
        if match[2] is None or int(match[2], 0) == 0:
            return base
        offset = self._constant(match[2], kind)
        return lambda S: base(S) + offset

    def guard(self, i: Instruction) -> Fetch | None:
        if i.guard is None:
            return None
        return self.source(("!" if i.is_negated else "") + i.guard, "pred")

    def target(self, i: Instruction, operand: Operand, kind: str) -> Put:
        """A function that writes the operand, where the guard is true."""
        if not isinstance(operand, str):
            raise UnsupportedError(f"a vector as a result: {i}")
        if operand == "_":
            return lambda S, x: None
        guard = self.guard(i)
        if guard is not None:
            self._read_slot(operand)
        slot, bits = self.slot(operand), BITS[self.program.kind(operand)]
        self._writes.add(slot)
        dtype = dtype_of(kind)
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{max(bits, 8) // 8}")
        if dtype.kind != "b" and bits < 8 * dtype.itemsize:
            raise UnsupportedError(f"a result of {kind} in a register of {bits} bits: {i}")
        widens = dtype.kind != "b" and bits > 8 * dtype.itemsize
        exact = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{dtype.itemsize}")

        def put(S: Batch, x: Array) -> None:
            if widens:
                x = x.view(exact).astype(wide)
            if guard is not None:
                x = np.where(guard(S), x, S.R[slot].view(x.dtype))
            S.R[slot] = x

        return put

    # --------------------------------------------------------------------------------- blocks

    def block(self, block: Block) -> tuple[list[Step], Fetch | None, set[int], set[int]]:
        """(steps, the branch's predicate, registers read before written, registers written)."""
        self._reads, self._writes = set(), set()
        steps, branch = [], None
        instructions, k = block.instructions, 0
        while k < len(instructions):
            i = instructions[k]
            if i.opcode == "mma":
                run = self._run_of_products(instructions, k)
                steps.append(self._named(self._products(run), i))
                k += len(run)
                continue
            k += 1
            if i.opcode == "bra":
                branch = self.guard(i)
                continue
            after = instructions[k] if k < len(instructions) else None
            fused = self._fused(i, after, instructions[k + 1 :]) if self.fused else None
            if fused is not None:
                steps.append(self._named(fused, i))
                k += 1
                continue
            step = self.step(i)
            if step is not None:
                steps.append(self._named(step, i))
        return steps, branch, self._reads, self._writes

    @staticmethod
    def _named(step: Step, i: Instruction) -> Step:
        """The step, whose faults name the instruction."""

        def run(S: Batch) -> None:
            try:
                step(S)
            except FaultError as fault:
                if " at " in str(fault):
                    raise
                raise FaultError(f"{fault}, at {i}") from fault

        return run if i.opcode not in ("mov", "add", "fma", "selp", "setp") else step

    def _fused(
        self, i: Instruction, after: Instruction | None, rest: list[Instruction]
    ) -> Step | None:
        """mul.f32 whose product only the add.f32 behind it uses, rounded once."""
        if (
            after is None
            or (i.form, after.form) != ("mul.f32", "add.f32")
            or i.guard
            or after.guard
        ):
            return None
        product = str(i.operands[0])
        uses = sum(
            product in re.findall(r"%\w+", str(b))
            for x in self.program.blocks
            for y in x.instructions
            for b in [y.text]
        )
        others = [x for x in after.operands[1:] if x != product]
        if len(others) != 1 or uses != 2:
            return None
        a, b = (self.source(x, "f32") for x in i.operands[1:])
        c = self.source(others[0], "f32")
        put = self.target(after, after.operands[0], "f32")
        return lambda S: put(S, fma_f32(a(S), b(S), c(S)))

    def step(self, i: Instruction) -> Step | None:
        method = getattr(self, f"_{i.opcode}", None)
        if method is not None:
            found = method(i)
            if found is not NotImplemented:
                return found
        return self._arithmetic(i)

    def _arithmetic(self, i: Instruction) -> Step:
        form = TABLE.get((i.form, len(i.operands) - 1))
        if form is None:
            raise _unknown(i)
        sources = [
            self.source(x, kind) for x, kind in zip(i.operands[1:], form.sources, strict=True)
        ]
        compute, kinds = form.compute, form.result.split()
        if len(kinds) == 2:
            names = str(i.operands[0]).split("|")
            puts = [self.target(i, name, kind) for name, kind in zip(names, kinds, strict=False)]

            def two(S: Batch) -> None:
                for put, x in zip(puts, compute(*(f(S) for f in sources)), strict=False):
                    put(S, x)

            return two
        if "|" in str(i.operands[0]):
            raise _unknown(i)
        put = self.target(i, i.operands[0], form.result)
        if len(sources) == 1:
            (a,) = sources
            return lambda S: put(S, compute(a(S)))
        if len(sources) == 2:
            a, b = sources
            return lambda S: put(S, compute(a(S), b(S)))
        if len(sources) == 3:
            a, b, c = sources
            return lambda S: put(S, compute(a(S), b(S), c(S)))
        return lambda S: put(S, compute(*(f(S) for f in sources)))

    # ------------------------------------------------------------------------ moves and the end

    def _mov(self, i: Instruction) -> Step | Any:
        """Packing and unpacking; the first element is the lowest."""
        target, source = i.operands
        if isinstance(source, tuple):
            part = f"b{BITS[i.modifiers[-1]] // len(source)}"
            fetches = [self.source(x, part) for x in source]
            put, dtype = self.target(i, target, i.modifiers[-1]), dtype_of(i.modifiers[-1])

            def pack(S: Batch) -> None:
                parts = np.broadcast_arrays(*(f(S) for f in fetches))
                put(S, np.stack(parts, -1).view(dtype)[..., 0])

            return pack
        if isinstance(target, tuple):
            part = f"b{BITS[i.modifiers[-1]] // len(target)}"
            fetch, dtype = self.source(source, i.modifiers[-1]), dtype_of(part)
            puts = [self.target(i, x, part) for x in target]

            def unpack(S: Batch) -> None:
                parts = np.ascontiguousarray(fetch(S))[..., None].view(dtype)
                for k, put in enumerate(puts):
                    put(S, parts[..., k])

            return unpack
        return NotImplemented

    def _ret(self, i: Instruction) -> Step | None:
        return None

    _exit = _ret

    def _trap(self, i: Instruction) -> Step:
        def trap(S: Batch) -> None:
            raise FaultError("trap")

        return trap

    # -------------------------------------------------------------------------------- memory

    def _vector(self, i: Instruction, operand: Operand) -> tuple[str, ...]:
        """The registers of a (vector) load or store, as many as its .v2 or .v4 says."""
        names = operand if isinstance(operand, tuple) else (operand,)
        stated = {"v2": 2, "v4": 4, "v8": 8}.get(i.modifiers[-2] if len(i.modifiers) > 1 else "", 1)
        if stated != len(names):
            raise UnsupportedError(f"{len(names)} registers for {i.form}: {i}")
        return names

    def _space(self, i: Instruction, more: tuple[str, ...] = ()) -> str:
        space, *rest = i.modifiers[:-1]
        space = space.split("::")[0]
        known = {"v2", "v4", "v8", *more}
        if (
            space not in ("global", "shared", "param")
            or set(rest) - known
            or i.modifiers[-1] not in BITS
        ):
            raise _unknown(i)
        return space

    def _ld(self, i: Instruction) -> Step:
        kind = i.modifiers[-1]
        space = self._space(i, ("evict_last", "evict_first", "L1::evict_last", "L1::evict_first"))
        if len(i.operands) != 2:
            raise _unknown(i)
        if space == "param":
            match = re.fullmatch(r"\[\s*([\w$]+)\s*\]", str(i.operands[1]))
            if match is None or match[1] not in self.parameters:
                raise UnsupportedError(f"the parameter {i.operands[1]}: {i}")
            index, put = self.parameters[match[1]], self.target(i, i.operands[0], kind)
            declared = BITS[self.program.parameters[index][1]]
            dtype, whole = dtype_of(kind), np.dtype(f"u{declared // 8}")
            unsigned = np.dtype(f"u{dtype.itemsize}")
            if declared < BITS[kind]:
                raise UnsupportedError(f"a parameter of {declared} bits read as {kind}: {i}")
            return lambda S: put(S, S.parameters[index].view(whole).astype(unsigned).view(dtype))
        names = self._vector(i, i.operands[0])
        size, count = BITS[kind] // 8, len(names)
        address = self.address(i.operands[1], "u64" if space == "global" else "u32")
        guard = self.guard(i)
        puts = [self.target(i, name, kind) for name in names]
        dtype = dtype_of(kind)
        load = _load_global if space == "global" else _load_shared

        def step(S: Batch) -> None:
            mask = None if guard is None else guard(S)
            for put, x in zip(puts, load(S, i, address(S), mask, size, count), strict=True):
                put(S, x.view(dtype))

        return step

    def _st(self, i: Instruction) -> Step:
        kind, space = i.modifiers[-1], self._space(i)
        if len(i.operands) != 2 or space == "param":
            raise _unknown(i)
        names, size = self._vector(i, i.operands[1]), BITS[kind] // 8
        address = self.address(i.operands[0], "u64" if space == "global" else "u32")
        guard, fetches = self.guard(i), [self.source(x, f"b{8 * size}") for x in names]
        store = _store_global if space == "global" else _store_shared

        def step(S: Batch) -> None:
            mask = None if guard is None else guard(S)
            store(S, i, address(S), mask, size, [f(S) for f in fetches])

        return step

    def _atom(self, i: Instruction) -> Step:
        """atom and red on global memory, lane after lane."""
        known = {
            "global",
            "gpu",
            "cta",
            "sys",
            "relaxed",
            "acq_rel",
            "acquire",
            "release",
            *_REDUCTIONS,
            "exch",
            "cas",
        }
        kind = i.modifiers[-1]
        names = [m for m in i.modifiers if m in (*_REDUCTIONS, "exch", "cas")]
        returns = i.opcode == "atom"
        needed = (3 if returns else 2) + (names == ["cas"])
        if (
            set(i.modifiers[:-1]) - known
            or len(names) != 1
            or "global" not in i.modifiers
            or len(i.operands) != needed
        ):
            raise _unknown(i)
        rest = i.operands[1:] if returns else i.operands
        address, values = self.address(rest[0], "u64"), [self.source(x, kind) for x in rest[1:]]
        guard = self.guard(i)
        put = self.target(i, i.operands[0], kind) if returns else None
        size, operation = BITS[kind] // 8, names[0]
        is_float = kind[0] == "f" or kind.startswith("bf")

        def step(S: Batch) -> None:
            mask = np.ones((1, 1), bool) if guard is None else guard(S)
            active = S.spread(mask)
            where = S.spread(address(S)).astype(np.int64)[active]
            given = [S.spread(v(S))[active] for v in values]
            if S.sanitizer is not None and is_float and operation == "add":
                S.sanitizer.float_atomic(i, where)
            old = np.zeros(len(where), given[0].dtype)
            for lane in range(len(where)):
                at = where[lane : lane + 1]
                (now,), bad = S.memory.load(at, size, 1)
                if bad is not None:
                    raise FaultError(f"out of bounds: {S.memory.place(int(at[0]))}")
                old[lane : lane + 1] = now.view(old.dtype)
                if operation == "cas":
                    new = (
                        given[1][lane : lane + 1]
                        if old[lane] == given[0][lane]
                        else old[lane : lane + 1]
                    )
                elif operation == "exch":
                    new = given[0][lane : lane + 1]
                else:
                    new = _REDUCTIONS[operation](old[lane : lane + 1], given[0][lane : lane + 1])
                S.memory.store(at, [np.ascontiguousarray(new).view(f"u{size}")], size)
            if put is not None:
                out = np.zeros(S.shape, old.dtype)
                out.reshape(-1)[active] = old
                put(S, out)

        return step

    _red = _atom

    def _cp(self, i: Instruction) -> Step:
        if i.form == "cp.async.commit_group" and not i.operands:
            return _commit_copies
        if i.form in ("cp.async.wait_group", "cp.async.wait_all"):
            left = self.number(i.operands[0], i) if i.operands else 0
            return lambda S: _wait_copies(S, left)
        if i.form not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global") or len(
            i.operands
        ) not in (3, 4):
            raise _unknown(i)
        to, source = self.address(i.operands[0], "u32"), self.address(i.operands[1], "u64")
        size = self.number(i.operands[2], i)
        if size not in (4, 8, 16):
            raise _unknown(i)
        taken = self.source(i.operands[3], "u32") if len(i.operands) == 4 else None
        guard = self.guard(i)

        def step(S: Batch) -> None:
            S.whole(i.form)
            mask = np.broadcast_to(np.ones((1, 1), bool) if guard is None else guard(S), S.shape)
            flat = S.spread(mask)
            given = np.broadcast_to(np.uint32(size) if taken is None else taken(S), S.shape)
            if (given[mask] > size).any():
                raise FaultError(f"cp.async takes more than its {size} bytes")
            destination = np.broadcast_to(to(S), S.shape)
            place = S.shared.offset(
                destination.reshape(-1)[flat], S.spread(S.row)[flat], size, i.form
            )
            if S.sanitizer is not None:
                S.sanitizer.touch(S.shadow, "issue", i, place, S.spread(S.tid)[flat] // 32, size)
            copy = Copy(
                destination=destination,
                source=np.broadcast_to(source(S), S.shape),
                mask=mask,
                taken=given,
                size=size,
                instruction=i,
            )
            S.open_copies = [*S.open_copies, copy]

        return step

    # -------------------------------------------------------------------------- between threads

    def _bar(self, i: Instruction) -> Step:
        if i.form == "bar.warp.sync":
            return lambda S: None
        if (
            i.form not in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.sync.aligned")
            or i.guard
            or len(i.operands) != 1
        ):
            raise _unknown(i)
        self.number(i.operands[0], i)

        def step(S: Batch) -> None:
            if S.lanes is not None and len(S.lanes) % S.threads:
                raise FaultError("divergent: not every thread of the CTA reaches this barrier")
            if S.sanitizer is not None:
                S.sanitizer.barrier(S.shadow)

        return step

    _barrier = _bar

    def _shfl(self, i: Instruction) -> Step:
        mode = i.modifiers[1] if len(i.modifiers) == 3 else ""
        if (
            i.form != f"shfl.sync.{mode}.b32"
            or mode not in ("bfly", "idx", "up", "down")
            or len(i.operands) != 5
        ):
            raise _unknown(i)
        names = str(i.operands[0]).split("|")
        a, b, c = (self.source(x, "b32") for x in i.operands[1:4])
        put = self.target(i, names[0], "b32")
        valid = self.target(i, names[1], "pred") if len(names) == 2 else None
        lane = np.arange(32)

        def step(S: Batch) -> None:
            values = S.by_warps(a(S), i.form)
            by = S.by_warps(b(S), i.form).astype(np.int64) & 31
            clamp = S.by_warps(c(S), i.form).astype(np.int64)
            segment, bound = (clamp >> 8) & 31, clamp & 31
            low = lane & segment
            high = low | (bound & ~segment)
            if mode == "up":
                source = lane - by
                inside = source >= high
            else:
                source = {"bfly": lane ^ by, "idx": low | (by & ~segment), "down": lane + by}[mode]
                inside = source <= high
            source = np.where(inside, source, lane)
            put(S, S.from_warps(np.take_along_axis(values, source, 1)))
            if valid is not None:
                valid(S, S.from_warps(inside))

        return step

    def _redux(self, i: Instruction) -> Step:
        operation = i.modifiers[1] if len(i.modifiers) == 3 else ""
        kind = i.modifiers[-1]
        if (
            i.form != f"redux.sync.{operation}.{kind}"
            or operation not in _REDUCTIONS
            or len(i.operands) != 3
        ):
            raise _unknown(i)
        if kind not in ("s32", "u32", "b32"):
            raise _unknown(i)
        a, put, reduce = (
            self.source(i.operands[1], kind),
            self.target(i, i.operands[0], kind),
            _REDUCTIONS[operation],
        )

        def step(S: Batch) -> None:
            values = S.by_warps(a(S), i.form)
            out = reduce.reduce(values, axis=1, keepdims=True, dtype=values.dtype)
            put(S, S.from_warps(np.broadcast_to(out, values.shape)))

        return step

    def _vote(self, i: Instruction) -> Step:
        known = {
            "vote.sync.any.pred": lambda w: w.any(1, keepdims=True),
            "vote.sync.all.pred": lambda w: w.all(1, keepdims=True),
            "vote.sync.uni.pred": lambda w: w.all(1, keepdims=True) | ~w.any(1, keepdims=True),
            "vote.sync.ballot.b32": lambda w: (
                w.astype(np.uint32) << np.arange(32, dtype=np.uint32)
            ).sum(1, keepdims=True, dtype=np.uint32),
        }
        if i.form not in known or len(i.operands) != 3:
            raise _unknown(i)
        p, put, count = (
            self.source(i.operands[1], "pred"),
            self.target(i, i.operands[0], i.modifiers[-1]),
            known[i.form],
        )

        def step(S: Batch) -> None:
            votes = S.by_warps(p(S), i.form)
            put(S, S.from_warps(np.broadcast_to(count(votes), votes.shape)))

        return step

    def _fence(self, i: Instruction) -> Step | None:
        if i.form == "fence.proxy.async.shared::cta":
            return lambda S: S.sanitizer.proxy_fence(S.shadow) if S.sanitizer is not None else None
        if i.form in (
            "membar.gl",
            "membar.cta",
            "fence.acq_rel.gpu",
            "fence.acq_rel.cta",
            "fence.sc.gpu",
        ):
            return lambda S: None
        raise _unknown(i)

    _membar = _fence

    # ------------------------------------------------------------------------------- matrices

    def _ldmatrix(self, i: Instruction) -> Step:
        match = re.fullmatch(
            r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", i.form
        )
        names = i.operands[0] if isinstance(i.operands[0], tuple) else ()
        if match is None or i.guard or len(names) != int(match[1]):
            raise _unknown(i)
        count, is_transposed = int(match[1]), match[2] is not None
        address, puts = (
            self.address(i.operands[1], "u32"),
            [self.target(i, x, "b32") for x in names],
        )

        def step(S: Batch) -> None:
            place = _matrix_rows(S, i, address(S), count, "load")
            lines = S.shared.view(8).reshape(-1, 2)[place // 16]
            rows = lines.view(np.uint16).reshape(len(place), count, 8, 8)
            for put, words in zip(puts, matrices.ldmatrix(rows, is_transposed), strict=True):
                put(S, S.from_warps(words))

        return step

    def _stmatrix(self, i: Instruction) -> Step:
        match = re.fullmatch(
            r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", i.form
        )
        names = i.operands[1] if isinstance(i.operands[1], tuple) else ()
        if match is None or i.guard or len(names) != int(match[1]):
            raise _unknown(i)
        count, is_transposed = int(match[1]), match[2] is not None
        address, fetches = (
            self.address(i.operands[0], "u32"),
            [self.source(x, "b32") for x in names],
        )

        def step(S: Batch) -> None:
            words = np.stack([S.by_warps(f(S), i.form) for f in fetches])
            place = _matrix_rows(S, i, address(S), count, "store")
            rows = matrices.stmatrix(words, is_transposed).reshape(len(place), 8 * count, 8)
            S.shared.view(2).reshape(-1, 8)[place // 16] = rows

        return step

    def _run_of_products(self, instructions: list[Instruction], k: int) -> list[Instruction]:
        """Consecutive mma of one form that read nothing but accumulators of each other."""
        run: list[Instruction] = []
        made: set[str] = set()
        read: set[str] = set()
        for i in instructions[k:]:
            if i.form != instructions[k].form or i.guard or len(i.operands) != 4:
                break
            d, a, b, c = ({x} if isinstance(x, str) else set(x) for x in i.operands)
            if (a | b) & made or (d & (read | made) and d != c):
                break
            run.append(i)
            made |= d
            read |= a | b | c
        return run or [instructions[k]]

    def _products(self, run: list[Instruction]) -> Step:
        match = re.fullmatch(
            r"mma\.sync\.aligned\.m16n8k(?:16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)|8\.row\.col\.f32\.(tf32\.tf32))\.f32",
            run[0].form,
        )
        if match is None or run[0].guard or len(run[0].operands) != 4:
            raise _unknown(run[0])
        kind = (match[1] or match[2]).split(".")[0]
        a_names: dict[Operand, int] = {}
        b_names: dict[Operand, int] = {}
        for i in run:
            widths = [len(x) if isinstance(x, tuple) else 0 for x in i.operands]
            if widths != [4, 4, 2, 4]:
                raise _unknown(i)
            a_names.setdefault(i.operands[1], len(a_names))
            b_names.setdefault(i.operands[2], len(b_names))
        a_fetch = [self.source(x, "b32") for names in a_names for x in names]
        b_fetch = [self.source(x, "b32") for names in b_names for x in names]
        c_fetch, puts = [], []
        for i in run:
            c_fetch.append([self.source(x, "f32") for x in i.operands[3]])
            puts.append([self.target(i, x, "f32") for x in i.operands[0]])
        a_of = [a_names[i.operands[1]] for i in run]
        b_of = [b_names[i.operands[2]] for i in run]

        def gathered(S: Batch, fetches: list[Fetch], each: int) -> Array:
            out = np.empty((len(fetches), *S.shape), np.uint32)
            for k, fetch in enumerate(fetches):
                out[k] = fetch(S)
            return out.reshape(-1, each, S.shape[0] * S.shape[1] // 32, 32)

        def step(S: Batch) -> None:
            S.by_warps(np.zeros((1, 1)), run[0].form)
            A = matrices.a_tiles(gathered(S, a_fetch, 4), kind)
            B = matrices.b_tiles(gathered(S, b_fetch, 2), kind)
            products = matrices.c_registers(A[a_of] @ B[b_of])
            for n in range(len(run)):
                old = [fetch(S) for fetch in c_fetch[n]]
                for r in range(4):
                    puts[n][r](S, products[n, r].reshape(S.shape) + old[r])

        return step

    def _wgmma(self, i: Instruction) -> Step | None:
        if i.form == "wgmma.fence.sync.aligned":
            return lambda S: None
        if i.form == "wgmma.commit_group.sync.aligned":
            return _commit_products
        if i.form == "wgmma.wait_group.sync.aligned":
            left = self.number(i.operands[0], i)
            return lambda S: _wait_products(S, left)
        match = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16\.bf16|f16\.f16|tf32\.tf32)",
            i.form,
        )
        if match is None or i.guard:
            raise _unknown(i)
        n, kind = int(match[1]), match[3].split(".")[0]
        size, deep, widen = matrices.KINDS[kind]
        d, a, b, scale, *flags = i.operands
        from_registers = isinstance(a, tuple)
        transposable = (0 if kind == "tf32" else 2) - (from_registers and kind != "tf32")
        if (
            not isinstance(d, tuple)
            or len(d) != n // 2
            or int(match[2]) != deep
            or len(flags) != 2 + transposable
        ):
            raise _unknown(i)
        signs = [self.number(x, i) for x in flags[:2]]
        transposes = [self.number(x, i) for x in flags[2:]]
        if set(signs) - {1, -1} or set(transposes) - {0, 1}:
            raise _unknown(i)
        transposes = ([0] * 2 + transposes)[-2:]
        a_fetch = [self.source(x, "b32") for x in a] if from_registers else [self.source(a, "b64")]
        b_fetch, is_added = self.source(b, "b64"), self.source(scale, "pred")
        d_slots = [self._read_slot(x) for x in d]
        self._writes.update(d_slots)

        def step(S: Batch) -> None:
            S.whole(i.form)
            if S.threads % 128:
                raise FaultError(f"wgmma with {S.threads} threads; it takes groups of 128")
            groups = S.shape[0] * S.threads // 128
            places: list[Array] = []
            if from_registers:
                registers = np.empty((4, *S.shape), np.uint32)
                for r, fetch in enumerate(a_fetch):
                    registers[r] = fetch(S)
                A = matrices.wgmma_a(registers.reshape(4, groups, 128), kind)
            else:
                raw, place = _operand(S, i, a_fetch[0](S), 64, deep, transposes[0], size)
                places.append(place)
                A = widen(raw)
            raw, place = _operand(S, i, b_fetch(S), n, deep, transposes[1], size)
            places.append(place)
            product = A @ widen(raw).swapaxes(1, 2)
            if signs[0] * signs[1] < 0:
                product = -product
            made = matrices.wgmma_registers(product).reshape(n // 2, *S.shape)
            adds = is_added(S)
            for slot, value in zip(d_slots, made, strict=True):
                if adds.any():
                    old = S.R[slot]
                    old = old.value if isinstance(old, InFlight) else old.view(np.float32)
                    value = np.where(adds, old + value, value)
                S.R[slot] = InFlight(value, i)
            S.open_products = [*S.open_products, (d_slots, places)]
            if S.sanitizer is not None:
                for place in places:
                    S.sanitizer.hold(S.shadow, place, True)

        return step


# ----------------------------------------------------------------------- what steps have in common


def _active(S: Batch, address: Array, mask: Array | None) -> tuple[Array, Array]:
    """(flat mask or all, flat addresses of the active lanes)."""
    flat = S.spread(address).astype(np.int64)
    if mask is None:
        return np.ones(flat.shape, bool), flat
    active = S.spread(mask)
    return active, flat[active]


def _check_global(S: Batch, i: Instruction, where: Array, size: int) -> None:
    if (where & (size - 1)).any():
        raise FaultError(f"misaligned: {i.form} at an address that {size} does not divide")


def _load_global(
    S: Batch, i: Instruction, address: Array, mask: Array | None, size: int, count: int
) -> list[Array]:
    shape = S.shape
    if mask is None and address.shape == (1, 1):
        where, active = address.reshape(-1).astype(np.int64), None
    else:
        active, where = _active(S, address, mask)
    if not len(where):
        return [np.zeros((1, 1), f"u{size}")] * count
    _check_global(S, i, where, size * count)
    if S.sanitizer is not None:
        S.sanitizer.global_read(S.memory, i, where, size * count)
    if S.counters is not None and S.lanes is None and active is not None:
        S.counters.global_access(
            str(i.source), i, S.spread(address).astype(np.int64), active, size * count
        )
    values, bad = S.memory.load(where, size, count)
    if bad is not None:
        _out_of_bounds(S, i, where[bad], size * count)
    if active is None:
        return [v.reshape(1, 1) for v in values]
    if mask is None:
        return [v.reshape(shape) for v in values]
    out = []
    for value in values:
        full = np.zeros(active.shape, value.dtype)
        full[active] = value
        out.append(full.reshape(shape))
    return out


def _out_of_bounds(S: Batch, i: Instruction, where: Array, size: int) -> None:
    text = f"{len(where)} lanes, e.g. {S.memory.place(int(where[0]))}"
    if S.sanitizer is None:
        raise FaultError(f"out of bounds: {text}")
    S.sanitizer.report("out of bounds", i, text)


def _store_global(
    S: Batch, i: Instruction, address: Array, mask: Array | None, size: int, values: list[Array]
) -> None:
    active, where = _active(S, address, mask)
    if not len(where):
        return
    _check_global(S, i, where, size * len(values))
    if S.counters is not None and S.lanes is None:
        S.counters.global_access(
            str(i.source), i, S.spread(address).astype(np.int64), active, size * len(values)
        )
    bad = S.memory.store(where, [S.spread(v)[active] for v in values], size)
    if bad is not None:
        _out_of_bounds(S, i, where[bad], size * len(values))


def _shared_places(
    S: Batch, i: Instruction, address: Array, mask: Array | None, size: int, what: str
) -> tuple[Array, Array]:
    active, where = _active(S, address, mask)
    place = S.shared.offset(where, S.spread(S.row)[active], size, i.form)
    if S.sanitizer is not None:
        warp = S.spread(S.tid)[active] // np.uint32(32)
        S.sanitizer.touch(S.shadow, what, i, place, warp, size)
    if S.counters is not None and S.lanes is None:
        S.counters.shared_access(str(i.source), i, S.spread(address).astype(np.int64), active, size)
    return active, place


def _load_shared(
    S: Batch, i: Instruction, address: Array, mask: Array | None, size: int, count: int
) -> list[Array]:
    active, place = _shared_places(S, i, address, mask, size * count, "load")
    view, index = S.shared.view(size), place // size
    if mask is None:
        return [view[index + j].reshape(S.shape) for j in range(count)]
    out = []
    for j in range(count):
        full = np.zeros(active.shape, view.dtype)
        full[active] = view[index + j]
        out.append(full.reshape(S.shape))
    return out


def _store_shared(
    S: Batch, i: Instruction, address: Array, mask: Array | None, size: int, values: list[Array]
) -> None:
    active, place = _shared_places(S, i, address, mask, size * len(values), "store")
    view, index = S.shared.view(size), place // size
    for j, value in enumerate(values):
        view[index + j] = S.spread(value)[active]


def _matrix_rows(S: Batch, i: Instruction, address: Array, count: int, what: str) -> Array:
    """(warps, 8 * count) places of the rows that the first lanes name."""
    rows = S.by_warps(address, i.form)[:, : 8 * count].astype(np.int64)
    cta = S.by_warps(S.row, i.form)[:, : 8 * count]
    place = S.shared.offset(rows, cta, 16, i.form)
    if S.sanitizer is not None:
        warp = S.by_warps(S.tid, i.form)[:, : 8 * count] // np.uint32(32)
        S.sanitizer.touch(S.shadow, what, i, place.reshape(-1), warp.reshape(-1), 16)
    if S.counters is not None:
        flat = np.ascontiguousarray(rows).reshape(-1)
        S.counters.shared_access(str(i.source), i, flat, np.ones(flat.shape, bool), 16)
    return place


def _operand(
    S: Batch, i: Instruction, descriptor: Array, rows: int, deep: int, is_transposed: int, size: int
) -> tuple[Array, Array]:
    """(groups, rows, deep) raw elements that the descriptors name, and their places."""
    threads = np.broadcast_to(descriptor, S.shape).reshape(-1, 128)
    if (threads != threads[:, :1]).any():
        raise FaultError("wgmma: the threads of a group disagree on a descriptor")
    address = matrices.operand_bytes(threads[:, 0], rows, deep, bool(is_transposed), size)
    row = np.broadcast_to(S.row, S.shape).reshape(-1, 128)[:, 0][:, None, None]
    place = S.shared.offset(address, row, size, i.form)
    if S.sanitizer is not None:
        flat = place.reshape(len(place), -1)
        first = S.spread(np.broadcast_to(S.tid, S.shape)).reshape(-1, 128)[:, 0] // np.uint32(32)
        for quarter in range(4):
            warp = np.repeat(first + np.uint32(quarter), flat.shape[1])
            S.sanitizer.touch(S.shadow, "operand", i, flat.reshape(-1), warp, size)
    return S.shared.view(size)[place // size], place.reshape(-1)


def _commit_copies(S: Batch) -> None:
    S.copy_groups, S.open_copies = [*S.copy_groups, S.open_copies], []


def _wait_copies(S: Batch, left: int) -> None:
    """The oldest groups land, until `left` are on their way."""
    while len(S.copy_groups) > left:
        group, *S.copy_groups = S.copy_groups
        for copy in group:
            _land(S, copy)


def _land(S: Batch, copy: Copy) -> None:
    i, size = copy.instruction, copy.size
    active = copy.mask.reshape(-1)
    place = S.shared.offset(
        copy.destination.reshape(-1)[active], S.spread(S.row)[active], size, i.form
    )
    if S.sanitizer is not None:
        S.sanitizer.touch(
            S.shadow, "land", i, place, S.spread(S.tid)[active] // np.uint32(32), size
        )
    taken = copy.taken.reshape(-1)
    if ((taken[active] != 0) & (taken[active] != size)).any():
        raise UnsupportedError(f"a copy of a part of its {size} bytes: {i}")
    words = _load_global(S, i, copy.source, (copy.mask & (copy.taken == size)), 4, size // 4)
    view = S.shared.view(4)
    for j, word in enumerate(words):
        view[place // 4 + j] = S.spread(word)[active]


def _commit_products(S: Batch) -> None:
    S.product_groups, S.open_products = [*S.product_groups, S.open_products], []


def _wait_products(S: Batch, left: int) -> None:
    """The accumulators of the oldest groups may be used, until `left` groups are on their way."""
    while len(S.product_groups) > left:
        group, *S.product_groups = S.product_groups
        waiting = {
            s for later in (*S.product_groups, S.open_products) for slots, _ in later for s in slots
        }
        for slots, places in group:
            for slot in slots:
                if isinstance(S.R[slot], InFlight) and slot not in waiting:
                    S.R[slot] = S.R[slot].value
            if S.sanitizer is not None:
                for place in places:
                    S.sanitizer.hold(S.shadow, place, False)
