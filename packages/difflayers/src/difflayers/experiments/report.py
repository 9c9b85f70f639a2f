"""The command line of the experiments, and their tables and pictures."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Result(NamedTuple):
    """A table: title, column names, rows (first entry: what the row is), and how it was made."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    how: str


def spread(values: Sequence[float]) -> str:
    """mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def markdown(result: Result) -> str:
    lines = [
        f"# {result.title}",
        "",
        result.how,
        "",
        "| " + " | ".join(result.columns) + " |",
        "|" + "---|" * len(result.columns),
    ]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in result.rows]
    return "\n".join(lines) + "\n"


def _number(cell: Any) -> float | None:
    try:
        return float(str(cell).split()[0])
    except (ValueError, IndexError):
        return None


def picture(result: Result, path: Path) -> bool:
    """One line per row over the numeric columns; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    names = list(result.columns[1:])
    for row in result.rows:
        heights = [_number(cell) for cell in row[1:]]
        points = [(n, h) for n, h in zip(names, heights, strict=True) if h is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=str(row[0]))
    axes.set_xlabel(result.columns[0])
    axes.set_title(result.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def command(name: str, run: Callable[[list[int], bool], Result], argv: list[str] | None) -> int:
    """Parse --seeds, --quick, --out; run; write NAME.md, .json and .png; print the table."""
    parser = argparse.ArgumentParser(prog=f"python -m difflayers.experiments.{name}")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--quick", action="store_true", help="a smaller grid, for a first look")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    torch.manual_seed(0)
    result = run(list(range(options.seeds)), options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    table = markdown(result)
    (options.out / f"{name}.md").write_text(table, encoding="utf-8")
    (options.out / f"{name}.json").write_text(json.dumps(result._asdict(), indent=1))
    drawn = picture(result, options.out / f"{name}.png")
    sys.stdout.write(table)
    if not drawn:
        sys.stdout.write("(no picture: matplotlib is not installed)\n")
    return 0
