"""Draws the README's pictures, and measures what they show."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from adasplash import attention_stats, triton_entmax

plt.style.use("shared_kernels.pictures")
HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
ALPHAS = (1.05, 1.1, 1.2, 1.25, 1.333, 1.5, 1.667, 1.75, 2.0)
LENGTHS = (256, 512, 1024, 2048, 4096)


def inputs(kind: str, N: int, H: int = 4, D: int = 64) -> tuple[Tensor, Tensor, Tensor, dict]:
    """q, k, v (1, H, N, D) and options. `noise`: independent normal; `flat`: the same, queries
    times 0.1; `clustered`: runs of 128 tokens that share a centre; `local`: ALiBi on noise."""
    generator = torch.Generator().manual_seed(N)
    q, k, v = torch.randn(3, 1, H, N, D, generator=generator).unbind()
    options: dict = {"is_causal": True}
    if kind == "flat":
        q = 0.1 * q
    if kind == "clustered":
        centres = torch.randn(1, H, -(-N // 128), D, generator=generator)
        centre = centres.repeat_interleave(128, 2)[:, :, :N]
        q, k = q + centre, k + centre
    if kind == "local":
        options["alibi_slopes"] = torch.full((H,), 0.05)
    return q, k, v, options


def density(kind: str, N: int, alpha: float) -> dict[str, float]:
    q, k, _, options = inputs(kind, N)
    stats = attention_stats(q, k, alpha, **options)
    visible = torch.arange(1, N + 1)
    return {
        "keys": stats.support.double().mean().item(),
        "share": (stats.support / visible).mean().item(),
        "tiles": stats.tile_density.mean().item(),
    }


def weights() -> None:
    torch.manual_seed(3)
    x = (1.2 * torch.randn(16)).sort(descending=True).values
    rows = {f"α = {a}": triton_entmax(x, a) for a in (1.0, 1.25, 1.5, 2.0)}
    colours = plt.cm.viridis(torch.linspace(0, 0.85, len(rows)).numpy())
    figure, axis = plt.subplots(figsize=(7.2, 3.0))
    for i, ((name, y), colour) in enumerate(zip(rows.items(), colours, strict=True)):
        place = torch.arange(16) + (i - 1.5) * 0.2
        label = f"{name}: {int((y > 0).sum())} keys"
        axis.bar(place, y, width=0.2, label=label, color=colour)
        axis.plot(place[y == 0], torch.full_like(place[y == 0], -0.012), "o", ms=2, color=colour)
    axis.set(
        xlabel="key, largest score first", ylabel="weight", title="One row (dots: exact zeros)"
    )
    axis.legend()
    figure.savefig(HERE / "weights.png")


def densities() -> None:
    """Keys per query and tiles with a weight, against alpha (N = 2048) and length (alpha = 1.5)."""
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8))
    rows = []
    for kind in ("noise", "clustered", "local"):
        along = [density(kind, 2048, a) for a in ALPHAS]
        rows += [
            {"input": kind, "N": 2048, "alpha": a, **d} for a, d in zip(ALPHAS, along, strict=True)
        ]
        axes[0].semilogy(ALPHAS, [d["share"] for d in along], "o-", ms=3, label=kind)
        along = [density(kind, N, 1.5) for N in LENGTHS]
        rows += [
            {"input": kind, "N": N, "alpha": 1.5, **d} for N, d in zip(LENGTHS, along, strict=True)
        ]
        axes[1].loglog(LENGTHS, [d["keys"] for d in along], "o-", ms=3)
        axes[2].semilogx(LENGTHS, [d["tiles"] for d in along], "o-", ms=3)
    axes[0].set(xlabel="α", ylabel="share of the keys", title="Density, N = 2048")
    axes[1].set(xlabel="tokens N", ylabel="keys", title="Keys per query, α = 1.5")
    axes[2].set(xlabel="tokens N", ylabel="share", title="Tiles used, α = 1.5")
    axes[1].set_yticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes[2].set_ylim(0, 1.05)
    axes[0].legend()
    for axis in axes[1:]:
        axis.set_xticks(LENGTHS, [str(N) for N in LENGTHS], rotation=60)
        axis.minorticks_off()
    figure.savefig(HERE / "density.png")
    write("density.jsonl", rows)


def write(name: str, rows: list[dict]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    origin = {
        "command": "python packages/adasplash/docs/figures.py",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"cpu ({platform.machine()}), one thread",
        "commit": commit.stdout.strip() or "unknown",
    }
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps({**row, **origin}) + "\n" for row in rows)
    (RESULTS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    weights()
    densities()
