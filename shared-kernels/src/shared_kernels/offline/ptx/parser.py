"""PTX text as basic blocks of instructions.

Only what Triton's kernels are made of is read: one `.entry`, register declarations, labels,
instructions with a guard, and scopes `{ ... }` of inline assembly, whose registers get names of
their own. Everything else is an error that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UnsupportedError

# Bits of a fundamental type of PTX (ISA, "Fundamental Types"); a predicate has one.
BITS = {kind + str(bits): bits for kind in "bsuf" for bits in (8, 16, 32, 64)}
BITS.update(pred=1, bf16=16, f16x2=32, bf16x2=32, f32x2=64, tf32=32)

VERSIONS = ((7, 0), (10, 0))  # from, and up to but without

# A name, a number, or names and numbers in braces.
Operand = str | tuple[str, ...]


@dataclass(eq=False)
class Instruction:
    """One instruction; ``form`` is its opcode with every modifier."""

    number: int
    form: str
    operands: tuple[Operand, ...]
    guard: str | None
    is_negated: bool
    text: str
    line: int  # of the PTX
    source: str  # file:line of the kernel's Python

    def __post_init__(self) -> None:
        self.opcode, *modifiers = self.form.split(".")
        self.modifiers = tuple(modifiers)

    def names(self) -> list[str]:
        """Every operand, those in braces and addresses taken apart."""
        flat: list[str] = []
        for operand in self.operands:
            flat += (operand,) if isinstance(operand, str) else operand
        return flat

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) `{self.text}`"


@dataclass(eq=False)
class Block:
    """Instructions that run one after the other; ``next``: [taken, fallen through] or fewer."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Program:
    """A parsed `.entry`."""

    name: str
    target: str
    parameters: list[tuple[str, str]]  # (name, type)
    registers: dict[str, str]  # a register or its prefix -> type
    shared: list[tuple[str, int]]  # (symbol, bytes); dynamic shared memory has 0
    threads: int | None  # .reqntid
    blocks: list[Block]

    def kind(self, register: str) -> str:
        """The declared type of a register."""
        found = self.registers.get(register)
        if found is None:
            prefix = re.match(r"%[A-Za-z_]+", register)
            found = self.registers.get(prefix[0]) if prefix else None
        if found is None:
            raise UnsupportedError(f"{self.name}: {register} is not a declared register")
        return found


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[^{]*)?)\{(.*?)\n\}", re.S)
_STATEMENT = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_NOT_A_BLOCK = ("$L__tmp", "$L__func", "$L__pro", "$L__inl")
# Directives that say nothing of what is computed.
_SILENT = (".loc", ".file", ".pragma", ".section", ".maxntid", ".reqntid", ".minnctapersm")


def operands(text: str) -> tuple[Operand, ...]:
    """``{a, b}, [c + 4], d`` -> ``(("a", "b"), "[c + 4]", "d")``."""
    pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text)
    found: list[Operand] = []
    for piece in (p.strip() for p in pieces):
        if piece.startswith("{"):
            found.append(tuple(x.strip() for x in piece[1:-1].split(",")))
        elif piece:
            found.append(piece)
    return tuple(found)


class _Scopes:
    """The names that scopes of inline assembly declare for themselves."""

    def __init__(self) -> None:
        self.open: list[tuple[int, set[str]]] = []
        self.count = 0

    def enter(self) -> None:
        self.count += 1
        self.open.append((self.count, set()))

    def renamed(self, name: str, number: int) -> str:
        return f"%{name.strip('%')}_of_scope{number}_"

    def apply(self, statement: str) -> str:
        for number, names in reversed(self.open):
            for name in names:
                bare = re.escape(name)
                new = self.renamed(name, number)
                statement = re.sub(rf"(?<![\w%$.]){bare}(?![\w$])", new, statement)
        return statement


def parse(text: str) -> Program:
    """The program of a PTX text.

    Args:
        text: PTX with one `.entry`, of a version from 7.0 to 9.x.

    Returns:
        The program; blocks that nothing reaches are left out.

    Raises:
        UnsupportedError: The text has no entry or several, calls a function, or is too new.
    """
    version = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", text, re.M)
    if version is None:
        raise UnsupportedError("the text has no .version: is it PTX?")
    if not VERSIONS[0] <= (int(version[1]), int(version[2])) < VERSIONS[1]:
        raise UnsupportedError(f"PTX {version[1]}.{version[2]}; versions 7.0 to 9.x are read")
    target = re.search(r"^\s*\.target\s+([\w]+)", text, re.M)
    entries = _ENTRY.findall(text)
    if len(entries) != 1:
        raise UnsupportedError(f"{len(entries)} entries in one PTX text; one is read")
    if re.search(r"^\s*\.(?:visible\s+)?\.?func\b", text, re.M):
        raise UnsupportedError("a .func: calls are not modelled")
    name, parameters, directives, body = entries[0]
    start = text[: text.index(body)].count("\n") + 1
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?", directives)
    program = Program(
        name=name,
        target=target[1] if target else "?",
        parameters=_parameters(parameters),
        registers={},
        shared=[
            (symbol, int(size or 0))
            for symbol, size in re.findall(
                r"^\s*(?:\.\w+\s+)*\.shared\s+[^;\n]*?\.b8\s+([\w$]+)\[(\d*)\]", text, re.M
            )
        ],
        threads=int(threads[1]) if threads else None,
        blocks=[],
    )
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    program.blocks = _linked(_blocks(program, body, start, files))
    return program


def _parameters(text: str) -> list[tuple[str, str]]:
    found = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"\.param\s+\.(\w+)[^\[]*?([\w$]+)", piece)
        if match is None:
            raise UnsupportedError(f"parameter `{piece}`")
        found.append((match[2], match[1]))
    return found


def _declare(program: Program, scopes: _Scopes, kind: str, names: str) -> None:
    for name in (x.strip() for x in names.split(",")):
        numbered = re.fullmatch(r"(%[A-Za-z_]+)<\d+>", name)
        if numbered:
            program.registers[numbered[1]] = kind
        elif scopes.open:
            number, own = scopes.open[-1]
            own.add(name)
            program.registers[scopes.renamed(name, number)] = kind
        else:
            program.registers[name] = kind


def _blocks(program: Program, body: str, first_line: int, files: dict[str, str]) -> list[Block]:
    blocks, scopes, source, waiting, count = [Block("entry")], _Scopes(), "?", "", 0
    for line_number, raw in enumerate(body.split("\n"), first_line):
        line = raw.split("//")[0].strip()
        location = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)
        if location:
            source = f"{files.get(location[1], '?').rsplit('/', 1)[-1]}:{location[2]}"
            continue
        label = re.fullmatch(r"([\w$]+):", line)
        if label:
            if not label[1].startswith(_NOT_A_BLOCK):
                blocks.append(Block(label[1]))
            continue
        if not line or line.startswith(_SILENT):
            continue
        waiting += " " + line
        *statements, waiting = re.split(r";|(?<=\{)(?=\s*\.reg)|(?<=\s\})\s*$", waiting + " ")
        for statement in (s.strip() for s in statements):
            if statement.startswith("}"):
                scopes.open.pop()
                statement = statement[1:].strip()
            if statement.startswith("{"):
                scopes.enter()
                statement = statement[1:].strip()
            if not statement:
                continue
            declared = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
            if declared:
                _declare(program, scopes, declared[1], declared[2])
                continue
            statement = scopes.apply(statement)
            match = _STATEMENT.fullmatch(statement)
            if match is None:
                raise UnsupportedError(f"{program.name}: line {line_number} `{statement}`")
            negated, guard, form, rest = match.groups()
            instruction = Instruction(
                count, form, operands(rest), guard, bool(negated), statement, line_number, source
            )
            count += 1
            blocks[-1].instructions.append(instruction)
            if instruction.opcode in ("bra", "ret", "exit", "trap"):
                blocks.append(Block(f"behind {count - 1}"))
    return blocks


def _linked(blocks: list[Block]) -> list[Block]:
    """Say for each block where it goes; drop what nothing reaches; keep the order of the text."""
    index = {block.label: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        below = [i + 1] if i + 1 < len(blocks) else []
        if last is not None and last.opcode == "bra":
            block.next = [index[str(last.operands[0])]] + (below if last.guard else [])
        elif last is not None and last.opcode in ("ret", "exit", "trap"):
            if last.guard:
                raise UnsupportedError(f"a guarded {last.opcode}: {last}")
        else:
            block.next = below
    reached, waiting = set(), [0]
    while waiting:
        i = waiting.pop()
        if i not in reached:
            reached.add(i)
            waiting += blocks[i].next
    new = {old: i for i, old in enumerate(sorted(reached))}
    for i in new:
        blocks[i].next = [new[j] for j in blocks[i].next]
    return [blocks[i] for i in new]
