"""One language model, two losses: cross-entropy, and one with a gradient of mostly exact zeros.

    python examples/sparse_loss.py [--texts characters tokens] [--steps 300] [--out lessons]
    python examples/sparse_loss.py --time --out lessons    # afterwards: what a step of each costs

dsalt's model takes a loss as a callable of (hidden, weight, labels); here it gets diffmax's, with
alpha = 0.5. Two vocabularies: the demo's characters, and 32 768 tokens, a byte-pair encoding of
sources of Python's standard library (needs the package tokenizers). Both losses see the same
batches for the same number of steps. Then both models are asked for both losses and for the share
of right first guesses on the same held-out text. Cross-entropy is that of softmax(t logits) with
the t that suits the model best, since the sparse loss gives logits a scale of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from demo import Text, read_text
from record import record
from torch import Tensor
from torch.nn import functional as F

from diffmax import DiffmaxLinearLoss, diffmax_bisect, diffmax_loss
from dsalt.model import DSALTLMHeadModel

ALPHA, VOCABULARY = 0.5, 32_768
LENGTH, BATCH = 96, 4
LOSSES = {"cross-entropy": None, "sparse": DiffmaxLinearLoss(ALPHA)}
TEXTS = ("characters", "tokens")
SHARPNESS = [2 ** (i / 2) for i in range(-2, 9)]  # the t of softmax(t logits) that are tried


def read(name: str, vocabulary: int, megabytes: float) -> tuple[Tensor, Tensor, int]:
    """Ids to train on, ids held out, and how many there are to choose from."""
    if name == "characters":
        text = Text.of(read_text(None))
        return text.train, text.held_out, len(text.characters)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.glob("*/*.py") if p.parent.name not in ("test", "tests"))
    files = [p for p in [*sorted(library.glob("*.py")), *files] if "site-packages" not in p.parts]
    texts, size = [], 0
    for path in files:
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > megabytes * 1e6:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    held_out = texts[::10]
    rest = [text for i, text in enumerate(texts) if i % 10]
    tokenizer.train_from_iterator(rest, trainer)
    ids = [
        torch.tensor([i for text in part for i in tokenizer.encode(text).ids])
        for part in (rest, held_out)
    ]
    return ids[0], ids[1], tokenizer.get_vocab_size()


def build(vocabulary: int, loss: str) -> DSALTLMHeadModel:
    return DSALTLMHeadModel(
        vocabulary,
        64,
        2,
        4,
        n_min=8,
        n_max=32,
        k_lmk=4,
        dropout=0.0,
        d_ff=128,
        tie_embeddings=True,
        loss=LOSSES[loss],
    )


def batch(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches of the text, and the next token of each token."""
    rows = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def step(model: DSALTLMHeadModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    given, wanted = batch(ids, torch.randint(len(ids) - LENGTH, (BATCH,)))
    loss = model(given, labels=wanted, return_logits=False).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def optimizer_of(model: DSALTLMHeadModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)


def train(model: DSALTLMHeadModel, ids: Tensor, steps: int) -> None:
    """AdamW on random stretches; the rate falls to a tenth."""
    optimizer = optimizer_of(model)
    for number in range(steps):
        rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * number / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (number + 1) / 30) * rate
        step(model, optimizer, ids)


@torch.no_grad()
def measure(model: DSALTLMHeadModel, ids: Tensor, loss: str, n: int = 16) -> dict[str, float]:
    """Both losses and more on evenly spaced stretches of held-out text."""
    starts = torch.linspace(0, len(ids) - LENGTH - 1, n).long()
    sums: dict[str, float] = dict.fromkeys(("sparse loss", "right", "non-zero", "covered"), 0.0)
    entropies = torch.zeros(len(SHARPNESS))
    for part in starts.split(BATCH):
        given, wanted = batch(ids, part)
        logits, wanted = model(given).flatten(0, 1), wanted.flatten()
        share = len(part) / n
        sparse = diffmax_bisect(logits, ALPHA) > 0
        entropies += share * torch.stack([F.cross_entropy(t * logits, wanted) for t in SHARPNESS])
        sums["sparse loss"] += share * diffmax_loss(logits, wanted, ALPHA).item()
        sums["right"] += share * (logits.argmax(-1) == wanted).double().mean().item()
        if loss == "sparse":
            sums["non-zero"] += share * sparse.double().mean().item()
            sums["covered"] += share * sparse.gather(1, wanted[:, None]).double().mean().item()
        else:  # a softmax has no zeros
            sums["non-zero"] += share
            sums["covered"] += share
    best = int(entropies.argmin())
    as_it_is = entropies[SHARPNESS.index(1.0)].item()
    return {
        "cross-entropy": entropies[best].item(),
        "t": SHARPNESS[best],
        "cross-entropy, t = 1": as_it_is,
        **sums,
    }


def run(name: str, seed: int, options: argparse.Namespace, texts: Any) -> dict[str, Any]:
    """Train with each loss from the same weights on the same batches; the trained weights stay."""
    ids, held_out, vocabulary = texts
    found = {}
    for loss in options.losses:
        torch.manual_seed(seed)
        model = build(vocabulary, loss)
        train(model, ids, options.steps)
        found[loss] = measure(model.eval(), held_out, loss)
        words = (f"{key} {value:.3f}" for key, value in found[loss].items())
        print(f"{name}, seed {seed}, {loss}: {', '.join(words)}", flush=True)
        torch.save(model.state_dict(), options.out / f"sparse_loss_{name}_{loss}.pt")
    return found


def tokens_per_second(name: str, folder: Path, texts: Any, rounds: int) -> dict[str, float]:
    """Of whole training steps of the trained models, in turn in one process: medians, CPU time."""
    ids, _, vocabulary = texts
    steps = {}
    for loss in LOSSES:
        model = build(vocabulary, loss)
        weights = torch.load(folder / f"sparse_loss_{name}_{loss}.pt", weights_only=True)
        model.load_state_dict(weights)
        steps[loss] = model, torch.optim.SGD(model.parameters(), lr=0.0)
    seconds: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    for _ in range(rounds + 1):
        for loss, made in steps.items():
            start = time.process_time()
            step(*made, ids)
            seconds[loss].append(time.process_time() - start)
    # the first round pays for what is made once
    return {x: BATCH * LENGTH / statistics.median(s[1:]) for x, s in seconds.items()}


def over_seeds(found: dict[str, Any], loss: str, what: str) -> list[float]:
    return [run[loss][what] for run in found["seeds"].values() if loss in run]


def draw(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Both losses of both models, and the share of the vocabulary with a weight, for each text."""
    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    shown = ("cross-entropy", "sparse loss", "non-zero")
    titles = ("cross-entropy, nats", "sparse loss", "share of non-zero weights")
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.0))
    for ax, what, title in zip(axes, shown, titles, strict=True):
        for place, found in enumerate(measured.values()):
            for i, loss in enumerate(LOSSES):
                rows = over_seeds(found, loss, what)
                if not rows:
                    continue
                x = place + 0.4 * i - 0.2
                ax.bar(
                    x,
                    sum(rows) / len(rows),
                    0.36,
                    color=f"C{i}",
                    alpha=0.75,
                    label=f"trained with {loss}" if place == 0 else None,
                )
                ax.plot([x] * len(rows), rows, "o", color="black", markersize=3)
        ax.set_xticks(range(len(measured)), list(measured))
        ax.set(title=title)
    axes[2].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, metadata={"Software": None})
    print(f"drew {path}")


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The rows of docs/lessons.md: means over the seeds, the extremes of the losses beside them."""
    shown = {
        "cross-entropy": "{:.3f}",
        "cross-entropy, t = 1": "{:.3f}",
        "sparse loss": "{:.3f}",
        "right": "{:.1%}",
        "non-zero": "{:.1%}",
        "covered": "{:.1%}",
    }
    lines = [f"| text | trained with | {' | '.join(shown)} | tokens per second |"]
    lines.append("|---|---|" + "---|" * (len(shown) + 1))
    for name, found in measured.items():
        for loss in LOSSES:
            cells = []
            for what, form in shown.items():
                values = over_seeds(found, loss, what) or [math.nan]
                cells.append(form.format(sum(values) / len(values)))
                if what.endswith(("entropy", "loss")):
                    cells[-1] += f" ({form.format(min(values))} … {form.format(max(values))})"
            speed = found.get("tokens per second of CPU time", {})
            cells.append(str(speed.get(loss, "not timed")))
            lines.append(f"| {name} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the tokens")
    parser.add_argument("--megabytes", type=float, default=4.0, help="of the library's sources")
    parser.add_argument("--time", action="store_true", help="time steps of the trained models")
    parser.add_argument("--rounds", type=int, default=21, help="of the timing")
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.texts:
        file = options.out / f"sparse_loss_{name}.json"
        texts = read(name, options.vocabulary, options.megabytes)
        if options.time:
            found = json.loads(file.read_text("utf-8"))
            speed = tokens_per_second(name, options.out, texts, options.rounds)
            found["tokens per second of CPU time"] = {x: round(n) for x, n in speed.items()}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(name, found["tokens per second of CPU time"])
            continue
        sizes = {
            "steps": options.steps,
            "tokens of a step": BATCH * LENGTH,
            "vocabulary": texts[2],
            "alpha": ALPHA,
            "tokens to train on": len(texts[0]),
            "held out": len(texts[1]),
        }
        record(file, sizes, {seed: run(name, seed, options, texts) for seed in options.seeds})
    # a text that another run has measured is in the picture, too
    files = {name: options.out / f"sparse_loss_{name}.json" for name in TEXTS}
    measured = {name: json.loads(f.read_text("utf-8")) for name, f in files.items() if f.exists()}
    draw(options.out / "sparse_loss.png", measured)
    return measured


if __name__ == "__main__":
    main()
