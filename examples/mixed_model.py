"""One language model whose layers come from different packages, with one cache for all of them.

    python examples/mixed_model.py [--steps 150] [--out lessons]

    characters ─► embedding ─► dsalt (window + landmarks) ─► entmax ─► lazy ─► … ─► next character

Trains on the texts of Python's own help, shows that decoding with the cache gives the logits of the
full pass, and draws what each kind of layer made of its freedom: windows, zeros, biases.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adasplash import EntmaxAttention, LazyAttention
from dsalt import DSALTAttention, SwiGLU

KINDS = ("dsalt", "entmax", "lazy")


def attention(kind: str, d_model: int, n_heads: int) -> nn.Module:
    """A causal attention layer: x (B, N, d), past_key_value, use_cache -> out or (out, cache)."""
    if kind == "dsalt":
        return DSALTAttention(d_model, n_heads, n_min=4, n_max=24, k_lmk=4)
    if kind == "entmax":
        return EntmaxAttention(d_model, n_heads, causal=True)
    if kind == "lazy":
        return LazyAttention(d_model, n_heads, window_size=64)
    raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the cache is the attention's own."""

    def __init__(self, kind: str, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.kind = kind
        self.before, self.between = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.attention = attention(kind, d_model, n_heads)
        self.mlp = SwiGLU(d_model)

    def forward(self, x: Tensor, past: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        y = self.attention(self.before(x), past_key_value=past, use_cache=use_cache)
        # dsalt returns its windows as well
        y, cache = (y if isinstance(y, tuple) else (y,))[0], y[-1] if use_cache else None
        x = x + y
        return x + self.mlp(self.between(x)), cache


class MixedLM(nn.Module):
    """A causal language model of any sequence of the three kinds of layers."""

    def __init__(
        self, vocab: int, d_model: int = 48, n_heads: int = 4, kinds: tuple[str, ...] = KINDS
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(kind, d_model, n_heads) for kind in kinds)
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> logits (B, N, vocab)."""
        return self.extend(ids, None)[0]

    def extend(self, ids: Tensor, caches: list | None, use_cache: bool = False) -> Any:
        """Logits of `ids` after what the caches hold, and the caches with `ids` in them."""
        x, new = self.embed(ids), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, None if caches is None else caches[i], use_cache)
            new.append(cache)
        return self.head(self.norm(x)), new

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int) -> Tensor:
        """Append the n most likely characters, one by one."""
        logits, caches = self.extend(ids, None, use_cache=True)
        for _ in range(n):
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), 1)
            logits, caches = self.extend(new, caches, use_cache=True)
        return ids


def texts() -> tuple[Tensor, list[str]]:
    """Python's help topics as character ids, and the characters."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))[:200_000]
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    return torch.tensor([index[letter] for letter in text]), letters


def train(model: MixedLM, ids: Tensor, steps: int, length: int = 96, batch: int = 8) -> list[float]:
    """AdamW on random stretches of the text; the loss of each step, in nats per character."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - length - 1, (batch,))
        rows = torch.stack([ids[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def draw(model: MixedLM, ids: Tensor, path: Path) -> None:
    """What each kind of layer made of its freedom on one stretch of text."""
    import matplotlib.pyplot as plt

    plt.style.use("shared_kernels.pictures")

    figure, axes = plt.subplots(1, len(model.blocks), figsize=(7.2, 2.8))
    x = model.embed(ids)
    for ax, block in zip(axes, model.blocks, strict=True):
        layer, y = block.attention, block.before(x)
        if block.kind == "dsalt":
            _, windows = layer(y, return_window=True)
            ax.plot(windows[0].T.numpy(), lw=1)
            ax.set(title="dsalt: windows", xlabel="character", ylabel="characters back")
        elif block.kind == "entmax":
            shown = layer.weights(y)[0, 0]
            ax.imshow(shown.masked_fill(shown == 0, torch.nan).numpy(), cmap="Blues", vmin=-0.3)
            pairs = (shown > 0).sum() / (shown.shape[0] * (shown.shape[0] + 1) / 2)
            ax.set(title=f"entmax: {pairs:.0%} of pairs", xlabel="key", ylabel="query")
        else:
            ax.plot(layer.attention_biases.detach().T.numpy(), lw=1)
            ax.set(title="lazy: biases", xlabel="distance", ylabel="added to the score")
        x = block(x)[0]
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("lessons"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    ids, letters = texts()
    model = MixedLM(len(letters))
    losses = train(model, ids, options.steps)
    print(f"loss: {losses[0]:.2f} at first, {sum(losses[-10:]) / len(losses[-10:]):.2f} at last")

    model.eval()
    prompt = ids[:80][None]
    full = model(prompt)
    _, caches = model.extend(prompt[:, :60], None, use_cache=True)
    rest, _ = model.extend(prompt[:, 60:], caches, use_cache=True)
    print(f"cache against full pass: {(rest - full[:, 60:]).abs().max():.1e}")
    for block in model.blocks:
        if block.kind == "entmax":
            print("entmax: alpha per head", block.attention.current_alpha().detach())
        if block.kind == "lazy":
            print("lazy: tau per head", block.attention.tau.detach())
    print("".join(letters[i] for i in model.generate(ids[:40][None], 60)[0]))

    options.out.mkdir(parents=True, exist_ok=True)
    draw(model, prompt, options.out / "layers.png")
    print(f"drew {options.out / 'layers.png'}")


if __name__ == "__main__":
    main()
