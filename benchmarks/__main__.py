"""Run the benchmarks: ``python -m benchmarks --quick --only diffmax``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from . import registry, report, runner


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes, about three minutes")
    size.add_argument("--full", action="store_true", help="all sizes (the default)")
    parser.add_argument("--only", default="", help="a package's name or part of a case's name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1800, help="seconds; then no row is begun")
    parser.add_argument("--out", type=Path, help="JSON lines, written row by row")
    parser.add_argument("--table", type=Path, help="show the rows of such a file; time nothing")
    chosen = parser.parse_args(arguments)
    if chosen.table is not None:
        print(report.table(report.read(chosen.table)))
        return 0
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    began, rows = time.monotonic(), []
    for row in registry.rows(chosen.device, chosen.quick, chosen.only):
        if time.monotonic() - began > chosen.budget:
            print(f"budget of {chosen.budget:.0f} s used up before {row.case} {row.size}")
            break
        rows.append(runner.measure(row, device))
        print(report.line(rows[-1]), flush=True)
        if chosen.out is not None:
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("\n" + report.table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
