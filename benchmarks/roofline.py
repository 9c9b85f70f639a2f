"""What one thread of this processor can do at most, and the share of it that native rows reach.

`python -m benchmarks.roofline` measures both limits and writes `results/peaks.jsonl`, a row for
each instruction set: operations per second of a loop of multiply-adds that waits for nothing
(`peak.cpp`), and bytes per second of a copy, read and written, by the size of what is copied. Then,
as `--columns` does without measuring, it gives each committed row of the native benchmarks

    share of FMA peak      operations per second of the row / those of the loop
    share of memory floor  time of a copy of as many bytes / time of the row

for each pass that the row has. Operations and bytes are counted by a function `work` in the file of
each benchmark: what a method has to do that leaves nothing out, and every input and output once. A
share above 1 is work that was left out.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared_kernels import native

from . import native_association, native_attention, native_band, native_rows, report
from .cases.dsalt import K, W

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SOURCES = HERE.parent / "shared-kernels" / "native"
# what the copies read and write, in MB: from the second-level cache to beyond all caches
COPIES = (1, 4, 16, 64, 1024)
FMA, MEMORY = "share of FMA peak", "share of memory floor"
MODULES = {
    "native_rows": native_rows,
    "native_association": native_association,
    "native_attention": native_attention,
    "native_band": native_band,
}


def fma_rate(instructions: str, rounds: int = 3_000_000) -> float:
    """Operations per second of multiply-adds, two each: the best of twenty."""
    build = runpy.run_path(str(SOURCES / "build.py"))
    flags = (
        *build["FLAGS"],
        *build["X86_SETS"].get(instructions, ()),
        f"-I{SOURCES}",
        "-fvisibility=default",
    )
    with tempfile.TemporaryDirectory() as folder:
        to = str(Path(folder, "peak"))
        build["run"]([*build["compiler"](), *flags, "-shared", str(HERE / "peak.cpp"), "-o", to])
        library = ctypes.CDLL(to)
    library.multiply_adds.argtypes = (ctypes.c_int64, ctypes.c_float, ctypes.c_float)
    library.operations.restype = ctypes.c_int64
    best = _best(lambda: library.multiply_adds(rounds, 0.999, 1e-3), 20)
    return float(library.operations(ctypes.c_int64(rounds)) / best)


def copy_rate(megabytes: int) -> float:
    """Bytes per second, read and written, of a copy that touches so many: the best of twenty."""
    source = torch.ones(megabytes * 125_000)
    to = torch.empty_like(source)
    return megabytes * 1e6 / _best(lambda: to.copy_(source), 20)


def _best(call: Callable[[], Any], times: int) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def measure() -> None:
    """The limits in this process's instruction set, as a line of JSON."""
    torch.set_num_threads(1)
    row = {
        "set": native.instruction_set(),
        "fma GFLOP/s": round(fma_rate(native.instruction_set()) / 1e9, 1),
        "copy GB/s": {str(size): round(copy_rate(size) / 1e9, 1) for size in COPIES},
    }
    print(json.dumps(row))


def peaks(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The committed limits by instruction set."""
    return {row["set"]: row for row in report.read(results / "peaks.jsonl")}


def copy_seconds(limits: dict[str, Any], size: float) -> float:
    """How long a copy that touches so many bytes takes at least."""
    rates = {int(megabytes): rate for megabytes, rate in limits["copy GB/s"].items()}
    fitting = [megabytes for megabytes in rates if size <= megabytes * 1e6]
    return size / 1e9 / rates[min(fitting, default=max(rates))]


def shares(name: str, row: dict[str, Any], limits: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Both columns of a row of results/NAME.jsonl: a share for each pass that it has."""
    fma, memory = {}, {}
    for part, (seconds, operations, size) in MODULES[name].work(row).items():
        fma[part] = round(operations / seconds / 1e9 / limits["fma GFLOP/s"], 3)
        memory[part] = round(copy_seconds(limits, size) / seconds, 3)
    return {FMA: fma, MEMORY: memory} if fma else {}


def renewed(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of results/NAME.jsonl with both columns."""
    limits = peaks(results)
    rows = report.read(results / f"{name}.jsonl")
    return [{**row, **shares(name, row, limits[row["set"]])} for row in rows]


def label(name: str, row: dict[str, Any]) -> str:
    """What a row is about, in words."""
    if name == "native_rows":
        return f"diffmax, {row['shape'][0]} × {row['shape'][1]}, α = {row['alpha']}"
    if name == "native_attention":
        return f"entmax attention, {row['kind']}, N = {row['N']}"
    if name == "native_band":
        return f"dsalt, {W} + {K} keys, N = {row['N']}"
    size = row["size"]
    return f"Hopfield, {row['update_steps_max']} updates, B{size['B']} L{size['L']} S{size['S']}"


def table(results: Path = RESULTS) -> str:
    """Both limits of each instruction set, and a line for each row and pass."""
    text = []
    for name, most in peaks(results).items():
        copies = most["copy GB/s"]
        text.append(
            f"{name}: {most['fma GFLOP/s']:.0f} GFLOP/s; a copy takes {copies['1']:.0f} GB/s in "
            f"the second-level cache and {copies[str(COPIES[-1])]:.0f} GB/s beyond all caches."
        )
    lines = ["| what | pass | instructions | time | share of FMA peak | share of memory floor |"]
    lines.append("|" + "---|" * 6)
    limits = peaks(results)
    for name, module in MODULES.items():
        for row in report.read(results / f"{name}.jsonl"):
            found = shares(name, row, limits[row["set"]])
            for part, (seconds, _, _) in module.work(row).items():
                share = [f"{found[column][part]:.1%}" for column in (FMA, MEMORY)]
                cells = [label(name, row), part, row["set"], report.duration(seconds), *share]
                lines.append("| " + " | ".join(cells) + " |")
    summary = f"<summary>All {len(lines) - 2} rows</summary>"
    folded = [f'<details markdown="1">\n{summary}', "\n".join(lines), "</details>"]
    return "\n\n".join([" ".join(text), *folded])


def write_columns() -> None:
    for name in MODULES:
        report.write(RESULTS / f"{name}.jsonl", renewed(name))


def main(arguments: list[str]) -> int:
    if "--child" in arguments:
        measure()
        return 0
    if "--columns" not in arguments:
        native_rows.collect("benchmarks.roofline", RESULTS / "peaks.jsonl", arguments)
    write_columns()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
