"""The demo's report: PNG pictures and the page that explains them."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

plt.style.use("shared_kernels.pictures")
INK, ACCENT = "C0", "C1"
# pale for little, dark for much: the eye goes to the large weights; 1e-4 lies below what is shown
WEIGHTS = {"cmap": "Blues", "norm": LogNorm(1e-4, 1.0)}
CLASSES = {
    "vowel": "#d1682e",
    "consonant": "#1f3a68",
    "capital": "#2a9d8f",
    "digit": "#c44a7a",
    "space": "#9aa5b1",
    "line break": "#000000",
    "punctuation": "#8a6bb1",
}


def character_class(character: str) -> str:
    """What a picture colours a character by."""
    if character == "\n":
        return "line break"
    if character.isspace():
        return "space"
    if character.isdigit():
        return "digit"
    if character.isalpha():
        if character.isupper():
            return "capital"
        return "vowel" if character in "aeiou" else "consonant"
    return "punctuation"


def _label(character: str) -> str:
    return {"\n": "⏎", " ": "·"}.get(character, character)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def loss_curve(path: Path, train: list[float], validation: list[tuple[int, float]]) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 3.0))
    steps = np.arange(1, len(train) + 1)
    axes.plot(steps, train, color=INK, alpha=0.25, lw=1)
    width = max(1, len(train) // 25)
    smooth = np.convolve(train, np.ones(width) / width, "valid")
    axes.plot(steps[width - 1 :], smooth, color=INK, label=f"training (mean of {width})")
    axes.plot(*zip(*validation, strict=True), "o-", color=ACCENT, label="held-out text")
    last_step, last = validation[-1]
    axes.annotate(f"{last:.2f}", (last_step, last), xytext=(4, 6), textcoords="offset points")
    axes.set(xlabel="step", ylabel="nats per character", ylim=(min(1.0, last - 0.3), None))
    axes.legend()
    _save(figure, path)


def attention(path: Path, weights: np.ndarray, alphas: list[float], text: str) -> None:
    """(H, N, N) weights of one sequence; exact zeros stay blank."""
    H, N, _ = weights.shape
    columns = min(H, 2)
    size = (7.2, 3.6 * -(-H // columns))
    figure, grid = plt.subplots(-(-H // columns), columns, figsize=size, squeeze=False)
    row = grid.ravel()[:H]
    labels = [_label(c) for c in text[:N]]
    for h, axes in enumerate(row):
        shown = np.ma.masked_equal(weights[h], 0.0)
        image = axes.imshow(shown, **WEIGHTS, interpolation="none")
        visible = np.tril(np.ones((N, N), bool))
        zeros = (weights[h][visible] == 0).mean()
        axes.set_title(f"head {h}: α = {alphas[h]:.2f}, {zeros:.0%} exact zeros")
        axes.set_xticks(range(N), labels, fontsize=6, family="monospace")
        axes.set_yticks(range(N), labels, fontsize=6, family="monospace")
        axes.tick_params(length=0)
    figure.supxlabel("attended character", fontsize=9)
    figure.supylabel("attending character", fontsize=9)
    bar = figure.colorbar(image, ax=row, shrink=0.6, label="weight (blank: exactly 0)")
    bar.ax.set_ylim(1e-3, 1)
    _save(figure, path)


def windows(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """For each layer (H, N, N) weights and (H, N) windows: what a row sees, and how far back."""
    names = list(layers)
    H = layers[names[0]][0].shape[0]
    figure, grid = plt.subplots(
        len(names), H, figsize=(7.2, 7.6 / H * len(names)), squeeze=False, sharex=True, sharey=True
    )
    for r, name in enumerate(names):
        weights, reach = layers[name]
        N = weights.shape[-1]
        for h in range(H):
            axes = grid[r, h]
            shown = np.ma.masked_equal(weights[h], 0.0)
            axes.imshow(shown, **WEIGHTS, interpolation="none")
            rows = np.arange(N)
            axes.plot(np.clip(rows - reach[h], 0, None), rows, color=ACCENT, lw=1)
            axes.set_title(f"window ≈ {reach[h][N // 2 :].mean():.0f}")
            if r == len(names) - 1:
                axes.set_xlabel(f"head {h}")
        grid[r, 0].set_ylabel(name)
    figure.suptitle("rows: positions; right of the line: the learned window; left of it: landmarks")
    _save(figure, path)


def alphas(path: Path, heads: np.ndarray, gate: np.ndarray) -> None:
    """(steps, H) learned α of the entmax block, (steps,) learned α of the diffmax gate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    steps = np.arange(1, len(heads) + 1)
    for h in range(heads.shape[1]):
        left.plot(steps, heads[:, h], label=f"head {h}")
    left.set(xlabel="step", ylabel="α", title="adasplash: α per head")
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    right.plot(steps, gate, color=INK)
    right.set(xlabel="step", ylabel="α", title="diffmax gate: α")
    _save(figure, path)


def gate(path: Path, weights: np.ndarray, text: str, names: list[str]) -> None:
    """(N, S) weights that mix the layers' states for each character."""
    figure, axes = plt.subplots(figsize=(7.2, 2.0))
    shown = np.ma.masked_equal(weights.T, 0.0)
    image = axes.imshow(shown, cmap="Blues", vmin=-0.3, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(text)), [_label(c) for c in text], fontsize=6, family="monospace")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_title(
        f"which block each character listens to ({(weights == 0).mean():.0%} exact zeros)"
    )
    figure.colorbar(image, ax=axes, label="weight").ax.set_ylim(0, 1)
    _save(figure, path)


def diffusion_map(path: Path, points: np.ndarray, eigenvalues: np.ndarray, text: str) -> None:
    """(N, >= 3) diffusion coordinates of the states that predict the next character of ``text``."""
    figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.2), width_ratios=(1, 1, 0.55))
    classes = np.array([character_class(c) for c in text])
    for axes, (i, j) in zip(panels[:2], ((0, 1), (1, 2)), strict=True):
        for name, colour in CLASSES.items():
            chosen = classes == name
            if chosen.any():
                axes.scatter(*points[chosen][:, [i, j]].T, s=3, color=colour, alpha=0.6, label=name)
        axes.set(xlabel=f"coordinate {i + 1}", ylabel=f"coordinate {j + 1}", xticks=[], yticks=[])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, markerscale=3)
    k = np.arange(1, len(eigenvalues) + 1)
    panels[2].bar(k, eigenvalues, color=INK)
    panels[2].set(xlabel="k", title="eigenvalues", ylim=(0, 1), xticks=k)
    _save(figure, path)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One model, five packages</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2433; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
figure {{ margin: 1.5rem 0 2.5rem; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #4a5568; }}
pre {{ background: #f4f5f7; padding: 1rem; overflow-x: auto; white-space: pre-wrap; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #e2e8f0; }}
</style></head><body>
<h1>One model, five packages</h1>
<p>{lead}</p>
<table>{rows}</table>
{figures}
<h2>What it writes</h2>
<pre>{sample}</pre>
</body></html>
"""


def page(
    path: Path,
    lead: str,
    rows: list[tuple[str, str]],
    figures: list[tuple[str, str, str]],
    sample: str,
) -> None:
    """figures: (file, heading, caption)."""
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    shown = "".join(
        f'<h2>{html.escape(heading)}</h2><figure><img src="{file}" alt="{html.escape(heading)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
        for file, heading, caption in figures
    )
    path.write_text(
        _PAGE.format(lead=html.escape(lead), rows=table, figures=shown, sample=html.escape(sample)),
        encoding="utf-8",
    )


def publish(partial: Path, out: Path) -> None:
    """Put a finished report in place of ``out`` at once: there is never half a report."""
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
