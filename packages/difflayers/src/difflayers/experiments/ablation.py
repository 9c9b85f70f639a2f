"""What to diffuse: nothing, keys, queries, both, values, or the weights."""

from __future__ import annotations

from typing import Any

from . import tasks
from .report import Result, command

SETUPS: dict[str, dict[str, Any]] = {
    "keys": tasks.KEYS,
    "queries": {**tasks.KEYS, "diffuse_key": False, "diffuse_query": True},
    "keys and queries": {**tasks.KEYS, "diffuse_query": True},
    "weights (logit)": tasks.LOGITS,
    "values": tasks.VALUES,
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "20 labels at random": {"labels": 20},
    "2 labels per class": {"labels": 20, "balanced": True},
    "50 at random, noise 0.8": {"labels": 50, "noise": 0.8},
}


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    chosen = [[tasks.task(data, seed, **c) for seed in seeds] for c in CONDITIONS.values()]
    return [
        Result(
            f"What to diffuse: few-label memories of {data}",
            ["diffused", *CONDITIONS],
            tasks.compare(SETUPS, chosen, quick),
            f"Test accuracy, {len(seeds)} seeds; beta, k, eta, steps by validation.",
            levels=False,
        )
    ]


def main(argv: list[str] | None = None) -> int:
    return command("ablation", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
