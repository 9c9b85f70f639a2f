"""Run the benchmarks: ``python -m benchmarks --quick --only diffmax``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from . import against, clock, gate, headlines, pictures, published, registry, report, runner

HERE = Path(__file__).parent


def _nothing(chosen: argparse.Namespace) -> str:
    where = " of a quick sweep" if chosen.quick else ""
    modules = ", ".join(registry.names())
    return (
        f"`--only` must be part of the name of a case{where} on {chosen.device}, got "
        f"{chosen.only!r}; `--list` names the cases; the modules are {modules}"
    )


def _sweep(chosen: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    began, rows, failed, whole = time.monotonic(), [], [], True
    folder = chosen.out is not None and chosen.out.is_dir()
    for row in registry.rows(chosen.device, chosen.quick, chosen.only):
        if time.monotonic() - began > chosen.budget:
            print(f"budget of {chosen.budget:.0f} s used up before {row.case} {row.size}")
            whole = False
            break
        try:
            rows.append(runner.measure(row, device, chosen.quick))
        except (gate.WrongAnswerError, torch.OutOfMemoryError) as error:
            failed.append(f"- {row.case} {row.size}: {str(error).splitlines()[0]}")
            print(f"NOT TIMED {failed[-1]}", flush=True)
            continue
        print(report.line(rows[-1]), flush=True)
        if folder:
            report.keep(chosen.out, rows[-1])
        elif chosen.out is not None:
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if folder and whole and not chosen.only:
        report.keep_only(chosen.out, rows)
    if whole and not rows and not failed:
        raise SystemExit(_nothing(chosen))
    print("\n" + report.whole(rows))
    if failed:
        print("\nNot timed:\n" + "\n".join(failed))
    print(f"\n{len(rows)} rows in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _against(chosen: argparse.Namespace) -> int:
    records = []
    for record in against.compare(chosen.against, chosen.quick, chosen.only, chosen.device):
        records.append(record)
        print(against.line(record, chosen.against), flush=True)
    print("\n" + against.table(records, chosen.against))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes, about two minutes")
    size.add_argument("--full", action="store_true", help="all sizes, half an hour (the default)")
    parser.add_argument("--only", default="", help="a package's name or part of a case's name")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    budget = "seconds, then no row is begun (default: %(default)s)"
    parser.add_argument("--budget", type=float, default=1800, help=budget)
    out = "a file of JSON lines, or a folder: its cpu.jsonl, scaling.jsonl, ..., renewed row by row"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--peers", type=Path, help="a folder of packages or wheels to compare with")
    parser.add_argument("--list", action="store_true", help="make and name every row; time nothing")
    parser.add_argument("--against", metavar="GITREF", help="time this checkout against a commit")
    parser.add_argument("--table", type=Path, help="show the rows of such a file; time nothing")
    parser.add_argument(
        "--pictures", action="store_true", help="draw the committed rows; time nothing"
    )
    parser.add_argument("--page", action="store_true", help="renew the tables of the pages")
    chosen = parser.parse_args(arguments)
    folder = chosen.out is not None and chosen.out.is_dir() and not chosen.pictures
    if folder and (chosen.quick or chosen.device != "cpu"):
        parser.error("`--out` must be a file with --quick or --device; a folder is for full rows")
    if chosen.table is not None:
        if not chosen.table.is_file():
            parser.error(f"`--table` must be a file of rows, got {chosen.table}")
        print(report.whole(report.read(chosen.table)))
        return 0
    if chosen.page:
        readme = HERE / "README.md"
        readme.write_text(report.page(readme.read_text("utf-8"), HERE / "results"), "utf-8")
        headlines.renew(HERE / "results")
        return 0
    if chosen.pictures:
        for path in pictures.draw(HERE / "results", chosen.out or HERE / "pictures"):
            print(f"drew {path}")
        return 0
    if chosen.peers is not None:
        if not chosen.peers.is_dir():
            parser.error(f"`--peers` must be a folder, got {chosen.peers}")
        print("peers: " + ", ".join(published.use(chosen.peers)))
    if chosen.list:
        found = False
        for row in registry.rows(chosen.device, chosen.quick, chosen.only):
            print(f"{row.case} {row.size}: {', '.join(row.peers) or 'no peer'}", flush=True)
            found = True
        if not found:
            parser.error(_nothing(chosen))
        return 0
    if not chosen.against:
        return _sweep(chosen)
    try:
        return _against(chosen)
    except ValueError as error:  # a commit that is none
        parser.error(str(error))


if __name__ == "__main__":
    clock.keep_freed_memory("benchmarks")
    raise SystemExit(main())
