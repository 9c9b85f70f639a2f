"""Lesson 2: remember the first symbol of a sequence, however long the wait.

    python examples/hopfield_latch.py                      # about fifteen seconds
    python examples/hopfield_latch.py --sequences 256 --epochs 2 --out somewhere

A sequence starts with symbol A or B; noise follows, and at the end the network must say which it
was. An LSTM must carry the answer through every step, and has not learned to in so few epochs. A
Hopfield memory of the whole sequence looks it up, without any encoding of positions. With sparsemax
the noise weighs exactly nothing, so a longer sequence changes nothing. Look at the weights of the
softmax: a network may also find a shortcut, look for one symbol only, and take noise for the other.
Writes latch.png to --out.
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

from difflayers import HopfieldPooling
from difflayers.auxiliary.data import LatchSequenceSet

plt.style.use("shared_kernels.pictures")

CHARACTERS, TRAINED_ON = 8, 20


class LSTM(nn.Module):
    """The state after the last character, read by a linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(CHARACTERS, size, batch_first=True), nn.Linear(size, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.readout(self.lstm(sequences)[0][:, -1])[:, 0]


class Memory(nn.Module):
    """One learned state asks a memory of all characters; a linear layer reads the answer."""

    def __init__(self, size: int, separation: str) -> None:
        super().__init__()
        self.pooling = HopfieldPooling(
            CHARACTERS, hidden_size=size, output_size=size, scaling=1.0, separation=separation
        )
        self.readout = nn.Linear(size, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.readout(self.pooling(sequences)[:, 0])[:, 0]


def make_sequences(n: int, length: int, draw: int) -> tuple[Tensor, Tensor]:
    data = LatchSequenceSet(n, length, CHARACTERS, seed=draw)
    items = [data[i] for i in range(n)]
    return torch.stack([i["data"] for i in items]), torch.stack([i["target"] for i in items])


def train(model: nn.Module, sequences: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(32):
            loss = F.binary_cross_entropy_with_logits(model(sequences[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, sequences: Tensor, labels: Tensor) -> float:
    return ((model(sequences) > 0) == (labels > 0)).double().mean().item()


def draw(path: Path, lengths: Sequence[int], scores: dict[str, list[float]], weights: dict) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.0))
    for name, row in scores.items():
        dashed = "--" if "softmax" in name else "-"  # or it hides below the other
        axes[0].plot(lengths, row, dashed, marker="o", label=name, zorder=3 if dashed != "-" else 2)
    axes[0].axvline(TRAINED_ON, color="grey", ls=":", lw=1)
    axes[0].set(xscale="log", xlabel="length", ylabel="accuracy")
    axes[0].set(ylim=(0.4, 1.02), title="Right after a long wait")
    figure.legend(loc="outside lower center", ncols=3)
    for panel, (name, w) in zip(axes[1:], weights.items(), strict=True):
        image = panel.imshow(w, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        panel.set(title=f"weights, {name}", xlabel="position", ylabel="sequence")
    figure.colorbar(image, ax=axes[-1])
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1024, help="to train on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 60, 200, 600, 2000])
    parser.add_argument("--out", type=Path, default=Path("lessons"), help="folder of the picture")
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    sequences, labels = make_sequences(options.sequences, TRAINED_ON, draw=1)
    softmax, sparsemax = "HopfieldPooling, softmax", "HopfieldPooling, sparsemax"
    models = {"LSTM": LSTM(16), softmax: Memory(16, "softmax"), sparsemax: Memory(16, "sparsemax")}
    for model in models.values():
        train(model, sequences, labels, options.epochs)

    print(f"{'accuracy at length':<26}", *(f"{n:>6}" for n in options.lengths))
    tests = [make_sequences(128, n, draw=2) for n in options.lengths]
    scores = {name: [accuracy(m, *test) for test in tests] for name, m in models.items()}
    for name, row in scores.items():
        print(f"{name:<26}", *(f"{score:6.3f}" for score in row))

    shown, _ = make_sequences(12, 40, draw=3)
    weights = {
        name: models[name].pooling.get_association_matrix(shown)[:, 0, 0]
        for name in (softmax, sparsemax)
    }
    for name, w in weights.items():
        print(f"{name}: weight on the first of 40 positions {w[:, 0].mean():.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "latch.png"
    draw(path, options.lengths, scores, {k.split(", ")[1]: w for k, w in weights.items()})
    print(f"picture: {path}")
    return {**scores, "first": [w[:, 0].mean().item() for w in weights.values()]}


if __name__ == "__main__":
    main()
