"""Separation functions: what turns association scores into weights, and its energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, qexp

from . import _checks

Normalizer = Callable[[Tensor, int], Tensor]

NAMES = ("softmax", "entmax15", "sparsemax")


class Separation(NamedTuple):
    """``normalizer`` None means softmax, which the fused attention kernels compute themselves."""

    name: str
    normalizer: Normalizer | None


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """alpha-entmax with alpha = 1.5: [scores/2 - tau]_+ ** 2."""
    return qexp.entmax(scores, 1.5, dim)


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """Euclidean projection of the scores on the simplex: [scores - tau]_+."""
    return qexp.sparsemax(scores, dim)


def resolve(separation: str | Normalizer) -> Separation:
    """``"softmax" | "entmax15" | "sparsemax"`` or any callable (scores, dim) -> weights."""
    if callable(separation):
        return Separation(getattr(separation, "__name__", "callable"), separation)
    checks.in_set("separation", separation, NAMES)
    table: dict[str, Normalizer | None] = {
        "softmax": None,
        "entmax15": entmax15,
        "sparsemax": sparsemax,
    }
    return Separation(separation, table[separation])


def weights(scores: Tensor, normalizer: Normalizer | None) -> Tensor:
    """Weights along the last dim; a row of -inf only gives zeros and zero gradients."""
    if scores.shape[-1] == 0:
        return scores
    dead = scores.detach().amax(-1, keepdim=True) == -torch.inf
    alive = scores.masked_fill(dead, 0.0)
    if normalizer is None:
        return torch.softmax(alive, -1).masked_fill(dead, 0.0)
    made = normalizer(alive, -1)
    _checks.separated(made, alive)
    # a masked entry weighs nothing, whatever the normaliser makes of -inf
    return made.masked_fill(dead | (scores.detach() == -torch.inf), 0.0)


def conjugate(scores: Tensor, separation: Separation) -> Tensor:
    """max over p of p.scores - Omega(p), last dim; its gradient is the separation function.

    Omega is the negative Shannon entropy for softmax (the conjugate is then log-sum-exp) and
    (sum p^a - 1) / (a (a - 1)) for a-entmax (a = 1.5, and 2 for sparsemax).
    """
    if separation.name == "softmax":
        return scores.logsumexp(-1)
    if separation.name not in NAMES:
        checks.fail(
            "separation",
            f"be one of {', '.join(NAMES)} where an energy is asked for",
            separation.name,
            "the energy of an arbitrary callable is not known",
            NotImplementedError,
        )
    p = weights(scores, separation.normalizer)
    a = 1.5 if separation.name == "entmax15" else 2.0
    omega = (p.clamp(min=0.0).pow(a).sum(-1) - 1.0) / (a * (a - 1.0))
    # a masked score is -inf and its weight 0: it adds nothing
    return (p * scores.masked_fill(p == 0, 0.0)).sum(-1) - omega


def uniform_conjugate(n: int, separation: Separation) -> float:
    """conjugate of n equal zeros: log n for softmax, -Omega(1/n) for the others."""
    zeros = torch.zeros(n, dtype=torch.float64, device="cpu")
    return float(conjugate(zeros, separation))
