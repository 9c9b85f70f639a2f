"""Trained on at most 64 tokens, asked at 4096: who still finds the one key that matters?

    python examples/length_generalisation.py [--tasks recall copy] [--steps 1000] [--out lessons]

Two tasks whose answer stands somewhere in the sequence. *recall*: key value key value ..., then the
same keys in another order, and after each its value is to be said. *copy*: symbols, all different,
then the same ones again. Three models of the same form, with three seeds each: softmax attention,
alpha-entmax with alpha = 1.5, and the same with scores times delta + beta (log n)^gamma, three
numbers that each head learns. Half of the heads have ALiBi slopes, the others no positions.

To be learned in seconds, the tasks are easy: symbols are fixed random vectors, and each token is
mixed with the one before it, so that one layer can look up what followed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor, nn
from torch.nn import functional as F

from adasplash import EntmaxAttention

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"alpha": 1.0},
    "entmax": {"alpha": 1.5},
    "entmax, length_scale": {"alpha": 1.5, "length_scale": True},
}
TASKS = ("recall", "copy")
SYMBOLS, VALUES, START = 2048, 64, 2048  # values stand behind the symbols; the start is one of them
LONGEST, BATCH = 64, 8


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, kind: str, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.attention = EntmaxAttention(
            d_model, n_heads, causal=True, learn_alpha=False, alibi="half", **KINDS[kind]
        )
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Finder(nn.Module):
    """ids (B, N) -> a vector (B, N, d_model) that is compared with the vectors of all symbols."""

    def __init__(self, kind: str, d_model: int = 64, n_heads: int = 4, n_layers: int = 2) -> None:
        super().__init__()
        self.register_buffer("symbols", torch.randn(SYMBOLS + VALUES, d_model))
        self.previous = nn.Linear(d_model, d_model, bias=False)
        self.blocks = nn.Sequential(*(Block(kind, d_model, n_heads) for _ in range(n_layers)))
        self.out = nn.Sequential(nn.RMSNorm(d_model), nn.Linear(d_model, d_model, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.symbols[ids]
        return self.out(self.blocks(x + self.previous(F.pad(x, (0, 0, 1, -1)))))


def sequences(task: str, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """ids (batch, length), and True at the tokens whose next one is asked for."""
    n = length // 4 if task == "recall" else length // 2
    different = torch.rand(batch, SYMBOLS).topk(n, -1).indices
    asked = torch.zeros(batch, length, dtype=torch.bool)
    if task == "recall":
        values = torch.randint(VALUES, (batch, n)) + SYMBOLS
        order = torch.rand(batch, n).argsort(-1)
        pairs = torch.stack([different, values], -1)
        again = pairs.gather(1, order[..., None].expand(-1, -1, 2))
        asked[:, 2 * n :: 2] = True
        return torch.cat([pairs, again], 1).flatten(1), asked
    half = torch.cat([torch.full((batch, 1), START), different[:, 1:]], 1)
    asked[:, n:-1] = True
    return torch.cat([half, half], 1), asked


def answers(model: Finder, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Logits over all symbols where one is asked for, and which is right."""
    return model(ids)[asked] @ model.symbols.T, ids.roll(-1, 1)[asked]


def train(model: Finder, task: str, steps: int, lr: float = 5e-3) -> None:
    """AdamW on sequences of 16 to 64 tokens, the same number of tokens in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    for step in range(steps):
        rate = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * rate
        length = 8 * int(torch.randint(2, LONGEST // 8 + 1, ()))
        ids, asked = sequences(task, BATCH * LONGEST // length, length)
        loss = F.cross_entropy(*answers(model, ids, asked))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: Finder, task: str, length: int, tokens: int) -> float:
    """Share of right answers over `tokens` tokens of sequences of this length."""
    torch.manual_seed(length)  # the same sequences for every model
    right = asked_for = 0
    for _ in range(-(-tokens // max(length, 1024))):
        logits, wanted = answers(model, *sequences(task, max(1, 1024 // length), length))
        right += int((logits.argmax(-1) == wanted).sum())
        asked_for += len(wanted)
    return right / asked_for


def run(kind: str, task: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Finder(kind)
    train(model, task, options.steps)
    found: dict[str, Any] = {
        "accuracy": [accuracy(model, task, n, options.tokens) for n in options.lengths]
    }
    scales = [block.attention.length_scale for block in model.blocks]
    if scales[0] is not None:
        found["delta, beta, gamma per head"] = [scale.tolist() for scale in scales]
    print(task, kind, seed, *(f"{x:.3f}" for x in found["accuracy"]), flush=True)
    return found


def accuracies(found: dict[str, Any], kind: str) -> Tensor:
    """(seeds, lengths), of the seeds that this kind of attention was trained with."""
    runs = found["seeds"].values()
    return torch.tensor([run[kind]["accuracy"] for run in runs if kind in run])


def draw(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Accuracy against length, a line for each seed and the mean of them, for each task."""
    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    figure, axes = plt.subplots(1, len(measured), figsize=(7.2, 3.2), sharey=True, squeeze=False)
    for ax, (task, found) in zip(axes[0], measured.items(), strict=True):
        lengths = found["sizes"]["lengths"]
        for color, kind in enumerate(KINDS):
            rows = accuracies(found, kind)
            if not len(rows):
                continue
            ax.plot(lengths, rows.T, color=f"C{color}", lw=0.6, alpha=0.6)
            ax.plot(lengths, rows.mean(0), "o-", color=f"C{color}", label=kind)
        ax.axvline(LONGEST, color="grey", ls=":", lw=1)
        ax.set(xscale="log", xlabel="tokens", title=task, ylim=(0, 1.02))
        ax.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        ax.minorticks_off()
    axes[0, 0].set(ylabel="share of right answers")
    axes[0, 0].legend(loc="lower left")
    figure.savefig(path, metadata={"Software": None})
    print(f"drew {path}")


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The rows of docs/lessons.md: right answers in percent, mean and extremes over the seeds."""
    lengths = measured[TASKS[0]]["sizes"]["lengths"]
    lines = [
        f"| | | {' | '.join(str(n) for n in lengths)} |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for task, found in measured.items():
        for kind in KINDS:
            rows = 100 * accuracies(found, kind)
            if not len(rows):
                continue
            cells = (
                f"{mean:.0f} ({least:.0f} … {most:.0f})"
                for mean, least, most in zip(rows.mean(0), rows.amin(0), rows.amax(0), strict=True)
            )
            lines.append(f"| {task} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096]
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the test, for each length")
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    for task in options.tasks:
        sizes = {
            "steps": options.steps,
            "tokens of a step": BATCH * LONGEST,
            "longest": LONGEST,
            "lengths": options.lengths,
            "tokens of a test": options.tokens,
        }
        seeds = {
            seed: {kind: run(kind, task, seed, options) for kind in options.kinds}
            for seed in options.seeds
        }
        record(options.out / f"length_{task}.json", sizes, seeds)
    # a task that another run has measured is in the picture, too
    files = {task: options.out / f"length_{task}.json" for task in TASKS}
    measured = {task: json.loads(f.read_text("utf-8")) for task, f in files.items() if f.exists()}
    draw(options.out / "length_generalisation.png", measured)
    return measured


if __name__ == "__main__":
    main()
