"""Sparse attention at a glance: the same scores, weighed by four values of one number.

    python examples/sparse_attention.py [--length 1024] [--out lessons]

Words of a text look at each other. With softmax (α = 1) every word gives some weight to every
other; α-entmax gives exactly zero to what scores too low, and α says how soon. The output is
computed by `adasplash` and by hand from the weights in the picture: they agree, though `adasplash`
never holds the matrix. diffmax is the same family under another name: diffmax(1/2) is entmax(3/2).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from adasplash import adasplash, attention_stats, triton_entmax
from diffmax import diffmax_bisect

ALPHAS = (1.0, 1.25, 1.5, 2.0)
TEXT = "the cat that the dog that the boy fed chased ran home and the boy fed the cat again".split()


def words(D: int = 32) -> Tensor:
    """(1, 1, N, D): every word its own direction, turned a little by its place."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = sorted(set(TEXT))
    meaning = torch.randn(len(vocabulary), D, generator=generator)
    place = torch.linspace(0, 1, len(TEXT))[:, None] * torch.randn(1, D, generator=generator)
    return (meaning[[vocabulary.index(word) for word in TEXT]] + 0.7 * place)[None, None]


def weights(x: Tensor, alpha: float, scale: float) -> Tensor:
    """(N, N) weights of attention from x to itself, written down: only for a picture."""
    return triton_entmax(scale * x[0, 0] @ x[0, 0].mT, alpha)


def shares(N: int) -> list[tuple[float, float]]:
    """(share of keys, share of tiles) with a weight, for each alpha, in a longer text."""
    generator = torch.Generator().manual_seed(1)
    topics = torch.randn(1, 1, N // 64, 32, generator=generator).repeat_interleave(64, 2)
    x = topics + 0.5 * torch.randn(1, 1, topics.shape[2], 32, generator=generator)
    found = []
    for alpha in ALPHAS:
        stats = attention_stats(x, x, alpha, scale=0.3)
        keys = (stats.support.double().mean() / x.shape[2]).item()
        found.append((keys, stats.tile_density.mean().item()))
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024, help="of the longer text")
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    x, scale = words(), 0.12
    measured = {}
    for alpha in ALPHAS:
        p = weights(x, alpha, scale)
        out = adasplash(x, x, x, alpha, scale=scale)[0, 0]
        measured[f"difference at alpha={alpha}"] = (out - p @ x[0, 0]).abs().max().item()
        measured[f"zeros at alpha={alpha}"] = (p == 0).double().mean().item()
        print(f"alpha {alpha}: {measured[f'zeros at alpha={alpha}']:.0%} of the weights are zero")
    scores = scale * x[0, 0] @ x[0, 0].mT
    same = (diffmax_bisect(scores, 0.5) - weights(x, 1.5, scale)).abs().max().item()
    measured["difference of diffmax(1/2)"] = same
    print(f"diffmax(1/2) differs from entmax(3/2) by {same:.1e} at most")
    kept = shares(options.length)

    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 7.2))
    axes = axes.flat
    for ax, alpha in zip(axes[:3], (1.0, 1.5, 2.0), strict=True):
        p = weights(x, alpha, scale)
        ax.imshow(p.where(p > 0, torch.nan), cmap="Blues", vmin=-0.3 * p.max())
        ax.set_title(f"α = {alpha:g}: {(p == 0).double().mean():.0%} zero (blank)")
        ax.set_xticks(range(len(TEXT)), TEXT, rotation=90)
        ax.set_yticks(range(len(TEXT)), TEXT)
    axes[3].plot(ALPHAS, [100 * keys for keys, _ in kept], "o-", label="keys with a weight")
    axes[3].plot(ALPHAS, [100 * tiles for _, tiles in kept], "s--", label="64 × 64 tiles with one")
    axes[3].set(xlabel="α", ylabel="%", ylim=(0, None), title=f"{options.length} words, by topic")
    axes[3].legend()
    figure.savefig(options.out / "sparse_attention.png")
    plt.close(figure)
    print(f"drew {options.out / 'sparse_attention.png'}")
    return measured


if __name__ == "__main__":
    main()
