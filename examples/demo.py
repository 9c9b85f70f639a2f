"""Train one small language model that uses all five packages, and show what it learned.

    python examples/demo.py                     # CPython's own documentation, under three minutes
    python examples/demo.py --text FILE --steps 600 --device cuda --seed 1 --out my-report

Writes a report (index.html and pictures) to --out and prints a summary.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import demo_report as report
import numpy as np
import torch
from demo_model import STATES, CharModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flashdiffusion import DiffusionMap

CONTEXT, BATCH = 256, 8
VOCABULARY = 256  # the most common characters; others share one symbol
LEAST_TEXT = 20 * CONTEXT
SAMPLE = 400  # characters that the trained model continues a text by
SHOWN = 48  # characters in the pictures of attention
MAPPED = 3000  # held-out characters whose states the diffusion map places
UNKNOWN = "\ufffd"


@dataclass
class Text:
    """A text as numbers: the first nine tenths to train on, the last to test on."""

    characters: list[str]
    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, text: str) -> Text:
        common = [c for c, _ in Counter(text).most_common(VOCABULARY - 1)]
        characters = [UNKNOWN, *sorted(common)]
        number = {c: i for i, c in enumerate(characters)}
        ids = torch.tensor([number.get(c, 0) for c in text])
        cut = len(ids) * 9 // 10
        return cls(characters, ids[:cut], ids[cut:])

    def show(self, ids: Tensor) -> str:
        return "".join(self.characters[i] for i in ids.tolist())


@dataclass
class History:
    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    heads: list[list[float]] = field(default_factory=list)
    gate: list[float] = field(default_factory=list)
    seconds: float = 0.0


def refuse(message: str) -> NoReturn:
    print(f"demo: {message}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: CPython's docs)")
    parser.add_argument("--steps", type=int, default=250, help="training steps (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same loss (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps … (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write")
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        refuse(f"--steps must be at least 1, got {chosen.steps}")
    try:
        torch.zeros(1, device=chosen.device)
    except (RuntimeError, AssertionError, ValueError) as error:
        refuse(f"--device {chosen.device} cannot be used: {str(error).splitlines()[0]}")
    out = chosen.out
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_report(out))):
        refuse(f"--out {out} exists and is not an earlier report; choose another folder")
    return chosen


def _is_report(folder: Path) -> bool:
    return (folder / "index.html").is_file() and (folder / "loss.png").is_file()


def read_text(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        refuse(f"--text {path} cannot be read: {reason}")
    if len(text) < LEAST_TEXT:
        refuse(f"--text {path} has {len(text)} characters, at least {LEAST_TEXT} are needed")
    return text


def windows_of(ids: Tensor, n: int) -> Tensor:
    """n stretches of CONTEXT + 1 characters, evenly spaced over ids."""
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, n).long()
    return torch.stack([ids[s : s + CONTEXT + 1] for s in starts.tolist()])


def loss_of(model: CharModel, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validate(model: CharModel, text: Text, device: torch.device, n: int = 32) -> float:
    """Mean loss on held-out text, nats per character."""
    batches = windows_of(text.held_out, n).to(device).split(BATCH)
    return float(np.mean([loss_of(model, batch).item() for batch in batches]))


def train(model: CharModel, text: Text, steps: int, device: torch.device) -> History:
    """AdamW, warm-up then cosine. Random batches from the CPU generator: the same on any device."""
    history = History()
    sparsity = {id(p) for p in model.sparsity_parameters()}
    rest = [p for p in model.parameters() if id(p) not in sparsity]
    groups = [
        {"params": rest, "weight_decay": 0.05},
        # a single number per head moves little at the matrices' rate
        {"params": list(model.sparsity_parameters()), "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98))
    warmup = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps))))
        ),
    )
    history.validation.append((0, validate(model, text, device)))
    start = time.perf_counter()
    quiet = 0.5 if sys.stderr.isatty() else 15.0  # a log needs no bar that moves
    bar = tqdm(range(1, steps + 1), desc="training", unit="step", mininterval=quiet)
    for step in bar:
        places = torch.randint(len(text.train) - CONTEXT, (BATCH,))
        batch = torch.stack([text.train[p : p + CONTEXT + 1] for p in places.tolist()]).to(device)
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.train.append(loss.item())
        heads, gate = model.alphas()
        history.heads.append(heads)
        history.gate.append(gate)
        if step % max(1, steps // 6) == 0 or step == steps:
            history.validation.append((step, validate(model, text, device)))
        bar.set_postfix(
            loss=f"{loss.item():.2f}", held_out=f"{history.validation[-1][1]:.2f}", refresh=False
        )
    history.seconds = time.perf_counter() - start
    return history


def sparsity(model: CharModel, text: Text, device: torch.device) -> dict[str, list[float]]:
    """Share of the weights over visible characters (or patterns) that are exactly 0, per head."""
    ids = windows_of(text.held_out, 1)[0, :CONTEXT].to(device)
    visible = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=device).tril()
    zeros = {
        name: [(w[visible] == 0).float().mean().item() for w in weights]
        for name, (weights, _) in model.attention(ids).items()
    }
    with torch.no_grad():
        looked_up = model.memory.weights(model.states(ids[None])[STATES.index("memory") - 1])
    zeros["memory"] = [(w == 0).float().mean().item() for w in looked_up]
    return {name: zeros[name] for name in STATES}


@torch.no_grad()
def diffusion_map(model: CharModel, text: Text, device: torch.device) -> tuple[np.ndarray, ...]:
    """Place the states of held-out characters by diffusion distance: coordinates, eigenvalues."""
    n = -(-MAPPED // CONTEXT)
    batch = windows_of(text.held_out, n)[:, :CONTEXT]
    states = torch.cat([model.features(b.to(device)) for b in batch.split(BATCH)])
    points = F.normalize(states.flatten(0, 1)[:MAPPED], dim=-1).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # repeated contexts make twins: that is fine
        fitted = DiffusionMap(beta="bgh", alpha=1.0, n_components=8, tol=1e-4).fit(points)
    return fitted.transform(), fitted.eigenvalues_, text.show(batch.flatten()[:MAPPED])


def shorten(sample: str) -> str:
    """The sample without rows of one sign, which are cut to three, and blanks at its end."""
    return re.sub(r"([^\w\s])\1{3,}", r"\1\1\1", sample).rstrip()


def draw(folder: Path, model: CharModel, text: Text, history: History, device: torch.device):
    """All pictures; returns (file, heading, caption) of each."""
    ids = windows_of(text.held_out, 3)[1, :SHOWN].to(device)
    shown = text.show(ids)
    seen = {
        name: (w.cpu().numpy(), None if r is None else r.cpu().numpy())
        for name, (w, r) in model.attention(ids).items()
    }
    report.loss_curve(folder / "loss.png", history.train, history.validation)
    heads, _ = model.alphas()
    report.attention(folder / "attention.png", seen["block 3"][0], heads, shown)
    full = windows_of(text.held_out, 3)[1, : CONTEXT // 2].to(device)
    wide = {
        name: (w.cpu().numpy(), r.cpu().numpy())
        for name, (w, r) in model.attention(full).items()
        if r is not None
    }
    report.windows(folder / "windows.png", wide)
    report.alphas(folder / "alpha.png", np.array(history.heads), np.array(history.gate))
    line = windows_of(text.held_out, 3)[1, :64].to(device)
    state = model.states(line[None])[-1]
    weights = model.gate.weights(F.rms_norm(state, state.shape[-1:]))[0].detach().cpu().numpy()
    report.gate(folder / "gate.png", weights, text.show(line), list(STATES))
    coordinates, eigenvalues, characters = diffusion_map(model, text, device)
    report.diffusion_map(folder / "diffusion_map.png", coordinates, eigenvalues, characters)
    return [
        ("loss.png", "Loss", "Nats per character; ln(number of characters) is a uniform guess."),
        (
            "attention.png",
            "adasplash: attention with exact zeros",
            "Block 3 on held-out text. α-entmax gives weight exactly 0 (blank) to most "
            "characters; each head has an α of its own, learned from 1.5.",
        ),
        (
            "windows.png",
            "dsalt: windows and landmarks",
            "Each head learned how far back each character looks; a few landmarks reach further.",
        ),
        ("alpha.png", "Learned sparsity", "α moved by the same gradient as every other weight."),
        (
            "gate.png",
            "diffmax: which block a character listens to",
            "Beside the last state the logits read a mixture of all blocks' states; its weights "
            "are a diffmax.",
        ),
        (
            "diffusion_map.png",
            "flashdiffusion: the space of learned states",
            "The states from which the model predicts what follows each held-out character, placed "
            "by diffusion distance and coloured by the character that was read. The eigenvalues "
            "fall slowly: there are neighbourhoods, but no clear number of clusters.",
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    text = Text.of(read_text(chosen.text))
    began = time.perf_counter()
    device = torch.device(chosen.device)
    torch.set_num_threads(1)  # many small operators: a second thread costs more than it brings
    torch.manual_seed(chosen.seed)
    model = CharModel(len(text.characters)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(text.train) + len(text.held_out):,} characters, {len(text.characters)} different; "
        f"{parameters:,} parameters on {device}"
    )
    history = train(model, text, chosen.steps, device)
    model.eval()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".demo-report-", dir=chosen.out.parent))
    try:
        figures = draw(partial, model, text, history, device)
        zeros = sparsity(model, text, device)
        prompt = text.held_out[:64].to(device)
        sample = shorten(text.show(model.generate(prompt, SAMPLE, CONTEXT)))
        heads, gate = model.alphas()
        (_, before), (_, after) = history.validation[0], history.validation[-1]
        rows = [
            ("held-out loss before", f"{before:.3f} nats/char"),
            ("held-out loss after", f"{after:.3f} nats/char"),
            ("training loss, last step", f"{history.train[-1]:.3f} nats/char"),
            ("steps", f"{chosen.steps} in {history.seconds:.0f} s"),
            ("seconds in all", f"{time.perf_counter() - began:.0f}"),
            *(
                (f"exact zeros, {name}", "  ".join(f"{z:.0%}" for z in per_head) + "  (per head)")
                for name, per_head in zeros.items()
            ),
            ("α per head, block 3", "  ".join(f"{a:.2f}" for a in heads)),
            ("α of the gate", f"{gate:.2f}"),
        ]
        lead = (
            f"A character model of {parameters:,} parameters made of dsalt, adasplash, diffmax "
            f"and difflayers, trained for {chosen.steps} steps; flashdiffusion drew the last map."
        )
        report.page(partial / "index.html", lead, rows, figures, sample)
        partial.chmod(0o755)  # mkdtemp made it private
        report.publish(partial, chosen.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print(f"\nsample (after the first 64 characters):\n{'-' * 60}\n{sample}\n{'-' * 60}")
    print(f"report: {chosen.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
