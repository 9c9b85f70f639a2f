"""Ours against ours at another commit: `python -m benchmarks --against GITREF --only diffmax`.

The sources of the other commit are put into a temporary folder. For each module of cases, two
processes run the rows of this checkout, each with its own sources on PYTHONPATH, row by row: both
check the row, then they take turns, one timing each, the first of a turn changing. A row that one
of them answers wrongly says so, and a module that an older commit cannot run does not end the
others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from . import registry

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def tree(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """The packages of a commit in a temporary folder; nothing is registered in the repository."""
    git = ["git", "-C", str(root), "archive", ref, "shared-kernels", "packages"]
    made = subprocess.run(git, capture_output=True)
    if made.returncode:
        message = made.stderr.decode().strip()
        raise ValueError(f"`--against` must name a commit with packages, got {ref!r}: {message}")
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def sources(root: Path) -> str:
    """PYTHONPATH of the packages below `root`."""
    found = [root / "shared-kernels" / "src", *sorted(root.glob("packages/*/src"))]
    return os.pathsep.join(str(p) for p in found)


class Side:
    """One process with one version of the sources; it answers each line with a line."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": sources(root)}
        command = [sys.executable, "-m", "benchmarks.against", *arguments]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def ask(self, what: str) -> Any:
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-1:] or ["no message"]
            return {"ended": last[0]}
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and said why when it was asked
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


def compare(ref: str, quick: bool, only: str, device: str, turns: int = 6) -> Iterator[dict]:
    """One record for each row: seconds of both, and how many times faster this checkout is."""
    with tree(ref) as other:
        for module in registry.modules(device, quick, only):
            arguments = [module, device, only or "-", *(["--quick"] if quick else [])]
            with contextlib.ExitStack() as stack:
                sides = {"now": Side(ROOT, arguments), ref: Side(other, arguments)}
                for side in sides.values():
                    stack.callback(side.close)
                yield from _compare_rows(sides, ref, module, turns)


def _compare_rows(sides: dict[str, Side], ref: str, module: str, turns: int) -> Iterator[dict]:
    while True:
        answers = {name: side.ask("next") for name, side in sides.items()}
        ended = {name: s["ended"] for name, s in answers.items() if "ended" in s}
        if ended:
            if set(ended.values()) != {""}:
                why = {name: text or "has no more rows" for name, text in ended.items()}
                yield {"case": module, "size": "the rest", "refused": why}
            return
        row = {key: answers["now"][key] for key in ("case", "size")}
        refused = {name: s["error"] for name, s in answers.items() if s["error"]}
        if refused:
            yield {**row, "refused": refused}
            continue
        seen: dict[str, list[float]] = {name: [] for name in sides}
        repeats = max(turns, answers["now"]["repeats"])
        for turn in range(repeats):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                seen[name].append(sides[name].ask("time"))
        medians = {name: statistics.median(values) for name, values in seen.items()}
        quarters = [statistics.quantiles(values, n=4) for values in seen.values()]
        yield {
            **row,
            "seconds": medians,
            "ratio": medians[ref] / medians["now"],
            "spread": max(high / low for low, _, high in quarters),
            "turns": repeats,
            "refused": {},
        }


def line(record: dict[str, Any], ref: str) -> str:
    name = f"| {record['case']} | {record['size']} | "
    if record["refused"]:
        return name + "; ".join(f"{who}: {why}" for who, why in record["refused"].items()) + " |||"
    now, before = record["seconds"]["now"], record["seconds"][ref]
    numbers = (f"{before * 1e3:.2f} ms", f"{now * 1e3:.2f} ms", f"{record['ratio']:.2f}×")
    return name + " | ".join((*numbers, f"{record['spread']:.2f}×")) + " |"


def table(records: list[dict[str, Any]], ref: str) -> str:
    """Ratios above 1: this checkout is that many times faster than `ref`."""
    head = f"| case | size | {ref} | now | {ref} / now | spread |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(line(record, ref) for record in records)


def serve(module: str, device: str, only: str, quick: bool, asked: TextIO, answers: TextIO) -> None:
    """The process of one side: "next" makes and checks a row, "time" times it once."""
    import torch

    from . import clock, gate, runner

    torch.set_num_threads(1)
    timer = clock.clock(torch.device(device))
    rows = registry.rows_of(module, device, quick, "" if only == "-" else only)
    row: registry.Row | None = None

    def following() -> dict[str, Any]:
        nonlocal row
        try:
            row = next(rows)
        except StopIteration:
            return {"ended": ""}
        found: dict[str, Any] = {"case": row.case, "size": row.size, "error": ""}
        try:
            gate.check(row)
            seconds = timer(row.ours)
            many = runner.FAST_ROUNDS if seconds < runner.SHORT_SECONDS else runner.SLOW_ROUNDS
            return {**found, "repeats": many}
        except Exception as error:  # an older version may not know, or not meet, a newer case
            return {**found, "error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}

    for what in asked:
        if what.strip() == "next":
            answer: Any = following()
        else:
            timer(row.ours)  # the other side has just had the cache
            answer = timer(row.ours)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What a case prints must not be taken for an answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(*sys.argv[1:4], "--quick" in sys.argv, sys.stdin, channel)
