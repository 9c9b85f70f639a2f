"""Few labels, many digits: a memory that shares labels among neighbours.

    python examples/few_label_memory.py [--digits 1000] [--splits 3] [--out lessons]

A Hopfield memory answers a digit by the labels of the stored digits that resemble it. With two
labels per class it has twenty patterns to answer from. A diffused memory stores all digits,
labelled or not: each label flows along the graph of nearest neighbours, so that most stored
digits get one before the first question is asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from difflayers import DiffusedHopfield, Hopfield

# no projections, no norms: the patterns are compared as they are
PLAIN = {"disable_out_projection": True} | {
    f"{prefix}{name}{suffix}": value
    for name in ("stored_pattern", "state_pattern", "pattern_projection")
    for prefix, suffix, value in (
        ("", "_as_static", True),
        ("normalize_", "", False),
        ("normalize_", "_affine", False),
    )
}
BETA = 32.0
FLOW = {
    "diffusion_mode": "ppr",
    "eta": 1.0,
    "restart": 0.02,
    "diffusion_steps": 30,
    "k_neighbors": 10,
    "diffuse_key": False,
    "diffuse_value": True,
}


class Split(NamedTuple):
    """Stored digits, their labels where known (one-hot, else zero), and digits to ask about."""

    stored: Tensor
    values: Tensor
    known: Tensor
    asked: Tensor
    answers: Tensor


def split(n_stored: int, per_class: int, seed: int) -> Split:
    """Digits in random order, centred, of unit length; the first `n_stored` are the memory."""
    from sklearn.datasets import load_digits

    X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X, y = X[order].float(), y[order]
    X = F.normalize(X - X[:n_stored].mean(0), dim=-1)
    known = torch.cat([(y[:n_stored] == c).nonzero()[:per_class, 0] for c in range(10)])
    values = torch.zeros(n_stored, 10)
    values[known, y[known]] = 1.0
    return Split(X[:n_stored], values, known, X[n_stored:], y[n_stored:])


@torch.no_grad()
def answers(memory: Hopfield, stored: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    return memory((stored[None], asked[None], values[None]))[0].argmax(-1)


def accuracies(part: Split) -> dict[str, float]:
    """Share of right answers of both memories."""
    plain = Hopfield(scaling=BETA, **PLAIN)
    diffused = DiffusedHopfield(scaling=BETA, **FLOW, **PLAIN)
    given = {
        "labelled digits only": (plain, part.stored[part.known], part.values[part.known]),
        "all digits, labels flow": (diffused, part.stored, part.values),
    }
    return {
        name: (answers(*memory, part.asked) == part.answers).double().mean().item()
        for name, memory in given.items()
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=1000, help="stored")
    parser.add_argument("--splits", type=int, default=3, help="to average over")
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    counts = (1, 2, 4, 8)
    curves: dict[str, list[float]] = {}
    for per_class in counts:
        runs = [accuracies(split(options.digits, per_class, s)) for s in range(options.splits)]
        for name in runs[0]:
            mean = sum(run[name] for run in runs) / len(runs)
            curves.setdefault(name, []).append(mean)
            print(f"{per_class} labels per class, {name}: {mean:.1%} right")

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    part = split(options.digits, 2, 0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), width_ratios=(1, 1.2))
    for name, curve in curves.items():
        left.plot(counts, [100 * share for share in curve], "o-", label=name)
    left.set(xlabel="labels per class", ylabel="% right", xticks=counts)
    left.set_title(f"{options.digits} stored digits, {options.splits} splits")
    left.legend()
    # two principal axes: enough to see where the labels are
    plane = part.stored @ torch.pca_lowrank(part.stored, 2, niter=4)[2]
    found = answers(
        DiffusedHopfield(scaling=BETA, **FLOW, **PLAIN), part.stored, part.values, part.stored
    )
    right.scatter(*plane.T, c=found, s=5, cmap="tab10", vmin=0, vmax=9)
    right.scatter(
        *plane[part.known].T,
        c=part.values[part.known].argmax(-1),
        s=70,
        cmap="tab10",
        vmin=0,
        vmax=9,
        marker="*",
        edgecolors="black",
    )
    right.set_title("20 labels (stars), and answers for the rest")
    right.set(xticks=[], yticks=[])
    figure.savefig(options.out / "few_label_memory.png")
    plt.close(figure)
    print(f"drew {options.out / 'few_label_memory.png'}")
    return {
        f"{n} per class, {name}": c
        for name, cs in curves.items()
        for n, c in zip(counts, cs, strict=True)
    }


if __name__ == "__main__":
    main()
