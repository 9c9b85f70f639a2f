"""Retrieval over a memory of labelled digits, in the coordinates of a diffusion map.

    python examples/retrieval_model.py [--out lessons]

    pixels ─► diffusion map (flashdiffusion) ─► query of a Hopfield memory (difflayers)
                                                with diffmax weights (diffmax): exact zeros
           ─► weighted labels of the digits that were retrieved

The map is fitted once, on labelled and unlabelled digits together; the memory's projections and the
sparsity of its weights are trained. As the weights have exact zeros, an answer can be explained
by the few digits that it came from, and these are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers import Hopfield
from diffmax import DiffmaxBisectModule, HillMap
from flashdiffusion import DiffusionMap


class Retrieval(nn.Module):
    """Features (B, d) -> log-probabilities (B, classes), read from stored labels."""

    def __init__(self, stored: Tensor, labels: Tensor, n_classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("stored", stored[None])
        self.register_buffer("values", F.one_hot(labels, n_classes).to(stored.dtype)[None])
        self.sparsity = DiffmaxBisectModule(alpha=0.5, alpha_map=HillMap())
        self.memory = Hopfield(
            input_size=stored.shape[1],
            hidden_size=32,
            pattern_projection_size=n_classes,
            pattern_projection_as_static=True,
            normalize_pattern_projection=False,
            normalize_pattern_projection_affine=False,
            disable_out_projection=True,
            scaling=1.0,
            separation=lambda scores, dim: self.sparsity(scores),
        )

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.memory((self.stored, x[None], self.values))[0]
        # one floor for every class: a class that nothing retrieved would cost infinitely much
        return (0.99 * probabilities + 0.001).log()

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """(B, stored): how much of each stored digit an answer is made of."""
        return self.memory.get_association_matrix((self.stored, x[None], self.values))[0, 0]


def digits(n_fit: int = 1200) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 64), labels (N,), and diffusion coordinates fitted on the first n_fit."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).numpy()
    X, y = X[order], y[order]
    dm = DiffusionMap(n_components=12, beta="median", alpha=0.5).fit(X[:n_fit])
    coordinates = torch.as_tensor(dm.transform(X), dtype=torch.float32)
    return torch.as_tensor(X), torch.as_tensor(y), coordinates / coordinates[:n_fit].std()


def train(model: Retrieval, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Adam on all given rows; the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = F.nll_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    images, labels, x = digits()
    memory, practice, held_out = slice(0, 200), slice(200, 600), slice(1200, None)
    model = Retrieval(x[memory], labels[memory])
    nearest = torch.cdist(x[held_out], x[memory]).argmin(1)
    before = (labels[memory][nearest] == labels[held_out]).float().mean()
    losses = train(model, x[practice], labels[practice], options.steps)
    after = (model(x[held_out]).argmax(1) == labels[held_out]).float().mean()
    shown = model.weights(x[held_out])
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"accuracy on {len(shown)} digits never seen: {after:.3f}")
    print(f"the nearest stored digit, without training: {before:.3f}")
    print(f"stored digits behind an answer: {(shown > 0).sum(1).float().mean():.1f} of 200")
    print(f"alpha: {model.sparsity.alpha.item():.2f}")

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(4, 6, figsize=(7.2, 5))
    for row in range(4):
        best = shown[row].topk(5)
        pictures = [images[held_out][row], *images[memory][best.indices]]
        titles = ["asked", *(f"{weight:.2f}" if weight else "0" for weight in best.values)]
        for ax, picture, title in zip(axes[row], pictures, titles, strict=True):
            ax.imshow(picture.view(8, 8).numpy(), cmap="gray_r")
            ax.set_title(title)
            ax.set_axis_off()
    figure.suptitle("Left: a held-out digit. Right: the stored digits its answer is made of")
    figure.savefig(options.out / "retrieved.png")
    print(f"drew {options.out / 'retrieved.png'}")


if __name__ == "__main__":
    main()
