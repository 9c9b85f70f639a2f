"""python -m shared_kernels.offline: see the package's docstring."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time

from .plan import package_of
from .report import compare, complaints, read_report, summary, table, write_report
from .run import compile_all
from .targets import ALL, MORE, TARGETS, Row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shared_kernels.offline",
        description="Compile the launches of packages for GPUs that are not there.",
    )
    parser.add_argument("files", nargs="*", metavar="LAUNCHES.py")
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help=f"default: %(default)s; `more`: {', '.join(MORE)}, one launch of each kernel",
    )
    parser.add_argument(
        "--only", default="", help="launches whose name contains this (or matches it)"
    )
    parser.add_argument(
        "--report", metavar="FILE.json", help="write what was compiled (and keep what was not)"
    )
    parser.add_argument(
        "--check", metavar="FILE.json", help="fail on what differs from this report"
    )
    parser.add_argument(
        "--summary",
        metavar="FILE.json",
        help="compile nothing; show what bounds each kernel of this report",
    )
    parser.add_argument(
        "--known",
        metavar="FILE.json",
        default="",
        help="do not compile again what this report describes: same source, types, constants, "
        "options, target and Triton",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("-v", "--verbose", action="store_true", help="one line for each kernel")
    for internal in ("--worker", "--records"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.worker:
        with open(options.records, "a", encoding="utf-8") as file:

            def write(row: Row) -> None:
                file.write(json.dumps(row) + "\n")
                file.flush()

            from .compiler import work

            known = read_report(options.known) if options.known else None
            work(options.worker, options.files, options.only, options.first, write, known)
        return 0

    targets = list(MORE) if options.targets == "more" else options.targets.split(",")
    for target in targets:
        if target not in ALL:
            parser.error(f"unknown target {target!r}; there are {', '.join(ALL)}")
    if options.summary:
        pattern = f"*{options.only}*"
        rows = [row for row in read_report(options.summary) if row["target"] in targets]
        rows = [row for row in rows if fnmatch.fnmatch(row["launch"], pattern)]
        sys.stdout.write(summary(rows) + "\n")
        return 0
    if not options.files:
        parser.error("give a LAUNCHES.py, or --summary FILE.json")
    start = time.perf_counter()
    try:
        rows = compile_all(options.files, targets, options.only, options.jobs, options.known)
    except RuntimeError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    packages = {package_of(file) for file in options.files}

    def is_covered(row: Row) -> bool:
        """Whether this run compiles, for one, what the row is about."""
        if row["target"] not in targets or row["launch"].split(": ")[0] not in packages:
            return False
        return fnmatch.fnmatch(row["launch"], f"*{options.only}*")

    failures = complaints(rows)
    if options.check:
        failures += compare(rows, [row for row in read_report(options.check) if is_covered(row)])
    if options.report:
        kept = [row for row in read_report(options.report) if not is_covered(row)]
        write_report(options.report, kept + rows)
    if options.verbose:
        sys.stdout.write(table(rows) + "\n")
    for failure in failures:
        sys.stdout.write(f"FAILED {failure}\n")
    sys.stdout.write(
        f"{len(rows)} kernels for {', '.join(targets)} in {time.perf_counter() - start:.0f} s: "
        + (f"{len(failures)} failures\n" if failures else "every gate holds\n")
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
