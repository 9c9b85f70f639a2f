"""Heads that choose their own sparsity: α is a parameter, and the task decides.

    python examples/learned_alpha.py [--steps 300] [--out lessons]

Two attention heads get two jobs. One must copy the single key that matches its query among many
that almost match; the other must average over all keys that do. Both start at α = 1.5 and see
scores of the same size. The copying head becomes sparser (towards 2), the averaging head softer
(towards 1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from adasplash import AlphaParameter, adasplash


class TwoHeads(nn.Module):
    """Attention over given queries and keys; α of each head is all that there is to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = AlphaParameter(2, init=1.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return adasplash(q, k, v, self.alpha(), scale=0.06)


def batch(n: int = 32, d: int = 16, groups: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, 2, n, ·) and what each head should answer.

    Keys come in groups of n / groups near a centre. Head 0 is asked for the value of one key, head
    1 for the mean value of the key's group.
    """
    B = 16
    centres = 1.5 * torch.randn(B, groups, d)
    group = torch.arange(n) % groups
    k = (centres[:, group] + torch.randn(B, n, d))[:, None].expand(-1, 2, -1, -1)
    v = torch.randn(B, 1, n, 8).expand(-1, 2, -1, -1)
    q = torch.stack([k[:, 0], centres[:, group]], 1)
    same = (group[:, None] == group).float()
    mean = (same / same.sum(-1, keepdim=True)) @ v[:, 1]
    return q, k, v, torch.stack([v[:, 0], mean], 1)


def train(model: TwoHeads, steps: int) -> list[list[float]]:
    """Adam on the squared error; α of both heads after each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    path = []
    for _ in range(steps):
        q, k, v, wanted = batch()
        loss = (model(q, k, v) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(model.alpha().tolist())
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = TwoHeads()
    path = train(model, options.steps)
    copying, averaging = path[-1]
    print(f"alpha of the head that copies one key: 1.50 -> {copying:.2f}")
    print(f"alpha of the head that averages a group: 1.50 -> {averaging:.2f}")

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, ax = plt.subplots(figsize=(7.2, 3.0))
    ax.plot(path, label=["copies one key", "averages a group"])
    ax.set(xlabel="step", ylabel="α", ylim=(1, 2), title="Each head finds its own α")
    ax.legend()
    figure.savefig(options.out / "alpha.png")
    print(f"drew {options.out / 'alpha.png'}")


if __name__ == "__main__":
    main()
