"""Pictures of committed rows: times, memory, and how near to the processor's limits they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import report, roofline, structured

# what grows along the length of a sequence, and what grows along the number of points
PANELS = {
    "rows and sequences": (
        ("adasplash forward+backward", "adasplash"),
        ("dsalt forward+backward", "dsalt"),
        ("diffmax", "diffmax, 64 rows"),
    ),
    "points and patterns": (
        ("FlashDiffusion product", "FlashDiffusion"),
        ("kNN graph, sparse, with its search", "kNN graph"),
        ("smoothing + association along the graph", "DAHN, graph"),
        ("association, dense", "Hopfield, dense"),
    ),
}


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")
    return plt.subplots(1, count, figsize=(7.2, 3.2), squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date, no version in the file: the same rows give the same bytes
    figure.savefig(path, metadata={"Software": None})
    return path


def growth(rows: list[dict[str, Any]], what: str, path: Path) -> Path:
    """log-log lines of time or memory against N; the legend has the slopes that were fitted."""
    figure, axes = _axes(len(PANELS))
    cases = {fit["case"].removeprefix("scaling/"): fit for fit in report.fits(rows)}
    unit = 1e3 if what == "time" else 1e-6
    for ax, (title, shown) in zip(axes[0], PANELS.items(), strict=True):
        for case, label in shown:
            fit = cases.get(case)
            if fit is None or what not in fit["series"]:
                continue
            values = [v * unit for v in fit["series"][what]]
            slope = f"{label}: N^{fit['fitted'][what]:.2f}"
            ax.loglog(fit["sizes"], values, "o-", label=slope)
        ax.set(xlabel="N", title=title)
        ax.set(ylabel="ms, one CPU thread" if what == "time" else "MB beyond the inputs")
        if not ax.lines:
            continue
        ax.xaxis.set_minor_formatter("")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend above the lines
        ax.legend(loc="upper left")
    return _save(figure, path)


def lengths(rows: list[dict[str, Any]], path: Path) -> Path:
    """dsalt and adasplash beside SDPA, forward and backward, from the table of the sweep."""
    figure, axes = _axes(2)
    cases = {
        "dsalt/attention forward+backward": "dsalt, 256 + 64 keys",
        "adasplash/attention forward+backward": "adasplash, α = 1.5",
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
            ax.loglog(*zip(*points, strict=True), "o-", label=name)
        ax.set(xlabel="N", ylabel="ms, forward + backward", title=label.split(",")[0])
        ax.set_xticks([N for N, _ in chosen], [str(N) for N, _ in chosen])
        ax.xaxis.set_minor_formatter("")
        # a label at 1, 2 and 5 of each power of ten that the times span
        low, high = ax.get_ylim()
        ticks = [m * 10**k for k in range(6) for m in (1, 2, 5) if low <= m * 10**k <= high]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.yaxis.set_minor_formatter("")
        ax.legend()
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
            ax.semilogx(*zip(*points, strict=True), "o-", label=f"ours, {layout}")
        peer = "softmax" if case.endswith("diffmax") else "SDPA"
        level = [row["seconds"][peer] * 1e3 for row in of_case]
        ax.axhline(sorted(level)[len(level) // 2], color="C5", ls="--", label=peer)
        ax.set(xlabel="share of weights", title=case.split("/")[1].removeprefix("attention "))
        ax.set(ylim=(0, None))
        shown = [d for d in structured.DENSITIES if d not in (0.3, 0.2)]
        ax.set_xticks(shown, map(str, shown))
        ax.minorticks_off()
    axes[0, 0].set_ylabel("ms, one CPU thread")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    labels[-1] = "SDPA, softmax: no row to solve"
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return _save(figure, path)


def rooflines(results: Path, path: Path) -> Path:
    """Operations per second of native rows against operations per byte, under both limits."""
    limits = roofline.peaks(results)
    figure, axes = _axes(len(limits))
    kinds = {"native_rows": "diffmax", "native_association": "Hopfield", "native_band": "dsalt"}
    for ax, (instructions, most) in zip(axes[0], limits.items(), strict=True):
        peak, copies = most["fma GFLOP/s"], most["copy GB/s"]
        for size, style, words in (
            ("1", ":", "copy in the cache"),
            ("1024", "--", "copy in memory"),
        ):
            end = peak / copies[size]
            ax.loglog((0.3, end), (0.3 * copies[size], peak), color="C5", ls=style, label=words)
        ax.axhline(peak, color="C5", label="multiply-adds")
        for name, module in roofline.MODULES.items():
            points: dict[str, list[tuple[float, float]]] = {}
            for row in report.read(results / f"{name}.jsonl"):
                if row["set"] != instructions:
                    continue
                for seconds, operations, size in module.work(row).values():
                    kind = kinds.get(name) or f"attention, {row['kind']}"
                    points.setdefault(kind, []).append(
                        (operations / size, operations / seconds / 1e9)
                    )
            for kind, seen in points.items():
                ax.loglog(*zip(*seen, strict=True), "o", label=kind)
        title = f"{instructions}: {peak:.0f} GFLOP/s"
        ax.set(xlabel="operations per byte", title=title, xlim=(0.3, 5000), ylim=(1, 2000))
    axes[0, 0].set_ylabel("GFLOP/s, one CPU thread")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return _save(figure, path)


def draw(results: Path, out: Path) -> list[Path]:
    """All pictures, from cpu.jsonl, density.jsonl, scaling.jsonl and the native rows."""
    sweep, density, scaling = (
        report.read(results / f"{name}.jsonl") for name in ("cpu", "density", "scaling")
    )
    return [
        lengths(sweep, out / "time_against_length.png"),
        densities(density, out / "time_against_density.png"),
        growth(scaling, "time", out / "time_against_n.png"),
        growth(scaling, "memory", out / "memory_against_n.png"),
        rooflines(results, out / "roofline.png"),
    ]
