"""How many diffusion steps: without restart the labels wash out, with restart they do not."""

from __future__ import annotations

from typing import Any

from . import digits
from .report import Result, command, spread


def run(seeds: list[int], quick: bool) -> Result:
    counts = (1, 4) if quick else (1, 2, 3, 5, 10, 30, 100, 300)
    common: dict[str, Any] = {"eta": 0.9, "k_neighbors": 10, "diffuse_key": False}
    modes = {"iterative": "iterative", "ppr, restart 0.1": "ppr"}
    tasks = [digits.task(seed, 20) for seed in seeds]
    rows: list[list[str]] = []
    for name, mode in modes.items():
        scores = [
            [
                digits.diffused_score(
                    t, quick, diffusion_mode=mode, diffusion_steps=n, diffuse_value=True, **common
                )
                for t in tasks
            ]
            for n in counts
        ]
        rows.append([f"values, {name}", *(spread(s) for s in scores)])
    keys: dict[str, Any] = {"eta": 0.5, "k_neighbors": 10}
    scores = [
        [digits.diffused_score(t, quick, diffusion_steps=n, **keys) for t in tasks] for n in counts
    ]
    rows.append(["keys", *(spread(s) for s in scores)])
    return Result(
        "Steps: accuracy of digit memories with 20 labels",
        ["steps", *(str(n) for n in counts)],
        rows,
        f"Test accuracy, {len(seeds)} seeds; beta by validation.",
    )


def main(argv: list[str] | None = None) -> int:
    return command("steps_sweep", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
