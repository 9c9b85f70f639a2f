"""What to diffuse: nothing, keys, queries, both, values, or the weights."""

from __future__ import annotations

from typing import Any

from . import digits
from .report import Result, command, spread

SETUPS: dict[str, dict[str, Any]] = {
    "keys": digits.KEYS,
    "queries": {**digits.KEYS, "diffuse_key": False, "diffuse_query": True},
    "keys and queries": {**digits.KEYS, "diffuse_query": True},
    "weights (logit)": digits.LOGITS,
    "values": digits.VALUES,
}


def run(seeds: list[int], quick: bool) -> Result:
    conditions = {"20 labels": (20, 0.0), "50 labels, noise 0.3": (50, 0.3)}
    rows: list[list[str]] = [["nothing (Hopfield)"]] + [[name] for name in SETUPS]
    for labels, noise in conditions.values():
        tasks = [digits.task(seed, labels, noise) for seed in seeds]
        rows[0].append(spread([digits.hopfield_score(t, quick) for t in tasks]))
        for row, options in zip(rows[1:], SETUPS.values(), strict=True):
            row.append(spread([digits.diffused_score(t, quick, **options) for t in tasks]))
    return Result(
        "What to diffuse: accuracy of few-label digit memories",
        ["diffused", *conditions],
        rows,
        f"Test accuracy, {len(seeds)} seeds; beta, k, eta, steps by validation.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("ablation", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
