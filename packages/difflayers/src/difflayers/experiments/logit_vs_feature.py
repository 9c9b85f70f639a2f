"""Smoothing the weights against smoothing what they read or are computed from."""

from __future__ import annotations

from typing import Any

from . import digits
from .report import Result, command, spread

SETUPS: dict[str, dict[str, Any]] = {
    "keys": digits.KEYS,
    "weights (logit)": digits.LOGITS,
    "values": digits.VALUES,
}


def run(seeds: list[int], quick: bool) -> Result:
    counts = (20,) if quick else (10, 20, 50, 100, 200)
    rows: list[list[str]] = [["Hopfield"]] + [[name] for name in SETUPS]
    for labels in counts:
        tasks = [digits.task(seed, labels) for seed in seeds]
        rows[0].append(spread([digits.hopfield_score(t, quick) for t in tasks]))
        for row, options in zip(rows[1:], SETUPS.values(), strict=True):
            row.append(spread([digits.diffused_score(t, quick, **options) for t in tasks]))
    return Result(
        "Weights or features: accuracy of digit memories",
        ["labels", *(str(n) for n in counts)],
        rows,
        f"Test accuracy, {len(seeds)} seeds; settings by validation.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("logit_vs_feature", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
