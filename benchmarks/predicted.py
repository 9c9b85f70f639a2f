"""What the GPU rows will take on cards that are not here: the compiled code, executed and counted.

`python -m benchmarks.predicted` runs a part of each row on the CPU as compiled for sm_80, sm_90 and
sm_120, scales the counts to the whole row, and writes `results/predicted.json` and the page
docs/shared-kernels/predicted.md; `--targets sm_90 --cases dsalt` renews some rows, `--page` writes
the page alone. With `--state before` the rows say what other sources cost, put in front of these by
PYTHONPATH. A row's `measured_ms` is for the day a card is at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared_kernels.offline.prediction import CARDS, predicted
from shared_kernels.offline.ptx import Counters, executing

from . import structured

RESULTS = Path(__file__).parent / "results" / "predicted.json"
PAGE = Path(__file__).parents[1] / "docs" / "shared-kernels" / "predicted.md"
# The sources before interior tiles lost their masks and rows of the half types their single loads.
BEFORE = "624f510"


class Case(NamedTuple):
    """A row, the part of it that is run, and how often the whole holds that part."""

    name: str
    part: str
    run: Callable[[], Any]
    copies: int


def _rows(n: int, N: int) -> None:
    from diffmax import diffmax_bisect

    X = torch.randn(n, N).bfloat16().requires_grad_()
    diffmax_bisect(X, 0.5, backend="triton").sum().backward()


def _entmax(N: int, D: int) -> None:
    from adasplash import adasplash

    q, k, v = (x.bfloat16().requires_grad_() for x in structured.attention(N, 0.1, False, 1, D))
    adasplash(q, k, v, alpha=1.5, backend="triton").sum().backward()


def _window(N: int, backward: bool) -> None:
    from dsalt.kernels import dsalt_attention

    q, k, v = (torch.randn(1, 1, N, 64).bfloat16().requires_grad_(backward) for _ in range(3))
    windows = torch.full((1, 1, N), 256, dtype=torch.int32)
    landmarks = (torch.arange(64, dtype=torch.int32) * (N // 64)).expand(1, 1, -1)
    out = dsalt_attention(q, k, v, windows, landmarks, backend="triton")
    if backward:
        out.sum().backward()


def _product(N: int) -> None:
    from flashdiffusion import FlashDiffusion

    X, V = torch.randn(N, 50), torch.randn(N, 8)
    FlashDiffusion(X, X, V, beta=0.01, normalize="none", backend="triton")


CASES = (
    Case("diffmax f+b, bf16 [65536, 1024]", "64 rows", lambda: _rows(64, 1024), 1024),
    Case("diffmax f+b, bf16 [16384, 4096]", "16 rows", lambda: _rows(16, 4096), 1024),
    Case("diffmax f+b, bf16 [2048, 32768]", "4 rows", lambda: _rows(4, 32768), 512),
    Case(
        "adasplash f+b, bf16 B4 H32 D128 N=8192, share 0.1",
        "one head, N=2048",
        lambda: _entmax(2048, 128),
        4 * 32 * 16,
    ),
    Case(
        "adasplash f+b, bf16 B1 H16 D64 N=8192, share 0.1",
        "one head, N=1024",
        lambda: _entmax(1024, 64),
        16 * 64,
    ),
    Case(
        "dsalt forward, bf16 B1 H16 D64 N=32768 w=256 K=64",
        "one head, N=4096",
        lambda: _window(4096, False),
        16 * 8,
    ),
    Case(
        "dsalt f+b, bf16 B1 H16 D64 N=8192 w=256 K=64",
        "one head, N=2048",
        lambda: _window(2048, True),
        16 * 4,
    ),
    Case("FlashDiffusion, fp32 N=100000 d=50 r=8", "N=1000", lambda: _product(1000), 10000),
)


def rows(case: Case, target: str, state: str) -> list[dict[str, Any]]:
    """A row for each card of the target."""
    torch.manual_seed(0)
    counters = Counters()
    with executing(target, None, counters):
        case.run()
    out = []
    for card, what in CARDS.items():
        if what.target == target:
            found = predicted(what, counters, case.copies)
            row = {"case": case.name, "part": case.part, "card": card, "state": state}
            row |= {name: round(found.pop(name), 4) for name in ("bound_ms", "in_turn_ms")}
            out.append({**row, "measured_ms": None, "copies": case.copies, **found})
    return out


def _row_of_page(row: dict[str, Any]) -> str:
    shared = row["wavefronts"] / row["accesses"] if row["accesses"] else 1
    share = row["beside_products"] / row["instructions"]
    measured = "–" if row["measured_ms"] is None else f"{row['measured_ms']:.3g}"
    cells = (
        *(row["case"], row["card"], f"{row['instructions'] * row['copies'] / 1e6:,.0f}"),
        *(row["bound"], f"{row['bound_ms']:.3g}", f"{row['in_turn_ms']:.3g}", measured),
        *(f"{row['sectors'] / max(row['ideal'], 1):.2f}", f"{shared:.2f}"),
        f"{share:.0%}" if row["card"].startswith("H") else "–",
    )
    return "| " + " | ".join(cells) + " |"


def page(committed: list[dict[str, Any]]) -> str:
    """The page of the committed rows."""
    head = (
        *("row", "card", "million instructions of warps", "bound by", "at least, ms"),
        *("in turn, ms", "measured, ms", "sectors / ideal", "wavefronts / access"),
        "issued beside a product",
    )
    now = [row for row in committed if row["state"] == "now"]
    lines = [
        "# Predicted times",
        "",
        "No GPU has run these rows yet. The code that Triton compiled for each card was executed",
        "on a CPU, a part of each row, and what it executed was counted and scaled to the whole",
        "row. `At least` lets all units of a card work at once; `in turn` lets nothing of a",
        "processor overlap its tensor cores. The units' rates, and what is left out, stand in",
        "`shared_kernels.offline.prediction`; `python -m benchmarks.predicted` renews the page,",
        "and `benchmarks/results/predicted.json` holds the counts. Of attention over clusters a",
        "shorter part is run, whose tiles hold a weight more often than those of the whole row:",
        "its times are too long. The column `measured` is empty until a card fills it.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---|--:|---|" + "--:|" * (len(head) - 4),
        *(_row_of_page(row) for row in now),
        "",
        f"## Against the sources of {BEFORE}",
        "",
        "The same count of the sources before these changes: masks at the edges of tiles alone,",
        "rows of the half types in whole vectors, no fast logarithm at a small s, 64-bit products",
        "of addresses once in a loop, sums over columns in place of one in each tile, other tiles.",
        "",
        "| row | card | instructions | at least | in turn | sectors / ideal, before → now |",
        "|---|---|--:|--:|--:|--:|",
    ]
    before = {(r["case"], r["card"]): r for r in committed if r["state"] == "before"}
    for row in now:
        old = before.get((row["case"], row["card"]))
        if old is None:
            continue
        ratios = (row[name] / old[name] for name in ("instructions", "bound_ms", "in_turn_ms"))
        sectors = (f"{r['sectors'] / max(r['ideal'], 1):.2f}" for r in (old, row))
        cells = (row["case"], row["card"], *(f"{x:.2f}×" for x in ratios), " → ".join(sectors))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--targets", default="sm_80,sm_90,sm_120")
    parser.add_argument("--cases", default="", help="rows whose name contains this")
    parser.add_argument("--state", default="now", choices=("now", "before"))
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args(arguments)
    order = [case.name for case in CASES]
    for target in [] if options.page else options.targets.split(","):
        for case in CASES:
            if options.cases not in case.name:
                continue
            new = rows(case, target, options.state)
            keys = {(r["case"], r["card"], r["state"]) for r in new}
            kept = [r for r in read() if (r["case"], r["card"], r["state"]) not in keys]
            whole = sorted(
                kept + new, key=lambda r: (r["state"], order.index(r["case"]), r["card"])
            )
            text = ",\n".join("  " + json.dumps(r) for r in whole)
            RESULTS.write_text('{"rows": [\n' + text + "\n]}\n", encoding="utf-8")
            sys.stdout.write(f"{new[0]}\n")
            sys.stdout.flush()
    PAGE.write_text(page(read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
