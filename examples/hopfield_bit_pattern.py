"""Lesson 1: which bags hold a signal? Hopfield layers find bit patterns that nobody pointed at.

    python examples/hopfield_bit_pattern.py                # about fifteen seconds
    python examples/hopfield_bit_pattern.py --bags 256 --epochs 5 --out somewhere

A bag is a set of bit patterns. Half of the bags hold one of four signals, and only the bag has a
label. Each of the three layers stands between an encoder of a pattern and a linear read-out. Writes
bit_pattern.png to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers import Hopfield, HopfieldLayer, HopfieldPooling
from difflayers.auxiliary.data import BitPatternSet

plt.style.use("shared_kernels.pictures")

INSTANCES, BITS, SIGNALS = 16, 8, 4
SIZE = 32  # of an encoded pattern


class Bag(nn.Module):
    """bags (B, INSTANCES, BITS) -> logits (B,): encoder, Hopfield layer, maximum, read-out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(BITS, SIZE), nn.ReLU())
        self.layer, self.readout = layer, nn.Linear(SIZE, 1)

    def forward(self, bags: Tensor) -> Tensor:
        # (B, patterns retrieved, SIZE): one for HopfieldPooling, one per instance for the others
        return self.readout(self.layer(self.encoder(bags)).amax(1))[:, 0]


def make_models() -> dict[str, Bag]:
    return {
        # every instance asks the whole bag
        "Hopfield": Bag(Hopfield(SIZE, num_heads=4)),
        # one learned state asks the whole bag, three times: each answer is the next question
        "HopfieldPooling": Bag(HopfieldPooling(SIZE, num_heads=4, update_steps_max=2)),
        # every instance asks a learned memory of 16 patterns
        "HopfieldLayer": Bag(HopfieldLayer(SIZE, num_heads=4, quantity=16)),
    }


def make_bags(n: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bags, labels, and where the signals are (for the picture only). ``draw``: other bags."""
    data = BitPatternSet(n, INSTANCES, SIGNALS, num_bits=BITS, seed_data=draw)
    is_signal = (data.bags[:, :, None] == data.signals).all(-1).any(-1)
    return data.bags.float(), data.targets.float(), is_signal


@torch.no_grad()
def accuracy(model: Bag, bags: Tensor, labels: Tensor) -> float:
    return ((model(bags) > 0) == (labels > 0)).double().mean().item()


def train(model: Bag, bags: Tensor, labels: Tensor, held_out: tuple, epochs: int) -> list[float]:
    """Accuracy on the held-out bags after each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(32):
            loss = F.binary_cross_entropy_with_logits(model(bags[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(accuracy(model, *held_out))
    return curve


@torch.no_grad()
def signal_weight(model: Bag, bags: Tensor, labels: Tensor, is_signal: Tensor) -> tuple:
    """Weights (B, heads, INSTANCES) of a pooling, and each head's mean weight on the signals."""
    weights = model.layer.get_association_matrix(model.encoder(bags))[:, :, 0]
    return weights, (weights * is_signal[:, None]).sum(-1)[labels > 0].mean(0)


def draw(path: Path, curves: dict[str, list[float]], bag: Tensor, signal: Tensor, weights: Tensor):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7.2, 3.0), width_ratios=(2, 1, 1))
    for name, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, marker=".", label=name)
    left.set(xlabel="epoch", ylabel="accuracy on new bags", ylim=(0.4, 1.02))
    left.set_title("Three layers learn the signals")
    left.legend()
    middle.imshow(bag, cmap="Blues", aspect="auto")
    middle.set(title="a positive bag", xlabel="bit", ylabel="instance")
    colours = ["#d1682e" if s else "#1f3a68" for s in signal.tolist()]
    right.barh(range(len(weights)), weights, color=colours)
    right.set(title="weights", ylim=(len(weights) - 0.5, -0.5), xlim=(0, 1))
    right.set_xlabel("orange: the signal")
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bags", type=int, default=1024, help="to train on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("lessons"), help="folder of the picture")
    options = parser.parse_args(argv)
    torch.manual_seed(1)

    bags, labels, trained_signal = make_bags(options.bags, draw=1)
    new_bags, new_labels, is_signal = make_bags(512, draw=2)
    models, curves = make_models(), {}
    for name, model in models.items():
        curves[name] = train(model, bags, labels, (new_bags, new_labels), options.epochs)
        print(f"{name:<16} accuracy on 512 new bags {curves[name][-1]:.3f}")

    # What does the pooling look at? Heads specialise: take the one that sees the signals best
    # in the bags that were trained on (0.49, 0.82 and 0.99 with three seeds).
    model = models["HopfieldPooling"]
    head = signal_weight(model, bags, labels, trained_signal)[1].argmax()
    weights, shares = signal_weight(model, new_bags, new_labels, is_signal)
    on_signal = shares[head].item()
    print(f"weight of the best head on the signal {on_signal:.3f}; by chance {1 / INSTANCES:.3f}")

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bit_pattern.png"
    draw(path, curves, new_bags[0], is_signal[0], weights[0, head])
    print(f"picture: {path}")
    return {"on_signal": on_signal, **{name: curve[-1] for name, curve in curves.items()}}


if __name__ == "__main__":
    main()
