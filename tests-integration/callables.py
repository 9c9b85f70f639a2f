"""Every public module and every differentiable public function of the five packages, ready to call.

A case builds its inputs from sizes (B, H, N, …), so that a test can set any of them to zero, and
from a dtype. `test_every_callable.py` runs one test of each kind over all of them and fails when a
public name is missing here: a new layer cannot escape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adasplash
import difflayers
import diffmax
import dsalt
import flashdiffusion

SIZES = {"B": 2, "H": 2, "N": 7, "S": 5, "D": 4}
Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One call. `tensors` are its floating arguments by name; `run` takes them as keywords.

    For a module, `build` makes it and `run` takes it first.
    causal: the name of the sequence dimension of each argument in which earlier results must not
    depend on later entries, or empty.
    """

    name: str
    run: Callable[..., Tensor]
    shapes: dict[str, str]
    build: Callable[[], nn.Module] | None = None
    causal: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()  # sizes that may be zero
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64, **sizes: int) -> dict[str, Tensor]:
        found = {**SIZES, **sizes}
        generator = torch.Generator().manual_seed(1)
        made = {}
        for name, shape in self.shapes.items():
            size = tuple(eval_size(part, found) for part in shape.split())
            x = torch.randn(size, dtype=torch.float64, generator=generator)
            made[name] = (x.sigmoid() * 0.4 + 0.3 if name in self.positive else x).to(dtype)
        return made

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module | None:
        if self.build is None:
            return None
        torch.manual_seed(2)
        return self.build().to(dtype).eval()

    def __call__(self, *, module: nn.Module | None = None, **tensors: Tensor) -> Tensor:
        if self.build is None:
            return self.run(**tensors)
        return self.run(module if module is not None else self.module(), **tensors)


def eval_size(part: str, sizes: Sizes) -> int:
    """`N` or `H*D` or `3`: the size it stands for."""
    value = 1
    for factor in part.split("*"):
        value *= sizes[factor] if factor in sizes else int(factor)
    return value


# ------------------------------------------------------------------------------------ functions

ROW_ZEROS = ("B", "N")
HEADS = {"q": "B H N D", "k": "B H N D", "v": "B H N D"}
CROSS = {"q": "B 4 N D", "k": "B 2 S D", "v": "B 2 S D"}
ATTENTION_ZEROS = ("B", "N")


def _first_class(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def _landmarks(q: Tensor) -> Tensor:
    return torch.zeros(*q.shape[:2], 1, dtype=torch.long, device=q.device)


FUNCTIONS = [
    Case(
        "diffmax.diffmax_bisect",
        lambda X, alpha: diffmax.diffmax_bisect(X, alpha),
        {"X": "B N", "alpha": "1"},
        positive=("alpha",),
        zero=ROW_ZEROS,
    ),
    Case(
        "diffmax.diffmax_loss",
        lambda X, alpha: diffmax.diffmax_loss(X, _first_class(X), alpha, reduction="sum"),
        {"X": "B N", "alpha": "1"},
        positive=("alpha",),
        zero=("B",),
    ),
    Case(
        "diffmax.entmax_loss",
        lambda X, alpha: diffmax.entmax_loss(X, _first_class(X), 1 + alpha, reduction="sum"),
        {"X": "B N", "alpha": "1"},
        positive=("alpha",),
        zero=("B",),
    ),
    Case(
        "diffmax.normmax_loss",
        lambda X: diffmax.normmax_loss(X, _first_class(X), reduction="sum"),
        {"X": "B N"},
        zero=("B",),
    ),
    Case(
        "diffmax.budget_loss",
        lambda X: diffmax.budget_loss(X, F.one_hot(_first_class(X), X.shape[1]), reduction="sum"),
        {"X": "B N"},
        zero=("B",),
    ),
    *(
        Case(f"diffmax.{name}", getattr(diffmax, name), {"X": "B N"}, zero=("B",))
        for name in ("normmax", "budget_sparsemax")
    ),
    Case(
        "diffmax.diffmax_linear_loss",
        lambda hidden, weight, alpha, bias: diffmax.diffmax_linear_loss(
            hidden, weight, _first_class(hidden), alpha, bias, reduction="sum"
        ),
        {"hidden": "B D", "weight": "N D", "alpha": "1", "bias": "N"},
        positive=("alpha",),
        zero=("B",),
    ),
    Case(
        "adasplash.triton_entmax",
        lambda x, alpha: adasplash.triton_entmax(x, 1 + alpha),
        {"x": "B N", "alpha": ""},
        positive=("alpha",),
        zero=ROW_ZEROS,
    ),
    *(
        Case(f"adasplash.{name}", getattr(adasplash, name), {"x": "B N"}, zero=ROW_ZEROS)
        for name in ("triton_entmax_v1", "triton_entmax_v2")
    ),
    *(
        Case(f"adasplash.{name}", getattr(adasplash, name), HEADS, zero=ATTENTION_ZEROS)
        for name in ("adasplash_v1", "adasplash_v2", "adasplash2")
    ),
    Case("adasplash.triton_entmax15", adasplash.triton_entmax15, {"x": "B N"}, zero=ROW_ZEROS),
    Case("adasplash.triton_sparsemax", adasplash.triton_sparsemax, {"x": "B N"}, zero=ROW_ZEROS),
    Case(
        "adasplash.adasplash",
        lambda q, k, v, alpha, slopes: adasplash.adasplash(
            q, k, v, 1 + alpha, is_causal=True, alibi_slopes=slopes
        ),
        {**HEADS, "alpha": "H", "slopes": "H"},
        causal=("q", "k", "v"),
        positive=("alpha", "slopes"),
        zero=ATTENTION_ZEROS,
    ),
    Case(
        "adasplash.adasplash_no_block_mask",
        lambda q, k, v, bias: adasplash.adasplash_no_block_mask(q, k, v, 1.4, bias=bias),
        {**CROSS, "bias": "B 4 N S"},
        zero=("B", "N", "S"),
    ),
    Case(
        "adasplash.entmax_decode",
        lambda q, k, v, alpha, slopes: adasplash.entmax_decode(
            q,
            k,
            v,
            torch.full((len(q),), k.shape[2], device=q.device),
            1 + alpha,
            alibi_slopes=slopes,
        ),
        {"q": "B H 1 D", "k": "B H N D", "v": "B H N D", "alpha": "H", "slopes": "H"},
        positive=("alpha", "slopes"),
        zero=ATTENTION_ZEROS,
    ),
    Case(
        "adasplash.lazy_attention_triton",
        lambda q, k, v, bias, tau: adasplash.lazy_attention_triton(
            q, k, v, bias, tau, window_size=4
        ),
        {**HEADS, "bias": "H 5", "tau": "H"},
        causal=("q", "k", "v"),
        zero=ATTENTION_ZEROS,
    ),
    Case(
        "adasplash.scaled_dot_product_attention",
        lambda query, key, value, attn_mask: adasplash.scaled_dot_product_attention(
            query, key, value, attn_mask
        ),
        {"query": "B H N D", "key": "B H S D", "value": "B H S D", "attn_mask": "N S"},
        zero=("B", "N", "S"),
    ),
    Case(
        "difflayers.apply_diffusion",
        lambda x, L: difflayers.apply_diffusion(x, L @ L.mT, 0.1),
        {"x": "N D", "L": "N N"},
        zero=("N", "D"),
    ),
    Case(
        "difflayers.energy",
        lambda memory, query: difflayers.energy(memory, query),
        {"memory": "S D", "query": "N D"},
        zero=("N",),
    ),
    Case(
        "difflayers.retrieve",
        lambda memory, query: difflayers.retrieve(memory, query, steps=2).patterns,
        {"memory": "S D", "query": "N D"},
        zero=("N",),
    ),
    Case(
        "dsalt.dsalt_attention",
        lambda Q, K, V, window_sizes, landmark_bias: dsalt.dsalt_attention(
            Q, K, V, 3 + 2 * window_sizes, _landmarks(Q), landmark_bias=landmark_bias
        ),
        {
            "Q": "B H N D",
            "K": "B H N D",
            "V": "B H N D",
            "window_sizes": "B H N",
            "landmark_bias": "B H 1",
        },
        causal=("Q", "K", "V", "window_sizes"),
        positive=("window_sizes",),
        zero=ATTENTION_ZEROS,
    ),
    Case(
        "dsalt.hybrid_energy",
        lambda X, WV, alpha: dsalt.hybrid_energy(X, WV, alpha, causal=True),
        {"X": "B N 8", "WV": "H 8 D", "alpha": "H"},
        positive=("alpha",),
        zero=ATTENTION_ZEROS,
    ),
    Case(
        "dsalt.apply_rotary_emb",
        lambda q, k: torch.cat(
            dsalt.apply_rotary_emb(q, k, *dsalt.build_rope_cache(q.shape[2], 4, dtype=q.dtype))
        ),
        {"q": "B H N 4", "k": "B H N 4"},
    ),
    Case(
        "dsalt.window_regulariser",
        lambda windows: dsalt.window_regulariser(2 + 5 * windows, 2.0, 8.0),
        {"windows": "B H N"},
        positive=("windows",),
    ),
]
# Functions that have no derivative (indices, statistics, figures, texts, files), or whose inputs
# are NumPy arrays. `FlashDiffusion` and its kind take arrays and tensors that need no gradient.
NOT_DIFFERENTIABLE = {
    "adasplash": {
        "AttentionStats",
        "KeyValueCache",
        "attention_stats",
        "check_transformers",
        "decode_stats",
        "entmax_anneal",
        "explain",
        "load_entmax_alpha",
        "register_transformers",
        "save_entmax_alpha",
        "sequence_places",
    },
    "difflayers": {"explain"},
    "diffmax": {
        "diffmax_calibrate",
        "diffmax_sample",
        "explain",
        "sparsity_stats",
        "support_topk",
    },
    "dsalt": {
        "build_rope_cache",
        "compute_hybrid_energy_scores",
        "compute_landmark_idx",
        "explain",
        "get_cosine_schedule_with_warmup",
        "plot_attention_pattern",
        "select_landmarks",
    },
    "flashdiffusion": set(flashdiffusion.__all__),
}


# -------------------------------------------------------------------------------------- modules


def _first(module: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """The first tensor of what a module returns."""
    out = module(*inputs, **options)
    while not isinstance(out, Tensor):
        out = getattr(out, "logits", None) if hasattr(out, "logits") else out[0]
    return out


def _self(module: nn.Module, x: Tensor) -> Tensor:
    return _first(module, x)


def _triple(module: nn.Module, stored: Tensor, state: Tensor) -> Tensor:
    return _first(module, (stored, state, stored))


def _query(module: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    return _first(module, query, key, key)


TOKENS = {"x": "B N 8"}
PATTERNS = {"stored": "B S 8", "state": "B N 8"}
WINDOWS = {"n_min": 2, "n_max": 4, "k_lmk": 1}


def _module(name: str, build: Callable[[], nn.Module], run=_self, shapes=None, **options) -> Case:
    return Case(
        name, run, TOKENS if shapes is None else shapes, build=build, **{"zero": ("B",), **options}
    )


MODULES = [
    _module(
        "diffmax.DiffmaxLinearLoss",
        lambda: diffmax.DiffmaxLinearLoss(0.5, reduction="sum"),
        lambda module, hidden, weight: module(hidden, weight, _first_class(hidden)),
        {"hidden": "B D", "weight": "N D"},
    ),
    _module("diffmax.DiffmaxRouter", lambda: diffmax.DiffmaxRouter(8, 4, alpha=0.3)),
    _module("diffmax.DiffmaxBisectModule", lambda: diffmax.DiffmaxBisectModule(0.5)),
    *(
        _module(
            f"diffmax.DiffmaxBisectModule[{kind.__name__}]",
            lambda kind=kind: diffmax.DiffmaxBisectModule(0.5, alpha_map=kind()),
            zero=("B", "N"),
        )
        for kind in (diffmax.ExpMap, diffmax.HillMap, diffmax.TanhMap)
    ),
    _module("adasplash.AlphaParameter", lambda: adasplash.AlphaParameter(2), lambda m: m(), {}),
    _module(
        "adasplash.EntmaxAttention",
        lambda: adasplash.EntmaxAttention(8, 2, causal=True),
        zero=("B", "N"),
    ),
    _module("adasplash.LazyAttention", lambda: adasplash.LazyAttention(8, 2, 4), zero=("B", "N")),
    _module(
        "adasplash.MultiheadAttention",
        lambda: adasplash.MultiheadAttention(8, 2, batch_first=True, learn_alpha=True),
        lambda m, query, key: m(query, key, key, need_weights=False)[0],
        {"query": "B N 8", "key": "B S 8"},
        zero=("B", "N"),
    ),
    *(
        _module(
            f"difflayers.Hopfield[{separation}]",
            lambda separation=separation: difflayers.Hopfield(
                8, num_heads=2, separation=separation, update_steps_max=1
            ),
            _triple,
            PATTERNS,
            zero=("B", "N", "S"),
        )
        for separation in ("softmax", "entmax15", "sparsemax")
    ),
    _module(
        "difflayers.HopfieldCore",
        lambda: difflayers.HopfieldCore(8, 2),
        lambda m, query, key: m(query, key, key)[0],
        {"query": "N B 8", "key": "S B 8"},
    ),
    _module("difflayers.HopfieldLayer", lambda: difflayers.HopfieldLayer(8, quantity=6)),
    _module("difflayers.HopfieldPooling", lambda: difflayers.HopfieldPooling(8, quantity=2)),
    _module(
        "difflayers.HopfieldEncoderLayer",
        lambda: difflayers.HopfieldEncoderLayer(difflayers.Hopfield(8, num_heads=2)),
    ),
    _module(
        "difflayers.HopfieldDecoderLayer",
        lambda: difflayers.HopfieldDecoderLayer(8, 2, 16, 0.0),
        lambda m, query, key: m(query, key),
        {"query": "B N 8", "key": "B S 8"},
    ),
    *(
        _module(
            f"difflayers.DiffusedHopfield[{attention},{diffusion}]",
            lambda attention=attention, diffusion=diffusion: difflayers.DiffusedHopfield(
                8,
                num_heads=2,
                attention_mode=attention,
                diffusion_mode=diffusion,
                k_neighbors=2,
            ),
            _triple if attention == "dense" else _self,
            PATTERNS if attention == "dense" else TOKENS,
        )
        for attention, diffusion in (
            ("dense", "factored"),
            ("dense", "simple"),
            ("graph", "factored"),
        )
    ),
    _module("dsalt.DSALTAttention", lambda: dsalt.DSALTAttention(8, 2, **WINDOWS), zero=("B", "N")),
    _module("dsalt.DSALTBlock", lambda: dsalt.DSALTBlock(8, 2, **WINDOWS)),
    _module("dsalt.DSALTTransformer", lambda: dsalt.DSALTTransformer(8, 2, 2, **WINDOWS)),
    _module(
        "dsalt.DSALTLMHeadModel",
        lambda: dsalt.DSALTLMHeadModel(11, 8, 2, 2, **WINDOWS, dropout=0.0),
        lambda m: _first(m, torch.arange(14, device="cpu").view(2, 7) % 11),
        {},
    ),
    _module(
        "dsalt.HybridEnergyScorer",
        lambda: dsalt.HybridEnergyScorer(2, 1),
        lambda m, x, values: m(x, values).scores,
        {"x": "B N 8", "values": "B H N D"},
    ),
    *(
        _module(f"dsalt.{name}", lambda name=name: getattr(dsalt, name)(8), zero=("B", "N"))
        for name in ("SwiGLU", "SwiGLUFFN", "RMSNorm", "RMSENorm")
    ),
    _module(
        "dsalt.WindowSizePredictor",
        lambda: dsalt.WindowSizePredictor(8, 2, 2.0, 4.0),
        zero=("B", "N"),
    ),
]
PACKAGES = (adasplash, difflayers, diffmax, dsalt, flashdiffusion)
