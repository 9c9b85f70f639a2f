"""dsalt's language model: a training step against dense attention, generation with a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsalt._rotary import rotate
from dsalt.model import DSALTLMHeadModel

from ..registry import Row

VOCAB, SHAPE = 96, {"d_model": 128, "n_layers": 4, "n_heads": 4, "dropout": 0.0}
WINDOW = {"n_min": 16, "n_max": 128, "k_lmk": 16}


class Dense(nn.Module):
    """What a DSALT layer is with every window open: causal softmax, the same weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.n_heads, self.base = layer.n_heads, layer.rope_base
        self.q_proj, self.k_proj, self.v_proj = layer.q_proj, layer.k_proj, layer.v_proj
        self.out_proj = layer.out_proj

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        B, N, _ = x.shape
        places = torch.arange(N, device=x.device)

        def heads(projection: nn.Module) -> Tensor:
            return projection(x).view(B, N, self.n_heads, -1).transpose(1, 2)

        q, k = (rotate(heads(p), places, self.base) for p in (self.q_proj, self.k_proj))
        out = F.scaled_dot_product_attention(q, k, heads(self.v_proj), is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


def _model(device: torch.device, **window: int) -> DSALTLMHeadModel:
    torch.manual_seed(0)
    return DSALTLMHeadModel(VOCAB, **SHAPE, **window).to(device)


def _dense(model: DSALTLMHeadModel) -> DSALTLMHeadModel:
    model = copy.deepcopy(model)
    for block in model.transformer.blocks:
        block.attention = Dense(block.attention)
    return model


def _loss_and_gradients(model: DSALTLMHeadModel, ids: Tensor) -> tuple[Tensor, ...]:
    loss = model(ids, labels=ids, shift_labels=True).loss
    weights = [model.embedding.weight, model.lm_head.weight]
    return (loss, *torch.autograd.grad(loss, weights))


def _training(device: torch.device, N: int, B: int, bar: float | None) -> Row:
    ids = torch.randint(0, VOCAB, (B, N), device=device)
    ours = _model(device, **WINDOW)
    models = {"ours": ours, "dense": _dense(ours)}
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}

    def step(name: str) -> Tensor:
        optimizers[name].zero_grad()
        loss = models[name](ids, labels=ids, shift_labels=True).loss
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    # the gate: windows beyond the sequence and no landmarks are dense attention
    short = ids[:1, :256]
    wide = _model(device, n_min=N, n_max=N, k_lmk=0)
    exact = _dense(wide).double()
    return Row(
        "dsalt/training step",
        f"d128 L4 H4 B{B} N={N} w=16..128 K=16",
        ours=lambda: step("ours"),
        exact=lambda: _loss_and_gradients(exact, short),
        checked=lambda: _loss_and_gradients(wide, short),
        peers={"dense (SDPA)": lambda: step("dense")},
        bars={} if bar is None else {"dense (SDPA)": bar},
    )


def _generation(device: torch.device, prompt: int, new: int, bar: float | None) -> Row:
    model = _model(device, **WINDOW).eval()
    ids = torch.randint(0, VOCAB, (1, prompt), device=device)
    exact = copy.deepcopy(model).double()

    def generate(use_cache: bool) -> Tensor:
        return model.generate(ids, new, temperature=0.0, use_cache=use_cache)

    @torch.no_grad()
    def piecewise() -> Tensor:
        parts, cache = [], None
        for piece in ids[:, :200].split([150] + [1] * 50, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache = out.past_key_values
        return torch.cat(parts, 1)

    @torch.no_grad()
    def whole() -> Tensor:
        return exact(ids[:, :200]).logits

    return Row(
        "dsalt/generation with a cache",
        f"d128 L4 H4 B1 {prompt} + {new} tokens",
        ours=lambda: generate(True),
        exact=whole,
        checked=piecewise,
        peers={"without a cache": lambda: generate(False)},
        bars={} if bar is None else {"without a cache": bar},
    )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    yield _training(device, 256, 8, bar=round(1 / 1.3, 3))
    if quick:  # goals are for the full sizes
        yield _training(device, 1024, 1, bar=None)
        yield _generation(device, 960, 16, bar=None)
    else:
        yield _training(device, 4096, 1, bar=round(1 / 0.6, 3))
        yield _generation(device, 960, 64, bar=5.0)
