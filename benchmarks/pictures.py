"""Pictures of committed rows: time against length, time against density, memory against N."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import report, structured

PANELS = (
    ("adasplash forward+backward", "adasplash"),
    ("dsalt forward+backward", "dsalt"),
    ("FlashDiffusion product", "FlashDiffusion"),
    ("diffmax", "diffmax (64 rows)"),
    ("kNN graph, sparse, with its search", "kNN graph, sparse"),
    ("smoothing + association along the graph", "DAHN along the graph"),
    ("association, dense", "Hopfield, dense"),
)


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, count, figsize=(4.6 * count, 3.6), squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # no date, no version in the file: the same rows give the same bytes
    figure.savefig(path, dpi=80, metadata={"Software": None})
    return path


def growth(rows: list[dict[str, Any]], what: str, path: Path) -> Path:
    """log-log lines of time or memory against N, with the slopes 1 and 2 beside them."""
    figure, axes = _axes(1)
    ax = axes[0, 0]
    cases = {fit["case"].removeprefix("scaling/"): fit for fit in report.fits(rows)}
    unit = 1e3 if what == "time" else 1e-6
    for case, label in PANELS:
        fit = cases.get(case)
        if fit is None or what not in fit["series"]:
            continue
        values = [v * unit for v in fit["series"][what]]
        ax.loglog(fit["sizes"], values, "o-", ms=3, label=f"{label}: {fit['fitted'][what]:.2f}")
    low, high = ax.get_xlim()
    bottom = ax.get_ylim()[0]
    for slope, style in ((1, ":"), (2, "--")):
        ends = [bottom * 1.5, bottom * 1.5 * (high / low) ** slope]
        ax.loglog([low, high], ends, style, color="grey", lw=1, label=f"slope {slope}")
    ax.set(xlabel="N", ylabel="ms" if what == "time" else "MB beyond the inputs")
    ax.set(title=f"{what} against N (one CPU thread)")
    ax.legend(fontsize=6)
    return _save(figure, path)


def lengths(rows: list[dict[str, Any]], path: Path) -> Path:
    """dsalt and adasplash beside SDPA, forward and backward, from the table of the sweep."""
    figure, axes = _axes(2)
    cases = {
        "dsalt/attention forward+backward": "dsalt, window 256 + 64 landmarks",
        "adasplash/attention forward+backward": "adasplash, sparse support",
    }
    for ax, (case, label) in zip(axes[0], cases.items(), strict=True):
        chosen = [
            (int(re.search(r"N=(\d+)", row["size"])[1]), row)
            for row in rows
            if row["case"] == case and not re.search(r"dense support|\.\.", row["size"])
        ]
        chosen.sort(key=lambda pair: pair[0])
        for contender, name in (("ours", label), ("SDPA", "SDPA")):
            points = [(N, row["seconds"][contender] * 1e3) for N, row in chosen]
            ax.loglog(*zip(*points, strict=True), "o-", ms=4, label=name)
        ax.set(xlabel="N", ylabel="ms, forward + backward", title=label.split(",")[0])
        ax.set_xticks([N for N, _ in chosen], [str(N) for N, _ in chosen])
        ax.xaxis.set_minor_formatter("")
        ax.legend(fontsize=8)
    return _save(figure, path)


def densities(rows: list[dict[str, Any]], path: Path) -> Path:
    """Time against the measured share of non-zero weights, in one piece and scattered."""
    cases = ("density/attention forward", "density/attention forward+backward", "density/diffmax")
    figure, axes = _axes(len(cases))
    for ax, case in zip(axes[0], cases, strict=True):
        of_case = [row for row in rows if row["case"] == case]
        for layout in ("in one piece", "scattered"):
            points = sorted(
                (row["density"], row["seconds"]["ours"] * 1e3)
                for row in of_case
                if row["size"].endswith(layout)
            )
            ax.semilogx(*zip(*points, strict=True), "o-", ms=4, label=f"ours, {layout}")
        peer = "softmax" if case.endswith("diffmax") else "SDPA"
        level = [row["seconds"][peer] * 1e3 for row in of_case]
        ax.axhline(sorted(level)[len(level) // 2], color="grey", ls="--", lw=1, label=peer)
        ax.set(xlabel="share of non-zero weights", ylabel="ms", title=case.split("/")[1])
        ax.set(ylim=(0, None))
        ax.set_xticks(structured.DENSITIES, map(str, structured.DENSITIES), fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return _save(figure, path)


def draw(results: Path, out: Path) -> list[Path]:
    """All pictures, from cpu.jsonl, density.jsonl and scaling.jsonl."""
    sweep, density, scaling = (
        report.read(results / f"{name}.jsonl") for name in ("cpu", "density", "scaling")
    )
    return [
        lengths(sweep, out / "time_against_length.png"),
        densities(density, out / "time_against_density.png"),
        growth(scaling, "time", out / "time_against_n.png"),
        growth(scaling, "memory", out / "memory_against_n.png"),
    ]
