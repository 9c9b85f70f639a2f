"""The command line of the experiments, and their tables and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._version import __version__


class Result(NamedTuple):
    """A table: title, column names, rows (first entry: what the row is), and how it was made.

    ``levels``: the columns are levels of one quantity, drawn as lines; else as bars.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    how: str
    levels: bool = True


Run = Callable[[str, list[int], bool], list[Result]]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(result: Result) -> str:
    lines = [
        f"## {result.title}",
        "",
        result.how,
        "",
        "| " + " | ".join(result.columns) + " |",
        "|" + "---|" * len(result.columns),
    ]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in result.rows]
    return "\n".join(lines) + "\n"


def _numbers(cells: Sequence[str]) -> tuple[list[float], list[float]]:
    """Means and deviations of cells like "0.912 ± 0.013 (7)"."""
    words = [cell.split() for cell in cells]
    deviations = [float(w[2]) if w[1:2] == ["±"] else 0.0 for w in words]
    return [float(w[0]) for w in words], deviations


def picture(results: Sequence[Result], path: Path) -> bool:
    """A panel per table, a line or a bar per row; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use("shared_kernels.pictures")
    size = (7.2, 3.2 * len(results))
    figure, panels = pyplot.subplots(len(results), figsize=size, squeeze=False)
    for result, axes in zip(results, panels[:, 0], strict=True):
        names = list(result.columns[1:])
        if result.levels:
            for row in result.rows:
                heights, deviations = _numbers(row[1:])
                axes.errorbar(names, heights, deviations, marker="o", capsize=2, label=row[0])
            axes.set_xlabel(result.columns[0])
        else:
            thickness, places = 0.8 / len(names), range(len(result.rows))
            for i, name in enumerate(names):
                lengths, deviations = _numbers([row[1 + i] for row in result.rows])
                shifted = [place + i * thickness for place in places]
                axes.barh(shifted, lengths, thickness, xerr=deviations, capsize=2, label=name)
            middle = (len(names) - 1) * thickness / 2
            axes.set_yticks([p + middle for p in places], [row[0] for row in result.rows])
            axes.invert_yaxis()
        axes.set_title(result.title)
        if result.levels:
            axes.legend()
        else:  # below the bars, which begin at the left and end at the right
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": len(names)}
            axes.legend(**below)
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _made_by(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The command, and what it ran on."""
    words = [f"python -m difflayers.experiments.{name}", f"--seeds {options.seeds}"]
    words += ["--quick"] * options.quick
    commit = ""
    if shutil.which("git"):
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
        ).stdout.strip()
    return {
        "command": " ".join(words),
        "date": datetime.date.today().isoformat(),
        "difflayers": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "commit": commit or None,
    }


def command(
    name: str,
    run: Run,
    argv: list[str] | None,
    data: tuple[str, ...] = ("digits", "clusters"),
    seeds: int = 10,
) -> int:
    """Parse --seeds, --quick, --data, --out; run; write NAME.md, .json and .png; print it all."""
    parser = argparse.ArgumentParser(prog=f"python -m difflayers.experiments.{name}")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many (default {seeds})")
    parser.add_argument("--quick", action="store_true", help="a smaller grid, for a first look")
    parser.add_argument("--data", nargs="+", choices=data, default=list(data), help="on what")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    torch.manual_seed(0)
    numbers = list(range(options.seeds))
    results = [r for d in options.data for r in run(d, numbers, options.quick)]
    made_by = _made_by(name, options)
    title, footer = name.replace("_", " "), ", ".join(f"{k} {v}" for k, v in made_by.items())
    page = "\n".join([f"# {title.capitalize()}\n", *map(table, results), f"{footer}\n"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text(page, encoding="utf-8")
    record = {"made_by": made_by, "tables": [r._asdict() for r in results]}
    (options.out / f"{name}.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    drawn = picture(results, options.out / f"{name}.png")
    sys.stdout.write(page)
    if not drawn:
        sys.stdout.write("(no picture: matplotlib is not installed)\n")
    return 0
