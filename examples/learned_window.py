"""A window that learns how far to look, from the loss alone.

    python examples/learned_window.py [--steps 250] [--out lessons]

Each position must repeat the token that came `lag` positions before it. A window has a soft edge
of 8 tokens: a key inside the edge is seen faintly, and the gradient of the loss widens the window
until it is seen well. A small price per token of window (the regulariser) takes back what is not
needed. With a lag of 20 a window must grow, with a lag of 4 all can shrink; both start alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsalt.modules import DSALTAttention, window_regulariser


class Repeater(nn.Module):
    """Embedding, one layer of window attention, a head."""

    def __init__(self, vocab: int = 12, d_model: int = 32, n_max: int = 40) -> None:
        super().__init__()
        self.n_max = n_max
        self.embed = nn.Embedding(vocab, d_model)
        self.attention = DSALTAttention(d_model, n_heads=2, n_min=1, n_max=n_max, k_lmk=0)
        self.head = nn.Linear(d_model, vocab)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out, windows = self.attention(self.embed(ids), return_window=True)
        return self.head(out), windows


def train(model: Repeater, lag: int, steps: int, price: float = 0.3) -> tuple[list, list]:
    """Adam; the mean window of each head and the share of right answers after each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    widths, right = [], []
    for _ in range(steps):
        ids = torch.randint(12, (16, 80))
        logits, windows = model(ids)
        logits, wanted = logits[:, lag:].flatten(0, 1), ids[:, :-lag].flatten()
        loss = F.cross_entropy(logits, wanted)
        loss = loss + price * window_regulariser(windows, 1, model.n_max, kind="length")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        widths.append(windows.detach().mean((0, 2)).tolist())
        right.append((logits.argmax(-1) == wanted).float().mean().item())
    return widths, right


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    for lag, colour in ((4, "C0"), (20, "C1")):
        torch.manual_seed(0)
        widths, right = train(Repeater(), lag, options.steps)
        first, last = max(widths[0]), max(widths[-1])
        print(f"lag {lag}: widest head {first:.1f} -> {last:.1f} tokens, {right[-1]:.0%} right")
        axes[0].plot([max(step) for step in widths], color=colour, label=f"lag {lag}")
        axes[0].axhline(lag, color=colour, ls=":", lw=1)
        axes[1].plot(right, color=colour)
    axes[0].set(xlabel="step", ylabel="tokens back", title="Window of the widest head")
    axes[1].set(xlabel="step", ylabel="share", title="Right answers")
    axes[0].legend()
    figure.savefig(options.out / "window.png")
    print(f"drew {options.out / 'window.png'}")


if __name__ == "__main__":
    main()
