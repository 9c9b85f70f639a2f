"""One process per target; a process that dies costs the one launch it died in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .targets import TARGETS, Row, shortened

OLDEST_TRITON = (3, 6)


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "Triton's compilers are for Linux on x86_64"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"needs Triton 3.6 or newer, got {triton.__version__}; the stand-in driver is for it"
    return None


def compile_for(target: str, files: list[str], only: str = "", known: str = "") -> list[Row]:
    """Every row of `files` for one target, compiled in processes of its own.

    known: a report; a kernel that it describes is not compiled again.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="offline-") as folder:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
        first = 0
        while True:
            records, errors = Path(folder) / f"rows-{first}", Path(folder) / f"errors-{first}"
            command = [sys.executable, "-m", "shared_kernels.offline", *files, "--worker", target]
            command += ["--only", only, "--first", str(first), "--records", str(records)]
            command += ["--known", known]
            with open(errors, "wb") as stderr:
                code = subprocess.call(command, env=environment, stdout=stderr, stderr=stderr)
            found = []
            if records.exists():
                found = [json.loads(line) for line in records.read_text().splitlines()]
            rows += [r for r in found if "start" not in r and "done" not in r]
            if any("done" in r for r in found):
                return rows
            why = f"the compiling process ended with {code}: " + shortened(
                errors.read_text("utf-8", "replace")
            )
            starts = [r for r in found if "start" in r]
            if not starts:
                raise RuntimeError(f"{target}: {why}")
            died = starts[-1]
            first = died.pop("start") + 1
            rows.append({**died, "error": why})


def compile_all(
    files: list[str],
    targets: Iterable[str] = tuple(TARGETS),
    only: str = "",
    jobs: int = 2,
    known: str = "",
) -> list[Row]:
    """Every row for every target, at most `jobs` processes at a time; `known` as above."""
    if reason := why_not():
        raise RuntimeError(reason)
    with ThreadPoolExecutor(jobs) as pool:
        return [
            r
            for rows in pool.map(lambda t: compile_for(t, files, only, known), targets)
            for r in rows
        ]
