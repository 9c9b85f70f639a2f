"""Smoothing the weights against smoothing what they read or are computed from."""

from __future__ import annotations

from typing import Any

from . import tasks
from .report import Result, command

SETUPS: dict[str, dict[str, Any]] = {
    "keys": tasks.KEYS,
    "weights (logit)": tasks.LOGITS,
    "values": tasks.VALUES,
}


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    counts = (20,) if quick else (10, 20, 50, 100, 200)
    chosen = [[tasks.task(data, seed, n, balanced=True) for seed in seeds] for n in counts]
    return [
        Result(
            f"Weights or features: memories of {data}, as many labels of each class",
            ["labels", *(str(n) for n in counts)],
            tasks.compare(SETUPS, chosen, quick),
            f"Test accuracy, {len(seeds)} seeds; settings by validation.",
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("logit_vs_feature", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
