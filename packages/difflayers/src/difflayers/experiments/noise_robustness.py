"""Growing noise: the class of a pattern from few labels, and which stored pattern it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffused_attention import DiffusedHopfield
from ..hopfield import Hopfield
from . import tasks
from .report import Result, command, spread

SETUPS: dict[str, dict[str, Any]] = {
    "key diffusion": tasks.KEYS,
    "weight (logit) diffusion": tasks.LOGITS,
    "value diffusion": tasks.VALUES,
}
N_QUERIES = 250


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    levels = (0.0, 0.8) if quick else (0.0, 0.4, 0.8, 1.2, 1.6)
    few = [[tasks.task(data, seed, 50, noise) for seed in seeds] for noise in levels]
    columns = ["noise", *(f"{n:g}" for n in levels)]
    return [
        Result(
            f"Noise: memories of {data} with 50 labels at random",
            columns,
            tasks.compare(SETUPS, few, quick),
            f"Test accuracy, {len(seeds)} seeds; settings by validation at each level; noise per "
            "dimension, of stored patterns and queries alike, in units of the data's deviation.",
        ),
        Result(
            f"Noise: which of 1000 stored {data} was it",
            columns,
            _which(data, seeds, levels, quick),
            f"Share of {N_QUERIES} noisy copies of stored patterns for which the largest weight "
            f"is on the original, {len(seeds)} seeds; settings by validation on other noise.",
        ),
    ]


def _which(data: str, seeds: list[int], levels: tuple[float, ...], quick: bool) -> list[list[str]]:
    """1-NN, Hopfield with two associations, and the same with diffused keys."""
    betas = (16.0, 64.0)
    plain = [Hopfield(scaling=b, update_steps_max=1, **tasks.STATIC) for b in betas]
    diffused: list[Hopfield] = [
        DiffusedHopfield(**settings, update_steps_max=1, **tasks.STATIC)
        for settings in tasks.grid(
            quick, scaling=betas, k_neighbors=(5, 10), eta=(0.05, 0.2), diffusion_steps=1
        )
    ]
    rows = [["nearest stored pattern"], ["Hopfield"], ["keys diffused"]]
    for noise in levels:
        scores: list[list[float]] = [[], [], []]
        for seed in seeds:
            memory = tasks.task(data, seed).stored
            (tune, target), (test, answer) = (_noisy(memory, noise, seed, i) for i in (1, 2))
            scores[0].append(_share(test @ memory.mT, answer))
            for found, layers in ((scores[1], plain), (scores[2], diffused)):
                best = max(layers, key=lambda m: _share(_weights(m, memory, tune), target))
                found.append(_share(_weights(best, memory, test), answer))
        for row, found in zip(rows, scores, strict=True):
            row.append(spread(found))
    return rows


def _noisy(memory: Tensor, noise: float, seed: int, part: int) -> tuple[Tensor, Tensor]:
    """Copies of stored patterns (unit length) with noise, and which they are."""
    generator = torch.Generator().manual_seed(10 * seed + part)
    chosen = torch.randperm(len(memory), generator=generator)[:N_QUERIES]
    copies = memory[chosen]
    return copies + noise * memory.std() * torch.randn(copies.shape, generator=generator), chosen


def _weights(layer: Hopfield, memory: Tensor, query: Tensor) -> Tensor:
    return layer.get_association_matrix((memory[None], query[None], memory[None]))[0, 0]


def _share(scores: Tensor, answer: Tensor) -> float:
    return (scores.argmax(-1) == answer).double().mean().item()


def main(argv: list[str] | None = None) -> int:
    return command("noise_robustness", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
