"""How many diffusion steps: without restart the labels wash out, with restart they do not."""

from __future__ import annotations

from typing import Any

from . import tasks
from .report import Result, command, spread


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    counts = (1, 4) if quick else (1, 2, 3, 5, 10, 30, 100, 300)
    values: dict[str, Any] = {"eta": 0.9, "diffuse_key": False, "diffuse_value": True}
    setups: dict[str, dict[str, Any]] = {
        "values, iterative": {**values, "diffusion_mode": "iterative"},
        "values, ppr, restart 0.1": {**values, "diffusion_mode": "ppr"},
        "keys, iterative": {"eta": 0.5, "diffusion_mode": "iterative"},
    }
    chosen = [tasks.task(data, seed, 20, balanced=True) for seed in seeds]
    rows = []
    for name, options in setups.items():
        row = [name]
        for n in counts:
            settings = {**options, "k_neighbors": 10, "diffusion_steps": n}
            row.append(spread([tasks.diffused_score(t, quick, **settings) for t in chosen]))
        rows.append(row)
    return [
        Result(
            f"Steps: memories of {data}, 2 labels per class",
            ["steps", *(str(n) for n in counts)],
            rows,
            f"Test accuracy, {len(seeds)} seeds; beta by validation.",
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("steps_sweep", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
