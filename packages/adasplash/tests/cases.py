"""Inputs that every leg runs: shapes, options and alphas of attention, and rows of entmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shared_kernels import native
from shared_kernels.testing import Case

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}"),
)
# Of attention on CPU tensors.
BACKENDS = ("torch", NATIVE)


ALPHAS = (1.0, 1.02, 1.25, 4 / 3, 1.5, 1.7, 2.0)
PER_HEAD = "per head"

ATTENTION = (
    Case("plain"),
    Case("causal", is_causal=True),
    Case("one-token", N_q=1, N_k=1),
    Case("one-query-causal", N_q=1, is_causal=True),
    Case("cross-fewer-queries", N_q=20, N_k=53, is_causal=True),
    Case("cross-more-queries", N_q=53, N_k=20, is_causal=True),
    Case("grouped", H=4, H_kv=2, is_causal=True),
    Case("one-key-head", H=4, H_kv=1),
    Case("wide-values", D=8, D_v=24),
    Case("odd-head-dim", D=5),
    Case("window", window=7),
    Case("window-causal", window=5, is_causal=True, N_q=40, N_k=61),
    Case("varlen", varlen=(0, 33), N_q=37, N_k=37),
    Case("varlen-causal-grouped", varlen=(37, 12), N_q=37, N_k=37, H=4, H_kv=2, is_causal=True),
    Case("packed-causal", cu_seqlens=(0, 10, 10, 29), B=1, N_q=37, N_k=37, is_causal=True),
    Case("mask", mask=True),
    Case("bias", bias="BHQK"),
    Case("bias-per-head-causal", bias="1HQK", is_causal=True),
    Case("bias-per-key", bias="B11K", H=4, H_kv=2),
    Case("alibi-causal", alibi=True, is_causal=True, N_q=20, N_k=53),
    Case("sink", s_aux=True, H=4, H_kv=2),
    Case("sink-causal-window", s_aux=True, is_causal=True, window=5, N_q=40, N_k=61),
    Case("sink-sees-no-key", s_aux=True, is_causal=True, N_q=53, N_k=20),
    Case("sink-packed-mask", s_aux=True, cu_seqlens=(0, 10, 10, 29), B=1, mask=True),
    Case("softcap", softcap=0.8),
    Case("softcap-bias-alibi", softcap=1.5, bias="BHQK", alibi=True, is_causal=True),
    Case("sink-softcap-varlen", s_aux=True, softcap=2.0, varlen=(0, 33), H=4, H_kv=2),
    Case("scale", scale=0.7),
    Case("sharp", scale=20.0),
    Case("flat", scale=0.01, is_causal=True),
)
BY_NAME = {case.name: case for case in ATTENTION}


def inputs(case: Case, alpha: Any = 1.5, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that may need gradients, and the rest of a call to ``adasplash``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, H, N_q, D = case.get("B", 2), case.get("H", 2), case.get("N_q", 37), case.get("D", 16)
    H_kv, N_k, D_v = case.get("H_kv", H), case.get("N_k", N_q), case.get("D_v", D)
    tensors = {"q": randn(B, H, N_q, D), "k": randn(B, H_kv, N_k, D), "v": randn(B, H_kv, N_k, D_v)}
    options: dict[str, Any] = {
        key: case.get(key)
        for key in ("is_causal", "window", "scale", "softcap")
        if case.get(key) is not None
    }
    for name in ("varlen", "cu_seqlens"):
        if case.get(name) is not None:
            options[name] = torch.tensor(case.get(name), dtype=torch.int32)
    if case.get("mask"):
        mask = torch.rand(B, 1, N_q, N_k, generator=generator) > 0.4
        mask[0, 0, 3] = False  # a query that sees nothing
        options["mask"] = mask
    if case.get("bias"):
        size = {"B": B, "H": H, "Q": N_q, "K": N_k, "1": 1}
        tensors["bias"] = randn(*(size[letter] for letter in case.get("bias")))
    if case.get("alibi"):
        tensors["alibi_slopes"] = 0.3 * torch.rand(H, generator=generator).double()
    if case.get("s_aux"):
        tensors["s_aux"] = randn(H)
    if alpha == PER_HEAD:
        tensors["alpha"] = torch.linspace(1.01, 1.9, H, dtype=torch.float64)
    else:
        options["alpha"] = alpha
    return tensors, options
