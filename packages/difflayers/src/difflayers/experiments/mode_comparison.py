"""Hopfield against the six diffusion modes, all smoothing values."""

from __future__ import annotations

from . import tasks
from .report import Result, command

MODES = ("simple", "iterative", "factored", "ppr", "heat", "spectral")


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    common = {**tasks.VALUES, "eta": 0.9, "scaling": (16.0, 32.0), "restart": 0.05}
    setups = {mode: {**common, "diffusion_mode": mode} for mode in MODES}
    chosen = [
        [tasks.task(data, seed, 20, balanced=balanced) for seed in seeds]
        for balanced in (False, True)
    ]
    return [
        Result(
            f"Modes: memories of {data} with 20 labels, values diffused",
            ["mode", "labels at random", "2 labels per class"],
            tasks.compare(setups, chosen, quick),
            f"Test accuracy, {len(seeds)} seeds; beta, k, steps by validation; eta 0.9.",
            levels=False,
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("mode_comparison", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
