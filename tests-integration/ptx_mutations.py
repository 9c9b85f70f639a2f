"""Faults put into real compiled kernels, one place at a time, and what is told of them.

`python tests-integration/ptx_mutations.py` breaks every place again and writes the committed
result, `benchmarks/results/mutations.json`, and the table of docs/shared-kernels/compiled.md.
A fault may be harmless where it stands: a barrier behind the last use of what it guards, a wait for
a copy that a later wait covers. So each row counts the places that were broken and those that were
told.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from shared_kernels.offline.ptx import FaultError, Sanitizer, executing

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"
PAGE = ROOT / "docs" / "shared-kernels" / "compiled.md"
# Lines of the page between which the table stands.
BEGIN, END = "<!-- mutations -->", "<!-- end of mutations -->"
# Places of a kernel that are broken for one row, spread over its text from the end.
PLACES = 3


class Fault(NamedTuple):
    """Where a pattern is found, `instead` stands there; then `kind` has to be told."""

    pattern: str
    instead: str
    kind: str


GUARD = r"(?:@!?%p\d+ )?"
# Half of each warp goes around an instruction.
PARTED = "@%parted bra $around;\n{}\n$around:"

FAULTS = {
    "a barrier dropped": Fault(r"^\s*bar\.sync\s+0;", "", "race"),
    "a barrier that half of the threads pass by": Fault(
        r"^(\s*bar\.sync\s+0;)", PARTED.format(r"\1"), "divergent"
    ),
    "a shuffle that half of a warp passes by": Fault(
        r"^(\s*shfl\.sync[^;]*;)", PARTED.format(r"\1"), "divergent"
    ),
    "a wait for copies dropped": Fault(r"^\s*cp\.async\.wait_group\s+\d+;", "", "missing wait"),
    "a wait that leaves a group of copies": Fault(
        r"^(\s*cp\.async\.wait_group)\s+\d+;", r"\1 9;", "missing wait"
    ),
    "a group of copies not committed": Fault(
        r"^\s*cp\.async\.commit_group\s*;", "", "missing wait"
    ),
    "a copy without its limit": Fault(
        r"^(\s*cp\.async\.c[ag]\.shared\.global .*?), %r\d+;", r"\1;", "out of bounds"
    ),
    "a copy to an odd place": Fault(
        r"^(\s*cp\.async\.c[ag]\.shared\.global \[ %r\d+) \+ \d+", r"\1 + 4", "misaligned"
    ),
    "a store to shared memory dropped": Fault(rf"^\s*{GUARD}st\.shared[^;]*;", "", "uninitialised"),
    "a load of shared memory at an odd place": Fault(
        r"^(\s*ld\.shared[^\[]*\[%r\d+)(?:\+\d+)?\]", r"\1+2]", "misaligned"
    ),
    "a load beyond shared memory": Fault(
        r"^(\s*ld\.shared[^\[]*\[%r\d+)(?:\+\d+)?\]", r"\1+1048576]", "out of bounds"
    ),
    "a matrix loaded at an odd place": Fault(
        r"^(\s*ldmatrix[^\[]*\[%r\d+)(?:\+\d+)?\]", r"\1+8]", "misaligned"
    ),
    "a load of global memory without its mask": Fault(
        r"^(\s*)@!?%p\d+ (ld\.global[^;]*;)", r"\1\2", "out of bounds"
    ),
    "a load of global memory far off": Fault(
        rf"^(\s*{GUARD}ld\.global[^\[]*\[ %rd\d+) \+ \d+", r"\1 + 1073741824", "out of bounds"
    ),
    "a load of global memory at an odd place": Fault(
        rf"^(\s*{GUARD}ld\.global[^\[]*\[ %rd\d+) \+ \d+", r"\1 + 1", "misaligned"
    ),
    "a store to global memory without its mask": Fault(
        r"^(\s*)@!?%p\d+ (st\.global[^;]*;)", r"\1\2", "out of bounds"
    ),
    "a store to global memory dropped": Fault(rf"^\s*{GUARD}st\.global[^;]*;", "", "uninitialised"),
    "stores that become sums of one word": Fault(
        rf"^(\s*)({GUARD})st\.global\.b32 \[ (%rd\d+) \+ \d+ \], \{{ (%r\d+) \}};",
        r"\1and.b64 %word, \3, -64;\n\1\2red.global.add.f32 [%word], \4;",
        "non-deterministic atomic",
    ),
    "a wait for wgmma dropped": Fault(r"^\s*wgmma\.wait_group[^;]*;", "", "missing wait"),
    "a group of wgmma not committed": Fault(r"^\s*wgmma\.commit_group[^;]*;", "", "missing wait"),
    "a proxy fence dropped": Fault(r"^\s*fence\.proxy[^;]*;", "", "missing proxy fence"),
}
# The registers that broken instructions need; every thread has half of its warp beside it.
REGISTERS = """
    .reg .pred %parted; .reg .b32 %half; .reg .b64 %word;
    mov.u32 %half, %laneid;
    setp.lt.u32 %parted, %half, 16;
"""


def _rows() -> None:
    from diffmax import diffmax_bisect

    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    diffmax_bisect(x, 0.5, backend="triton")


def _heads(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, n, 64, generator=generator).bfloat16() for n in lengths]


def _attention() -> None:
    from adasplash import adasplash

    adasplash(*_heads(64, 150, 150), alpha=1.5, backend="triton")


def _gradients() -> None:
    from adasplash import adasplash

    q, k, v = (x.requires_grad_() for x in _heads(64, 70, 70))
    adasplash(q, k, v, alpha=1.5, backend="triton").float().square().sum().backward()


def _landmarks() -> None:
    from dsalt.kernels import dsalt_attention, select_landmarks

    q, k, v = _heads(100, 100, 100)
    importance = torch.arange(100.0).view(1, 1, 100) % 7
    landmarks = select_landmarks(importance, 16, landmark_block=32)
    windows = torch.full((1, 1, 100), 20.0)
    dsalt_attention(q, k, v, windows, landmarks, landmark_block=32, backend="triton")


class Subject(NamedTuple):
    """A kernel that is broken: its name, its package, and what launches it."""

    kernel: str
    package: str
    run: Callable[[], None]


ROWS = Subject("_rows_forward_kernel", "diffmax", _rows)
SCORES = Subject("_score_forward_kernel", "adasplash", _attention)
KEYS = Subject("_dkdv_backward_kernel", "adasplash", _gradients)
WINDOW = Subject("_attention_forward_kernel", "dsalt", _landmarks)
BROKEN: list[tuple[str, Subject, str]] = [
    ("sm_80", ROWS, "a barrier dropped"),
    ("sm_80", ROWS, "a shuffle that half of a warp passes by"),
    ("sm_80", ROWS, "a load of global memory without its mask"),
    ("sm_80", ROWS, "a load of global memory far off"),
    ("sm_80", ROWS, "a load of global memory at an odd place"),
    ("sm_80", ROWS, "a store to global memory without its mask"),
    ("sm_80", SCORES, "a barrier dropped"),
    ("sm_80", SCORES, "a barrier that half of the threads pass by"),
    ("sm_80", SCORES, "a wait for copies dropped"),
    ("sm_80", SCORES, "a wait that leaves a group of copies"),
    ("sm_80", SCORES, "a group of copies not committed"),
    ("sm_80", SCORES, "a copy without its limit"),
    ("sm_80", SCORES, "a copy to an odd place"),
    ("sm_80", SCORES, "a store to shared memory dropped"),
    ("sm_80", SCORES, "a load of shared memory at an odd place"),
    ("sm_80", SCORES, "a load beyond shared memory"),
    ("sm_80", SCORES, "a matrix loaded at an odd place"),
    ("sm_80", SCORES, "a store to global memory dropped"),
    ("sm_80", SCORES, "stores that become sums of one word"),
    ("sm_80", KEYS, "a barrier dropped"),
    ("sm_80", KEYS, "a wait for copies dropped"),
    ("sm_80", KEYS, "a load of global memory without its mask"),
    ("sm_80", KEYS, "a store to global memory without its mask"),
    ("sm_90", SCORES, "a barrier dropped"),
    ("sm_90", SCORES, "a wait for copies dropped"),
    ("sm_90", SCORES, "a wait for wgmma dropped"),
    ("sm_90", SCORES, "a group of wgmma not committed"),
    ("sm_90", SCORES, "a proxy fence dropped"),
    ("sm_90", WINDOW, "a barrier dropped"),
    ("sm_90", WINDOW, "a wait for copies dropped"),
    ("sm_90", WINDOW, "a wait for wgmma dropped"),
    ("sm_90", WINDOW, "a group of wgmma not committed"),
    ("sm_90", WINDOW, "a proxy fence dropped"),
]


def found(target: str, subject: Subject, edit: Callable[[str], str]) -> set[tuple[str, str]]:
    """(kind, kernel) of all that is told of the subject's launches."""
    sanitizer = Sanitizer()
    told = set()
    try:
        with executing(target, sanitizer, edit=edit):
            subject.run()
    except FaultError as fault:
        told = {(str(fault).split(":")[0], sanitizer.kernel)}
    return told | {(kind, kernel) for kind, kernel, *_ in sanitizer.found}


def compiled(target: str, subject: Subject) -> tuple[str, set[tuple[str, str]]]:
    """The text of the subject's kernel, and what is told of it as it is."""
    texts = {}

    def keep(text: str) -> str:
        texts[re.search(r"\.entry (\w+)", text)[1]] = text
        return text

    told = found(target, subject, keep)
    return texts[subject.kernel], told


def broken(target: str, subject: Subject, fault: str) -> list[bool]:
    """For each place of the fault in the subject's kernel: whether it is told."""
    text, before = compiled(target, subject)
    pattern, instead, kind = FAULTS[fault]
    begin = text.index("\n{", text.index(".entry")) + 2
    out = []
    places = list(re.finditer(pattern, text, re.M))
    for place in places[:: -max(1, -(-len(places) // PLACES))]:
        changed = re.sub(pattern, instead, place[0], flags=re.M)
        end = text[begin : place.start()] + changed + text[place.end() :]
        edited = text[:begin] + REGISTERS + end
        told = found(target, subject, lambda t, edited=edited: edited if t == text else t)
        out.append(any(k == kind for k, _ in told - before))
    return out


def row(target: str, subject: Subject, fault: str) -> dict[str, object]:
    """One row of the committed result."""
    told = broken(target, subject, fault)
    return {
        "fault": fault,
        "kernel": f"{subject.package} {subject.kernel}",
        "target": target,
        "kind": FAULTS[fault].kind,
        "broken": len(told),
        "told": sum(told),
    }


def table(rows: list[dict[str, object]]) -> str:
    """The page's part: a line for each row, and the sums."""
    head = ("fault", "kernel", "target", "told as", "places broken", "told")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---|--:|--:|"]
    for r in rows:
        cells = (r["fault"], f"`{r['kernel']}`", r["target"], r["kind"], r["broken"], r["told"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    n, told = (sum(int(str(r[name])) for r in rows) for name in ("broken", "told"))
    kinds = {r["kind"] for r in rows}
    words = f"{len(rows)} faults of {len(kinds)} kinds, each told"
    lines.append(f"\n{words}; of {n} places that were broken, {told}.")
    return "\n".join(lines)


def page(text: str, rows: list[dict[str, object]]) -> str:
    """The page with the table of these rows."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    rows = []
    for case in BROKEN:
        rows.append(row(*case))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    lines = ",\n".join("  " + json.dumps(r) for r in rows)
    RESULT.write_text('{"faults": [\n' + lines + "\n]}\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
