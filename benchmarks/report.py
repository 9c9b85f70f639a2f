"""Rows -> a Markdown table: case | size | density | ours | noise | best peer | ratio | floor.

Rows with a claimed growth get a second table: the exponents of time and memory, fitted against N.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from shared_kernels.offline import report as offline

NOT_PEERS = ("ours", "floor")
SECTIONS = ("cpu", "scaling", "density", "peers")  # of the page; a file of rows for each


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def section(row: dict[str, Any]) -> str:
    """The file, and the table of the page, that a row belongs to."""
    name = row["case"].split("/")[0]
    return name if name in SECTIONS else SECTIONS[0]


def keep(folder: Path, row: dict[str, Any]) -> None:
    """Write a row into its file of `folder`, in the place of an older one of that case and size."""
    path = folder / f"{section(row)}.jsonl"
    rows = read(path) if path.exists() else []
    same = [i for i, old in enumerate(rows) if _name(old) == _name(row)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    write(path, rows)


def _name(row: dict[str, Any]) -> tuple[str, str]:
    return row["case"], row["size"]


def keep_only(folder: Path, rows: list[dict[str, Any]]) -> None:
    """After a whole sweep: its rows in its order, and none of cases that are gone."""
    for name in {section(row) for row in rows}:
        write(folder / f"{name}.jsonl", [row for row in rows if section(row) == name])


def duration(seconds: float) -> str:
    """Seconds in the unit that reads well."""
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def bar_lines(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(peer, times faster than it, the bar) for each bar whose peer was measured."""
    ours = row["seconds"]["ours"]
    return [
        (peer, row["seconds"][peer] / ours, bar)
        for peer, bar in row["bars"].items()
        if peer in row["seconds"]
    ]


def line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    ours = seconds["ours"]
    peers = {name: t for name, t in seconds.items() if name not in NOT_PEERS}
    best = min(peers, key=peers.__getitem__) if peers else None
    ratios = ", ".join(f"{name} {t / ours:.2f}×" for name, t in sorted(peers.items()))
    share = f"{seconds['floor'] / ours:.0%}" if "floor" in seconds else "–"
    density = f"{row['density']:.3f}" if row["density"] is not None else "–"
    cells = (
        row["case"],
        row["size"],
        density,
        duration(ours),
        f"{row['noise']:.2f}×",
        f"{best} {duration(peers[best])}" if best else "–",
        ratios or "–",
        share,
    )
    return "| " + " | ".join(cells) + " |"


def row_table(rows: list[dict[str, Any]]) -> str:
    """Ratios above 1: ours is that many times faster. Noise: how far ours's two slots are apart."""
    head = ("case", "size", "density", "ours", "noise", "best peer", "peer time / ours")
    head = (*head, "share of floor")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(line(row) for row in rows)])


def lists(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that are not met and the peers that did not run, a list each."""
    missed = [
        f"- {row['case']} {row['size']}: {ratio:.2f}× against {peer}, the bar is {bar:.3g}×"
        for row in rows
        for peer, ratio, bar in bar_lines(row)
        if ratio < bar
    ]
    refused = sorted(
        {f"- {row['case']}: {name}: {why}" for row in rows for name, why in row["refused"].items()}
    )
    named = (("Bars not met:", missed), ("Peers that did not run:", refused))
    return ["\n".join([name, "", *found]) for name, found in named if found]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, and below them the bars that are not met and the peers that did not run."""
    return "\n\n".join([row_table(rows), *lists(rows)])


def folded(rows: list[dict[str, Any]]) -> str:
    """`table` for a page: the lists stand first, the rows wait for a click."""
    found = f'<details markdown="1">\n<summary>All {len(rows)} rows</summary>\n\n'
    return "\n\n".join([*lists(rows), f"{found}{row_table(rows)}\n\n</details>"])


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) against log(N), by least squares."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case with a claimed growth and two sizes or more: what its time and memory do."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("grows") is not None:
            cases.setdefault(row["case"], []).append(row)
    found = []
    for case, group in cases.items():
        group = sorted(group, key=lambda row: row["N"])
        sizes = [row["N"] for row in group]
        if len(set(sizes)) < 2:
            continue
        series = {"time": [row["seconds"]["ours"] for row in group]}
        if all(row.get("memory", {}).get("ours") for row in group):
            series["memory"] = [row["memory"]["ours"] for row in group]
        claims = dict(zip(("time", "memory"), group[0]["grows"], strict=True))
        fitted = {name: exponent(sizes, values) for name, values in series.items()}
        last = {name: exponent(sizes[-2:], values[-2:]) for name, values in series.items()}
        found.append(
            {
                "case": case,
                "sizes": sizes,
                "series": series,
                "claims": claims,
                "fitted": fitted,
                "last": last,
            }
        )
    return found


SLACK = 0.15  # of an exponent: what caches, fresh pages and noise add over doublings


def fit_table(rows: list[dict[str, Any]]) -> str:
    """Claimed and fitted exponents, over all sizes and (in brackets) over the last doubling."""
    head = ("what", "N", "time", "memory", "time ~ N^", "claimed", "memory ~ N^", "claimed")
    head = (*head, "holds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for fit in fits(rows):
        cells = [fit["case"].removeprefix("scaling/"), f"{fit['sizes'][0]} … {fit['sizes'][-1]}"]
        time, memory = fit["series"]["time"], fit["series"].get("memory")
        cells.append(f"{duration(time[0])} … {duration(time[-1])}")
        cells.append(f"{memory[0] / 1e6:.1f} … {memory[-1] / 1e6:.1f} MB" if memory else "–")
        holds = True
        for name in ("time", "memory"):
            claim, slope = fit["claims"][name], fit["fitted"].get(name)
            claimed = "–" if claim is None else f"{claim:g}"
            if slope is None:
                cells += ["–", claimed]
                continue
            cells += [f"{slope:.2f} ({fit['last'][name]:.2f})", claimed]
            holds &= claim is None or min(slope, fit["last"][name]) <= claim + SLACK
        lines.append("| " + " | ".join([*cells, "yes" if holds else "**no**"]) + " |")
    return "\n".join(lines)


FEW = 12  # rows that a page shows without a click


def whole(rows: list[dict[str, Any]], fold: bool = False) -> str:
    """The table of times, and that of growth where growth was claimed."""
    plain = [row for row in rows if row.get("grows") is None]
    shown = folded if fold and len(plain) > FEW else table
    parts = [shown(plain)] if plain or not rows else []
    if fits(rows):
        parts.append(fit_table(rows))
    elif len(plain) < len(rows):
        parts.append(table([row for row in rows if row.get("grows") is not None]))
    return "\n\n".join(parts)


def _listed(values: list[str], most: int = 3) -> str:
    found = list(dict.fromkeys(values))
    return ", ".join(found) if len(found) <= most else f"{len(found)} different ones, row by row"


def measured(rows: list[dict[str, Any]]) -> str:
    """When, on what and with which versions; each row has its own."""

    def of(key: str) -> str:
        return _listed([row[key].split("+")[0] for row in rows])

    days = sorted({row["date"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    where = of("device")
    if all("processor" in row for row in rows):
        where += f", {of('processor')}, instructions: {of('instructions')}"
    versions = f"torch {of('torch')}, Python {of('python')}"
    return f"Measured {when} on {where}; {versions}; commit {of('commit')}."


def compiled(path: Path) -> str:
    """The table of what was compiled for GPUs that were not there, a line for each kernel."""
    head, rows = json.loads(path.read_text("utf-8")), offline.read_report(path)
    targets = ", ".join(sorted({row["target"] for row in rows}))
    silent = sum("looped" not in row for row in rows)
    text = f"{len(rows)} kernels compiled {head['date']} for {targets}; Triton {head['triton']}"
    text += f", torch {head['torch']}; commit {head['commit']}."
    if silent:
        text += f" {silent} of them were compiled before their loops were looked at."
    kernels = f"<summary>The kernels</summary>\n\n{offline.kernels(rows)}"
    return f'{text}\n\n<details markdown="1">\n{kernels}\n\n</details>'


def with_section(text: str, page: str, name: str, content: str) -> str:
    """The text of a page with this content between ``<!-- NAME -->`` and ``<!-- end -->``."""
    shown = f"<!-- {name} -->\n\n{content}\n\n<!-- end -->"
    pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
    text, found = re.subn(pattern, lambda _: shown, text, count=1, flags=re.S)
    if not found:
        raise ValueError(f"{page} has no place for {name}: <!-- {name} --> <!-- end -->")
    return text


def page(text: str, results: Path, sections: tuple[str, ...] = (*SECTIONS, "offline")) -> str:
    """README.md with its tables renewed: all between ``<!-- NAME -->`` and ``<!-- end -->``.

    Each comes from results/NAME.jsonl, or offline.json; one without its file is left as it is.
    """
    for name in sections:
        path = results / ("offline.json" if name == "offline" else f"{name}.jsonl")
        if path.exists():
            if name == "offline":
                tables = compiled(path)
            else:
                rows = read(path)
                tables = f"{measured(rows)}\n\n{whole(rows, fold=True)}"
            text = with_section(text, "the page", name, tables)
    return text
