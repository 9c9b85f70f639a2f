"""Inputs of lazy attention that every leg runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared_kernels.testing import Case

LAZY = (
    Case("plain"),
    Case("one-token", N=1),
    Case("no-window", window_size=0),
    Case("window-beyond-the-end", window_size=100),
    Case("grouped", H=4, H_kv=2),
    Case("wide-values", D=8, D_v=24),
    Case("varlen", varlen=(33, 0)),
    Case("varlen-grouped", varlen=(5, 37), H=2, H_kv=1),
    Case("mask", mask=True),
    Case("scale", scale=0.8),
)
BY_NAME = {case.name: case for case in LAZY}


# Which biases of head 1 are -inf.
HIDING = {"one distance": slice(2, 3), "near distances": slice(0, 3), "all distances": slice(None)}


def hiding_inputs(hiding: str, tau: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs whose biases hide pairs: those of some distances, or all that a head has."""
    case = BY_NAME["grouped"].replaced(hiding, window_size=36)
    tensors, options = inputs(case, tau)
    tensors["bias"][1, HIDING[hiding]] = -torch.inf
    return tensors, options


def assert_hidden(hiding: str, tensors: dict[str, Tensor], run: Callable[..., Tensor]) -> None:
    """Hidden pairs have no weight and their biases no gradient; an empty row gives zeros."""
    x = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    out = run(**x)
    grads = dict(zip(x, torch.autograd.grad(out.square().sum(), list(x.values())), strict=True))
    assert all(bool(t.isfinite().all()) for t in (out, *grads.values()))
    assert not grads["bias"][1, HIDING[hiding]].any() and bool(grads["bias"][0].any())
    first = {"one distance": 0, "near distances": 3, "all distances": 37}[hiding]
    for t in (out, grads["q"]):  # rows that see nothing
        assert not t[:, 1, :first].any()
    if hiding == "all distances":
        assert not grads["tau"][1]


def inputs(case: Case, tau: float, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that need gradients, and the rest of a call to ``lazy_attention_triton``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, H, N, D = case.get("B", 2), case.get("H", 2), case.get("N", 37), case.get("D", 16)
    H_kv, D_v, W = case.get("H_kv", H), case.get("D_v", D), case.get("window_size", 6)
    tensors = {
        "q": randn(B, H, N, D),
        "k": randn(B, H_kv, N, D),
        "v": randn(B, H_kv, N, D_v),
        "bias": randn(H, W + 1),
        "tau": tau + 0.1 * torch.arange(H, dtype=torch.float64) * (tau != -1.0),
    }
    options: dict[str, Any] = {"window_size": W}
    if case.get("scale"):
        options["scale"] = case.scale
    if case.get("varlen"):
        options["varlen"] = torch.tensor(case.varlen)
    if case.get("mask"):
        mask = torch.rand(B, 1, N, N, generator=generator) > 0.4
        mask[0, 0, 4] = False  # a query that sees nothing
        options["mask"] = mask
    return tensors, options
