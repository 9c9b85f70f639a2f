"""Hopfield against the six diffusion modes, all smoothing values."""

from __future__ import annotations

from . import digits
from .report import Result, command, spread

MODES = ("simple", "iterative", "factored", "ppr", "heat", "spectral")


def run(seeds: list[int], quick: bool) -> Result:
    tasks = [digits.task(seed, 20) for seed in seeds]
    rows = [["Hopfield", spread([digits.hopfield_score(t, quick) for t in tasks])]]
    for mode in MODES:
        options = {**digits.VALUES, "diffusion_mode": mode, "eta": 0.9}
        rows.append([mode, spread([digits.diffused_score(t, quick, **options) for t in tasks])])
    return Result(
        "Modes: accuracy of digit memories with 20 labels, values diffused",
        ["mode", "accuracy"],
        rows,
        f"Test accuracy, {len(seeds)} seeds; beta, k, steps, restart by validation; eta 0.9.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("mode_comparison", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
