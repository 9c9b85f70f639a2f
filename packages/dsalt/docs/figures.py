"""Draws the README's picture: `python packages/dsalt/docs/figures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from dsalt import plot_attention_pattern, select_landmarks

plt.style.use("shared_kernels.pictures")
HERE = Path(__file__).parent
N, C = 128, 16  # tokens, queries per list of landmarks


def pattern() -> None:
    """Two heads: a narrow one that leans on its landmarks, and a wide one with soft windows."""
    torch.manual_seed(1)
    Q, K = torch.randn(2, 1, 2, N, 16)
    token = torch.arange(N)
    narrow = torch.full((N,), 6.0)
    wide = 12 + 26 * (0.5 + 0.5 * torch.sin(token / 12)) * (token / N).sqrt()
    windows = torch.stack((narrow, wide))[None]
    idx = select_landmarks(torch.randn(1, 2, N), 5, landmark_block=C)
    gates = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1).expand(idx.shape)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4))
    options = {"landmark_bias": gates, "landmark_block": C, "window_ramp": 8.0}
    for head, (axis, title) in enumerate(
        zip(axes, ("narrow windows", "windows that vary"), strict=True)
    ):
        plot_attention_pattern(Q, K, windows, idx, head=head, ax=axis, **options)
        axis.set_title(title)
    figure.savefig(HERE / "pattern.png")


if __name__ == "__main__":
    pattern()
