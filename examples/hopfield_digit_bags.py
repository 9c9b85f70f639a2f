"""Lesson 3: which bags of fifty handwritten digits hold a nine, and which digit is it?

    python examples/hopfield_digit_bags.py                 # about half a minute
    python examples/hopfield_digit_bags.py --bags 60 --epochs 5 --out somewhere

Multiple-instance learning: a positive bag holds one nine among 49 other digits, and only the bag
has a label. Three ways to pool a bag stand between the same encoder and the same read-out. Writes
digit_bags.png to --out. The measured comparison, with validation and several random splits, is
``python -m difflayers.experiments.digit_bags``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from difflayers.experiments.digit_bags import (
    N_TEST,
    N_VALIDATION,
    Bags,
    Classifier,
    Max,
    Mean,
    auc,
    bags,
    fit,
    hopfield,
)

# With one label for fifty digits some starts never find the nine: try settings, validation chooses.
POOLINGS = {
    "mean": [Mean],
    "max": [Max],
    "HopfieldPooling": [
        partial(hopfield, num_heads=4, scaling=0.25),
        partial(hopfield, num_heads=4, scaling=1.0, separation="entmax15"),
    ],
}


@torch.no_grad()
def weights_of(model: Classifier, images: Tensor) -> Tensor:
    """The weights (bags, heads, 50) of the pooling's one learned state."""
    return model.pool.get_association_matrix(model.encoder(images))[:, :, 0]


plt.style.use("shared_kernels.pictures")


def found_by_each_head(model: Classifier, part: Bags) -> Tensor:
    """Share of the positive bags in which a head's heaviest digit is the nine, (heads,)."""
    heaviest = weights_of(model, part.images).argmax(-1)
    return (heaviest == part.place[:, None])[part.labels > 0].double().mean(0)


@torch.no_grad()
def draw(
    path: Path, models: dict[str, Classifier], head: int, test: Bags, scores: dict[str, float]
) -> None:
    figure = plt.figure(figsize=(7.2, 3.0))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    axes = left.subplots()
    for name, model in models.items():
        wrong, found, _ = roc_curve(test.labels, model(test.images))
        axes.plot(wrong, found, label=f"{name} {scores[name]:.3f}")
    axes.set(
        xlabel="false alarms", ylabel="nines found", title=f"AUC on {len(test.labels)} new bags"
    )
    axes.legend(loc="lower right", handlelength=1)
    # the first positive bag: every digit, framed by its weight
    i = int(test.labels.argmax())
    weights = weights_of(models["HopfieldPooling"], test.images[i : i + 1])[0, head]
    right.suptitle(
        f"A bag with a nine (orange); thicker: weight in head {head + 1}",
    )
    for j, panel in enumerate(right.subplots(5, 10).flat):
        panel.imshow(test.images[i, j].view(8, 8), cmap="Greys")
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(True)
        for spine in panel.spines.values():
            spine.set_color("#d1682e" if j == test.place[i] else "#1f3a68")
            spine.set_linewidth(0.2 + 6 * weights[j].item() / weights.max().item())
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bags", type=int, default=400, help="to train on")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("lessons"), help="folder of the picture")
    options = parser.parse_args(argv)

    train, validation, test = bags(0, counts=(options.bags, N_VALIDATION, N_TEST))
    models, scores = {}, {}
    for name, settings in POOLINGS.items():
        best = -1.0
        for make in settings:
            torch.manual_seed(0)
            model = Classifier(make())
            score = fit(model, train, validation, 2e-3, options.epochs)
            if score > best:
                best, models[name] = score, model
        scores[name] = auc(models[name], test)
        print(f"{name:<16} AUC on {len(test.labels)} new bags {scores[name]:.3f}")

    # Heads look for different digits. Which one looks for nines? The validation bags say.
    head = int(found_by_each_head(models["HopfieldPooling"], validation).argmax())
    found = found_by_each_head(models["HopfieldPooling"], test)[head].item()
    print(f"head {head + 1}: its heaviest of 50 digits is the nine in {found:.0%} of the bags")
    print("that hold one; by chance in 2%")

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "digit_bags.png"
    draw(path, models, head, test, scores)
    print(f"picture: {path}")
    return {"found": found, **scores}


if __name__ == "__main__":
    main()
