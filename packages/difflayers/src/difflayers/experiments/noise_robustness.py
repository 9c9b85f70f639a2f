"""Few-label memories under growing noise."""

from __future__ import annotations

from . import digits
from .report import Result, command, spread


def run(seeds: list[int], quick: bool) -> Result:
    levels = (0.0, 0.3) if quick else (0.0, 0.15, 0.3, 0.45, 0.6)
    rows: list[list[str]] = [["Hopfield"], ["key diffusion"], ["value diffusion"]]
    for noise in levels:
        tasks = [digits.task(seed, 50, noise) for seed in seeds]
        rows[0].append(spread([digits.hopfield_score(t, quick) for t in tasks]))
        for row, options in ((rows[1], digits.KEYS), (rows[2], digits.VALUES)):
            row.append(spread([digits.diffused_score(t, quick, **options) for t in tasks]))
    return Result(
        "Noise: accuracy of digit memories with 50 labels",
        ["noise per pixel", *(f"{n:g}" for n in levels)],
        rows,
        f"Test accuracy, {len(seeds)} seeds; settings by validation at each level.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("noise_robustness", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
