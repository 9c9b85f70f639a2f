"""A trained softmax model becomes an entmax model: what is lost, and how many weights are left?

    python examples/annealing.py [--steps 500] [--fine-tune 320] [--seeds 0 1 2] [--out lessons]

A language model of the demo's characters (a small Llama of transformers) is trained with softmax
attention. Then it is fine-tuned in three ways for the same number of steps: with softmax as before,
with an alpha that rises from 1 to 1.5 over three quarters of the steps (`entmax_anneal`), and with
alpha = 1.5 from the second step on. Held-out perplexity stands against the density: the share of
visible keys that keep a weight above 0. Needs the package transformers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from demo import Text, read_text
from record import record
from torch import Tensor, nn

from adasplash import entmax_anneal, register_transformers

CONTEXT, BATCH = 128, 4
ALPHA = 1.5
WAYS = ("softmax", "annealed", "at once")


def build(vocabulary: int) -> nn.Module:
    """A Llama with two layers of four heads, whose attention is adasplash with alpha = 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register_transformers("entmax", alpha=1.0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_cache=False,
        tie_word_embeddings=True,
        attn_implementation="entmax",
    )
    return LlamaForCausalLM(config)


def stretches(ids: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def held_out(model: nn.Module, text: Text, n: int = 32) -> float:
    """Mean loss on evenly spaced stretches of held-out text, nats per character."""
    rows = stretches(text.held_out, torch.linspace(0, len(text.held_out) - CONTEXT, n).long())
    losses = [model(part, labels=part).loss.item() for part in rows.split(BATCH)]
    return sum(losses) / len(losses)


def train(model: nn.Module, text: Text, steps: int, lr: float, after_step: Any) -> None:
    """AdamW on random stretches, the rate falling to a tenth; `after_step(loss)` behind each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30) * rate
        rows = stretches(text.train, torch.randint(len(text.train) - CONTEXT, (BATCH,)))
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(loss)


def fine_tune(model: nn.Module, text: Text, steps: int, way: str) -> list[dict[str, float]]:
    """Step, alpha, density of that step's text, held-out loss: nine times on the way."""
    path: list[dict[str, float]] = []
    every = max(1, steps // 8)

    def measured(step: int, alpha: float, density: float) -> None:
        loss = held_out(model, text)
        path.append({"step": step, "alpha": alpha, "density": density, "loss": loss})

    # one step more, so that the last one is measured
    if way == "softmax":
        made = itertools.count()
        train(
            model,
            text,
            steps + 1,
            1e-3,
            lambda _: measured(step, 1.0, 1.0) if (step := next(made)) % every == 0 else None,
        )
        return path
    rise = max(1, steps * 3 // 4) if way == "annealed" else 1
    with entmax_anneal(
        model,
        rise,
        ALPHA,
        measure_every=every,
        log=lambda row: measured(row.step, row.alpha, row.density),
    ) as anneal:
        train(model, text, steps + 1, 1e-3, anneal.step)
    return path


def run(text: Text, seed: int, steps: int, fine: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = build(len(text.characters))
    train(model, text, steps, 3e-3, lambda loss: None)
    before = held_out(model, text)
    print(f"seed {seed}: held-out loss {before:.3f} after {steps} steps of softmax", flush=True)
    found: dict[str, Any] = {"softmax before": before}
    for way in WAYS:
        torch.manual_seed(seed + 1000)  # the same stretches of text for all three
        found[way] = fine_tune(copy.deepcopy(model), text, fine, way)
        last = found[way][-1]
        print(f"  {way:<9} loss {last['loss']:.3f} density {last['density']:.3f}", flush=True)
    switched = copy.deepcopy(model)
    for module in entmax_anneal(switched, 1).modules.values():
        module.entmax_alpha = ALPHA
    found["switched, not trained"] = held_out(switched, text)
    return found


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Perplexity against density, and the held-out loss of each way against the step."""
    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
    for i, found in enumerate(runs):
        softmax = [row["loss"] for row in found["softmax"]]
        for way, form in (("annealed", "o-C1"), ("at once", "xC2")):
            rows = found[way]
            left.plot(
                [row["density"] for row in rows],
                [math.exp(row["loss"] - loss) for row, loss in zip(rows, softmax, strict=True)],
                form,
                label=way if i == 0 else None,
            )
    left.axhline(1, color="C0", label="softmax")
    left.set(xlabel="share of visible keys with a weight", xlim=(1.04, 0))
    left.set(ylabel="perplexity beside softmax's", title="At the same step, against density")
    left.legend()
    for color, way in enumerate(WAYS):
        for i, found in enumerate(runs):
            rows = found[way]
            right.plot(
                [row["step"] for row in rows],
                [row["loss"] for row in rows],
                color=f"C{color}",
                label=way if i == 0 else None,
            )
    right.set(xlabel="step of fine-tuning", ylabel="held-out nats per character")
    right.set(title="Three ways, three seeds")
    right.legend()
    figure.savefig(path, metadata={"Software": None})
    print(f"drew {path}")


def table(found: dict[str, Any]) -> str:
    """The rows of docs/lessons.md: perplexity and density, mean and extremes over the seeds."""

    def over_seeds(values: list[float], digits: int) -> str:
        mean, least, most = sum(values) / len(values), min(values), max(values)
        return f"{mean:.{digits}f} ({least:.{digits}f} … {most:.{digits}f})"

    seeds, sizes = found["seeds"].values(), found["sizes"]
    rows = {
        "softmax, before fine-tuning": [(run["softmax before"], 1.0) for run in seeds],
        f"the same with α = {sizes['alpha']}, not trained": [
            (run["switched, not trained"], None) for run in seeds
        ],
    }
    names = {
        "softmax": "softmax, {} steps more",
        "annealed": "α from 1 to 1.5, {} steps",
        "at once": "α = 1.5 at once, {} steps",
    }
    for way, name in names.items():
        ends = [run[way][-1] for run in seeds]
        rows[name.format(sizes["fine-tune"])] = [(end["loss"], end["density"]) for end in ends]
    lines = ["| | held-out perplexity | keys with a weight |", "|---|---|---|"]
    for name, pairs in rows.items():
        perplexity = over_seeds([math.exp(loss) for loss, _ in pairs], 2)
        densities = [100 * density for _, density in pairs if density is not None]
        lines.append(
            f"| {name} | {perplexity} | {over_seeds(densities, 0) + ' %' if densities else ''} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of softmax")
    parser.add_argument("--fine-tune", type=int, default=320, help="steps of each way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    text = Text.of(read_text(None))
    seeds = {seed: run(text, seed, options.steps, options.fine_tune) for seed in options.seeds}
    sizes = {
        "steps": options.steps,
        "fine-tune": options.fine_tune,
        "context": CONTEXT,
        "batch": BATCH,
        "characters": len(text.train) + len(text.held_out),
        "alpha": ALPHA,
    }
    found = record(options.out / "annealing.json", sizes, seeds)
    draw(options.out / "annealing.png", list(found["seeds"].values()))
    return found


if __name__ == "__main__":
    main()
