"""The judge: gates for one kernel, the comparison with the committed report, the report file."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from pathlib import Path

from .. import device
from .targets import TARGETS, Row

STACK_LIMIT = 32  # bytes per thread on NVIDIA


def broken_gates(row: Row) -> list[str]:
    """What is wrong with one compiled kernel, in words; empty when it passes."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    nvidia, target = row["target"].startswith("sm_"), row["target"]
    limit = device.SHARED_MEMORY[target]
    out = []
    if nvidia and row["stack"] > STACK_LIMIT:
        out.append(
            f"spills: stack {row['stack']} B per thread, at most {STACK_LIMIT} B "
            f"({row['registers']} registers, {row['spills']} local loads and stores)"
        )
    if not nvidia and (row["stack"] or row["spills"]):
        out.append(
            f"spills: {row['stack']} B of scratch and {row['spills']} spilled VGPRs, both must be 0"
        )
    if row["shared"] > limit:
        out.append(f"needs {row['shared']} B of shared memory, {target} has {limit} B")
    if row["matrix"]:
        wanted = "HGMMA" if target == "sm_90" else "HMMA" if nvidia else "mfma"
        if row["HMMA"] == 0 and "UTCHMMA" in row:
            wanted = "UTCHMMA"
        if wanted == "HGMMA" and row.get("hmma_allowed"):
            wanted = "HMMA" if row["HMMA"] else "HGMMA"
        if not row[wanted]:
            hint = ""
            if wanted == "HGMMA":
                hint = "; M must be >= 64 and num_warps >= 4 (if that spills: Launch.hmma_above)"
            out.append(
                f"has dots but no {wanted}: the tensor cores are not used as they can be{hint}"
            )
    return out + narrow_accesses(row)


def narrow_accesses(row: Row) -> list[str]:
    """Where a kernel of numbers of two bytes moves fewer bytes at once than its launch asks."""
    if row.get("access") is None:
        return []
    threads = row["num_warps"] * (32 if row["target"].startswith("sm_") else 64)
    numbers = math.prod(int(n) for n in re.findall(r"BLOCK_\w+=(\d+)", row["config"]))
    wanted = min(row["access"], 2 * numbers // threads or row["access"])  # no more than its share
    out = []
    for name, verb in (("load", "loads"), ("store", "stores")):
        narrowest, widest = row[name] or (0, 0)
        if widest < wanted:
            out.append(f"{verb} at most {widest} B a thread at once, must be {wanted} B")
        elif narrowest < 4:
            out.append(f"{verb} {narrowest} B a thread at once somewhere, beside {widest} B")
    hint = "; can the compiler see that addresses and masks are multiples of the vector?"
    return [text + hint for text in out]


def key(row: Row) -> tuple[str, ...]:
    """What identifies a row from one report to the next."""
    names = ("target", "launch", "size", "config", "kernel", "variant")
    return tuple(str(row.get(name, "")) for name in names)


def label(row: Row) -> str:
    parts = [row["target"], row["launch"], "" if row["size"] is None else f"size {row['size']}"]
    return " | ".join(p for p in [*parts, row["config"], row.get("kernel", "")] if p)


def compare(rows: list[Row], committed: list[Row]) -> list[str]:
    """What differs from the committed report in a way that must be looked at."""
    now, before = {key(r): r for r in rows}, {key(r): r for r in committed}
    out = [
        f"absent: {label(row)} is in the committed report and was not compiled"
        for k, row in before.items()
        if k not in now
    ]
    for k, row in now.items():
        if k not in before:
            out.append(f"new: {label(row)} is not in the committed report; write it with --report")
            continue
        old = before[k]
        had, has = (tuple(r.get(name, 0) for name in ("HGMMA", "HMMA")) for r in (old, row))
        if has[0] < had[0] and (has[0] == 0 or has[1] > had[1]):
            out.append(
                f"HGMMA lost: {label(row)} had {had[0]} (HMMA {had[1]}), now {has[0]} ({has[1]})"
            )
    return out


def complaints(rows: list[Row]) -> list[str]:
    """Every broken gate, said once for a kernel that several launches share."""
    found: dict[tuple[tuple[object, ...], str], list[Row]] = {}
    for row in rows:
        used = tuple(row.get(name) for name in ("target", "kernel", "size", "registers", "shared"))
        for text in broken_gates(row):
            found.setdefault((used, text), []).append(row)
    out = []
    for (_, text), same in found.items():
        more = f" (and {len(same) - 1} more launches of it)" if len(same) > 1 else ""
        out.append(f"{label(same[0])}{more}\n    {text}")
    return out


def read_report(path: str | Path) -> list[Row]:
    """The rows of a report; none if there is no such file."""
    return json.loads(Path(path).read_text("utf-8"))["kernels"] if Path(path).exists() else []


def write_report(path: str | Path, rows: list[Row]) -> None:
    """The report as JSON with one kernel per line."""
    import torch
    import triton

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    head = {
        "triton": triton.__version__,
        "torch": torch.__version__.split("+")[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": git.stdout.strip() or None,
    }
    lines = ",\n".join("  " + json.dumps(row) for row in sorted(rows, key=key))
    text = json.dumps(head, indent=1)[:-2] + ',\n "kernels": [\n' + lines + "\n]}\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def table(rows: list[Row]) -> str:
    columns = (
        *("registers", "stack", "spills", "shared", "HGMMA", "HMMA", "mfma", "seconds"),
        *("loop", "bound", "ns"),
    )
    lines = ["".join(f"{c:>10}" for c in columns)]
    for row in rows:
        lines.append("".join(f"{row.get(c, '-'):>10}" for c in columns) + "  " + label(row))
    return "\n".join(lines)


def _loop(row: Row) -> str:
    return f"{row['loop']}{'' if row.get('looped', True) else ', no loop'}"


def summary(rows: list[Row]) -> str:
    """Markdown, a line for each kernel of each launch: its inner loop and what bounds it."""
    head = (
        *("target", "kernel", "launch", "registers", "loop", "of that", "bound by"),
        *("ns per pass", "of tensor peak, at most"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "bound" not in row:
            continue
        size = "" if row["size"] is None else f", {row['size']}"
        share = f"{row['tensor_share']:.0%}" if row["mix"].get("tensor") else "–"
        mix = ", ".join(f"{n} {kind}" for kind, n in row["mix"].items())
        cells = (
            *(row["target"], f"`{row['kernel']}`", f"{row['launch']}{size}", row["registers"]),
            *(_loop(row), mix, row["bound"], row["ns"], share),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    silent = sum("bound" not in row for row in rows)
    if silent:
        lines.append(f"\n{silent} kernels were recorded without an inner loop.")
    bounds: dict[tuple[str, str], int] = {}
    for row in rows:
        if "bound" in row:
            bounds[row["target"], row["bound"]] = bounds.get((row["target"], row["bound"]), 0) + 1
    lines.append("\nKernels bound by each unit:")
    for (target, bound), n in sorted(bounds.items()):
        lines.append(f"- {target}: {bound} {n}")
    return "\n".join(lines)


def _range(values: list[float], digits: str) -> str:
    low, high = (f"{end:{digits}}" for end in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def _cell(rows: list[Row]) -> str:
    """What bounds a kernel's launches on one target, most frequent first; ns; share of tensor."""
    if not rows:
        return "–"
    named = [row["bound"] + ("" if row["looped"] else ", no loop") for row in rows]
    parts = [" or ".join(sorted(set(named), key=lambda name: (-named.count(name), name)))]
    parts.append(_range([row["ns"] for row in rows], ".1f") + " ns")
    shares = [100 * row["tensor_share"] for row in rows if "tensor" in row["mix"]]
    if shares:
        parts.append(_range(shares, ".0f") + " %")
    return "; ".join(parts)


def kernels(rows: list[Row]) -> str:
    """Markdown, a line for each kernel: on each target its bound, ns of a pass, tensor share."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "looped" in row:
            groups.setdefault((row["launch"].split(": ")[0], row["kernel"]), []).append(row)
    lines = ["| package | kernel | launches | " + " | ".join(TARGETS) + " |"]
    lines.append("|" + "---|" * (3 + len(TARGETS)))
    for (package, kernel), group in sorted(groups.items()):
        cells = [_cell([row for row in group if row["target"] == target]) for target in TARGETS]
        launches = len({row["launch"] for row in group})
        lines.append(f"| {package} | `{kernel}` | {launches} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
