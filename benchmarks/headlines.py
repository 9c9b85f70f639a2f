"""The measured results that the front pages show, each from one committed row.

A figure on two pages is written by one function from one row, so that the pages cannot disagree.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from . import report, roofline

ROOT = Path(__file__).resolve().parent.parent


class Result(NamedTuple):
    """One line of the table: a row by its case and size, and what it is set beside."""

    words: str
    package: str
    case: str
    size: str
    peer: str
    peer_words: str


RESULTS = (
    Result(
        "attention over 16 384 tokens, forward and backward: a window of 256 and 64 landmarks",
        "dsalt",
        "dsalt/attention forward+backward",
        "B1 H8 D64 N=16384 w=256 K=64",
        "SDPA",
        "PyTorch's dense attention (SDPA)",
    ),
    Result(
        "sparse attention over 4096 tokens, forward and backward, α = 1.5",
        "adasplash",
        "adasplash/attention forward+backward",
        "B1 H4 D64 N=4096, sparse support, causal",
        "SDPA",
        "PyTorch's dense attention (SDPA)",
    ),
    Result(
        "sparse weights of 8 rows of 65 536 scores, α = 0.5",
        "diffmax",
        "diffmax/forward",
        "[8, 65536] alpha=0.5",
        "entmax",
        "`entmax_bisect` of the package entmax",
    ),
    Result(
        "diffusion map of 20 000 points, 8 eigenvectors to 1e-6",
        "flashdiffusion",
        "flashdiffusion/DiffusionMap.fit",
        "N=20000 d=3, 8 components, tol 1e-6",
        "dense fp32 + eigsh",
        "the dense matrix and SciPy's `eigsh`",
    ),
    Result(
        "diffusion map of 2000 points, 4 eigenvectors",
        "flashdiffusion",
        "peers/DiffusionMap.fit",
        "swiss roll, N=2000, 4 components, beta=20",
        "flashdiffusion 0.1.2",
        "the published flashdiffusion 0.1.2",
    ),
    Result(
        "a Hopfield memory of 1024 patterns smoothed over their graph",
        "difflayers",
        "peers/DiffusedHopfield forward",
        "B1 S1024 L1024 d64 k8, 3 steps, cached graph",
        "difflayers 0.1.1",
        "the published difflayers 0.1.1",
    ),
)


def rows(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The committed rows by case and size."""
    files = (results / f"{name}.jsonl" for name in report.SECTIONS)
    return {(row["case"], row["size"]): row for path in files for row in report.read(path)}


def times(value: float) -> str:
    """A ratio in two figures and a half: 85×, 12.5×, 1.42×."""
    return f"{value:.0f}×" if value >= 20 else f"{value:.3g}×"


def table(results: Path) -> str:
    """What, ours, the other, how many times faster."""
    committed = rows(results)
    lines = ["| what | ours | beside | times faster |", "|---|---|---|---|"]
    for each in RESULTS:
        seconds = committed[each.case, each.size]["seconds"]
        ours, peer = seconds["ours"], seconds[each.peer]
        cells = [
            f"{each.package}: {each.words}",
            report.duration(ours),
            f"{each.peer_words}: {report.duration(peer)}",
            f"**{times(peer / ours)}**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


SHAPES = ("[8192, 64]", "[1024, 512]", "[128, 4096]", "[8, 65536]")
ALPHAS = ("0.05", "0.3", "0.5", "0.85")


def diffmax(results: Path) -> str:
    """diffmax beside softmax and entmax, forward and backward, a table for each."""
    committed = rows(results)
    parts = []
    for direction in ("forward", "backward"):
        head = [f"{direction}, rows", *(f"α = {alpha}" for alpha in ALPHAS)]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for shape in SHAPES:
            cells = [shape.strip("[]").replace(", ", " × ")]
            for alpha in ALPHAS:
                row = committed[f"diffmax/{direction}", f"{shape} alpha={alpha}"]
                seconds = row["seconds"]
                slower = times(seconds["ours"] / seconds["softmax"])
                cells.append(f"{times(seconds['entmax'] / seconds['ours'])}, {slower}")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    measured = report.measured([row for (case, _), row in committed.items() if "diffmax/" in case])
    return "\n\n".join([measured, *parts])


KINDS = ("noise", "clustered", "local", "flat")


def adasplash(results: Path) -> str:
    """Attention on the native library beside SDPA: the share of its time, by kind of scores."""
    committed = report.read(results / "native_attention.jsonl")
    which = ("set", "matrix_set", "kind", "pass", "N")
    share = {tuple(row[name] for name in which): row["ratio"] for row in committed}
    columns = [(name, N) for name in ("forward", "forward+backward") for N in (1024, 4096)]
    pairs = (("avx512", "AVX512"), ("avx2", "AVX2"), ("avx512", "AVX2"))
    head = ["scores", *(f"{name.replace('+', ' + ')}, N = {N}" for name, N in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in KINDS:
        cells = [f"`{kind}`"]
        for column in columns:
            wide, narrow, unlike = (share[(*sets, kind, *column)] for sets in pairs)
            cells.append(f"{wide:.2f} ({narrow:.2f}; {unlike:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    last = committed[-1]
    measured = f"Measured {last['date']} on {last['device']}; commit {last['commit']}."
    return "\n\n".join([measured, "\n".join(lines)])


ATTENTION, MODEL = "B1 H8 D64 N={} w=256 K=64", "d128 L4 H4 B{} w=16..128 K=16"
# what is timed in words, the length in words, case and size of the row
SHARES = (
    *(
        (
            "attention, forward and backward; 8 heads of 64, windows of 256, 64 landmarks",
            str(N),
            "dsalt/attention forward+backward",
            ATTENTION.format(N),
        )
        for N in (2048, 4096, 8192, 16384)
    ),
    *(
        (
            "a training step; d 128, 4 layers, windows of 16 to 128, 16 landmarks",
            words,
            "dsalt/training step",
            MODEL.format(size),
        )
        for words, size in (("8 x 256", "8 N=256"), ("4096", "1 N=4096"))
    ),
    (
        "generating 64 tokens after 960 with a cache, beside the time without a cache",
        "1024",
        "dsalt/generation with a cache",
        "d128 L4 H4 B1 960 + 64 tokens",
    ),
    *(
        (
            "scoring and choosing landmarks, beside the forward attention that uses them",
            str(N),
            "dsalt/landmarks forward",
            ATTENTION.format(N),
        )
        for N in (4096, 16384)
    ),
)


def dsalt(results: Path) -> str:
    """The share of its peer's time that dsalt takes."""
    committed, shown = rows(results), []
    lines = ["| what | length | share of the time |", "|---|---|---|"]
    for words, length, case, size in SHARES:
        shown.append(committed[case, size])
        seconds = dict(shown[-1]["seconds"])
        share = seconds.pop("ours") / min(seconds.values())
        lines.append(f"| {words} | {length} | {share:.2f} |")
    return "\n\n".join([report.measured(shown), "\n".join(lines)])


MAP = "flashdiffusion/DiffusionMap.fit", "N=20000 d=3, 8 components, tol 1e-6"
SEARCH = "difflayers/kNN, sqeuclidean", "N=10000 d=64 k=10"


def flashdiffusion(results: Path) -> str:
    """What the native library saves of a map, and of an exact search, in sentences."""
    committed = rows(results)
    fit, search = (committed[row]["seconds"] for row in (MAP, SEARCH))
    without, other = fit["without the native library"], search["scikit-learn"]
    parts = (
        f"With the native library a map of 20 000 points takes {report.duration(fit['ours'])}",
        f"on one thread, without it {report.duration(without)} ({times(without / fit['ours'])}).",
        "The exact search of the 10 nearest among 10 000 points in 64 dimensions takes",
        f"{report.duration(search['ours'])}, scikit-learn's {report.duration(other)}",
        f"({times(other / search['ours'])}).",
    )
    return textwrap.fill(" ".join(parts), 112)


# page → the tables it shows, between `<!-- NAME -->` and `<!-- end -->`
PAGES = {
    "README.md": {"results": table},
    "benchmarks/README.md": {"results": table, "roofline": roofline.table},
    "packages/diffmax/README.md": {"speed": diffmax},
    "packages/adasplash/README.md": {"attention": adasplash},
    "packages/dsalt/README.md": {"time": dsalt},
    "packages/flashdiffusion/README.md": {"gain": flashdiffusion},
}


def renewed(text: str, page: str, results: Path) -> str:
    """The text of a page of `PAGES` with its tables made from the committed rows."""
    for name, make in PAGES[page].items():
        text = report.with_section(text, page, name, make(results))
    return text


def renew(results: Path) -> None:
    """Write every page of `PAGES` anew."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(renewed(path.read_text("utf-8"), page, results), "utf-8")
