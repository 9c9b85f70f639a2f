"""Which bags of digits hold a nine? Multiple-instance learning with six ways to pool a bag.

A bag is 50 handwritten digits, drawn from images that no other part has seen; half of the bags hold
one nine among 49 other digits, the others none. Only the bag has a label. Every pooling stands
between the same encoder of an image and the same linear read-out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..learned import HopfieldPooling
from . import tasks
from .report import Result, command, spread

TARGET, BAG = 9, 50
N_TRAIN, N_VALIDATION, N_TEST = 200, 200, 500
WIDTH, EPOCHS, BATCH = 64, 40, 16


class Bags(NamedTuple):
    """Images (bags, BAG, 64), labels (bags,) and each bag's place of the nine (0 where none is)."""

    images: Tensor
    labels: Tensor
    place: Tensor


def bags(
    seed: int, size: int = BAG, counts: Sequence[int] = (N_TRAIN, N_VALIDATION, N_TEST)
) -> list[Bags]:
    """Bags to train on, to validate and to test, of disjoint images."""
    X, y = tasks.digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(X), generator=generator)
    parts = order.tensor_split((1000, 1300))
    out = []
    for images, n in zip(parts, counts, strict=True):
        nines, others = images[y[images] == TARGET], images[y[images] != TARGET]
        chosen = others[torch.randint(len(others), (n, size), generator=generator)]
        one = nines[torch.randint(len(nines), (n, 1), generator=generator)]
        place = torch.randint(size, (n, 1), generator=generator)
        labels = torch.arange(n) % 2
        mixed = chosen.scatter(1, place, one)
        chosen = torch.where(labels[:, None] == 1, mixed, chosen)
        out.append(Bags(X[chosen], labels.float(), place[:, 0] * labels))
    return out


class AttentionPooling(nn.Module):
    """sum_i softmax_i(w tanh(V h_i) [* sigmoid(U h_i)]) h_i (Ilse, Tomczak and Welling 2018)."""

    def __init__(self, size: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.content, self.score = nn.Linear(size, hidden), nn.Linear(hidden, 1)
        self.gate = nn.Linear(size, hidden) if gated else None

    def forward(self, h: Tensor) -> Tensor:
        a = torch.tanh(self.content(h))
        if self.gate is not None:
            a = a * torch.sigmoid(self.gate(h))
        return (torch.softmax(self.score(a), 1) * h).sum(1)


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


class Max(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.amax(1)


class Classifier(nn.Module):
    """images (bags, n, 64) -> logits (bags,): encoder, ``pool`` over the bag, linear read-out."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
        self.pool, self.output = pool, nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.output(self.pool(self.encoder(images)))
        return scores[:, 0]


def hopfield(**options: Any) -> HopfieldPooling:
    return HopfieldPooling(WIDTH, flatten=True, **options)


# Two settings of each that has any, times two learning rates.
POOLINGS: dict[str, list[Callable[[], nn.Module]]] = {
    "mean": [Mean],
    "max": [Max],
    "attention": [partial(AttentionPooling, WIDTH, n, False) for n in (32, 128)],
    "gated attention": [partial(AttentionPooling, WIDTH, n, True) for n in (32, 128)],
    "HopfieldPooling, softmax (as hflayers)": [
        partial(hopfield, num_heads=4, scaling=beta) for beta in (0.25, 1.0)
    ],
    "HopfieldPooling, entmax 1.5": [
        partial(hopfield, num_heads=4, scaling=beta, separation="entmax15") for beta in (0.25, 1.0)
    ],
}
RATES = (1e-3, 3e-3)


def auc(model: nn.Module, part: Bags) -> float:
    """Chance that a bag with a nine scores higher than one without."""
    from sklearn.metrics import roc_auc_score

    model.eval()
    with torch.no_grad():
        return float(roc_auc_score(part.labels, model(part.images)))


def fit(model: nn.Module, train: Bags, validation: Bags, rate: float, epochs: int) -> float:
    """Train; leave the model in the state that validated best, and return that AUC."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    best, kept = -1.0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        for part in torch.randperm(len(train.labels)).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(model(train.images[part]), train.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0 or epoch == epochs:
            score = auc(model, validation)
            if score > best:
                best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def run(data: str, seeds: list[int], quick: bool) -> list[Result]:
    rates, epochs = (RATES[1:], 10) if quick else (RATES, EPOCHS)
    rows = []
    for name, pools in POOLINGS.items():
        tried = [(make, rate) for make in (pools[:1] if quick else pools) for rate in rates]
        scores = [_score(seed, tried, epochs) for seed in seeds]
        rows.append([name, spread(scores)])
    return [
        Result(
            f"Which bags of {BAG} {data} hold a nine",
            ["pooling", "test AUC"],
            rows,
            f"{N_TRAIN} bags to train on, {N_VALIDATION} to choose learning rate, epoch and "
            f"settings by (2 for mean and max, 4 for the others), {N_TEST} to test, of disjoint "
            f"images; {len(seeds)} seeds.",
            levels=False,
        )
    ]


def _score(seed: int, tried: list[tuple[Callable[[], nn.Module], float]], epochs: int) -> float:
    """Test AUC of the setting that validates best."""
    train, validation, test = bags(seed)
    best, chosen = -1.0, 0.0
    for make, rate in tried:
        torch.manual_seed(seed)
        model = Classifier(make())
        score = fit(model, train, validation, rate, epochs)
        if score > best:
            best, chosen = score, auc(model, test)
    return chosen


def main(argv: list[str] | None = None) -> int:
    return command("digit_bags", run, argv, data=("digits",), seeds=5)


if __name__ == "__main__":
    raise SystemExit(main())
