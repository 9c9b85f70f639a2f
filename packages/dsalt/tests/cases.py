"""The cases that every leg runs: CPU, interpreter, GPU."""

from __future__ import annotations

import pytest
import torch

from dsalt.kernels import dsalt_attention
from shared_kernels import dispatch, native
from shared_kernels.testing import Case

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
NATIVE = pytest.param("native", marks=needs_native)

# A small stack of layers.
SIZES = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "n_min": 3,
    "n_max": 14,
    "k_lmk": 4,
    "landmark_block": 8,
}

_PLAIN = Case(
    "plain", B=2, H=2, H_kv=2, N_q=70, N_k=70, D=16, K=5, w=20.0, soft=True, block=0, bias=False
)

CASES = [
    _PLAIN,
    _PLAIN.replaced("hard", soft=False),
    _PLAIN.replaced("equal-hard", soft=False, equal=True),
    _PLAIN.replaced("equal-soft", equal=True),
    _PLAIN.replaced("gqa-bias", H=4, bias=True, B=1),
    _PLAIN.replaced("block-causal", block=8, bias=True),
    _PLAIN.replaced("block-of-one", block=1, N_q=33, N_k=33, B=1),
    _PLAIN.replaced("odd-block-gqa", block=27, H=4, B=1, bias=True, D=24),
    _PLAIN.replaced("long-block-hard", block=100, soft=False, bias=True),
    _PLAIN.replaced("packed", B=1, block=8, bounds=(0, 1, 1, 30, 70), bias=True),
    _PLAIN.replaced("packed-one-list", B=1, bounds=(0, 33, 70), soft=False),
    _PLAIN.replaced("last-queries", N_q=21, block=8, bias=True),
    _PLAIN.replaced("one-query", N_q=1, block=32),
    _PLAIN.replaced("window-zero", w=0.0, soft=False),
    _PLAIN.replaced("window-everything", w=500.0, K=3),
    _PLAIN.replaced("empty-landmarks", empty=True, bias=True),
    _PLAIN.replaced("no-landmarks", K=0),
    _PLAIN.replaced("many-landmarks", K=70, bias=True, N_q=40, N_k=40, B=1),
    _PLAIN.replaced("head-dim-1", D=1, B=1),
    _PLAIN.replaced("head-dim-80", D=80, B=1, N_q=130, N_k=130, block=32, bias=True),
    _PLAIN.replaced("head-dim-160", D=160, B=1, H=4, N_q=45, N_k=45, block=16, bias=True),
    _PLAIN.replaced("head-dim-256", D=256, B=1, N_q=37, N_k=37),
    _PLAIN.replaced("large-scores", gain=30.0, bias=True, B=1),
    _PLAIN.replaced("wide-ramp", ramp=41.0, B=1),  # in float32 41 times 1 / 41 is not 1
    _PLAIN.replaced("one-token", N_q=1, N_k=1, B=1),
]


def inputs(case: Case, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors in float64, other keyword arguments) of ``dsalt_attention``."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, H, N_q, N_k, D = case.B, case.H, case.N_q, case.N_k, case.D
    block, bounds = case.block, case.get("bounds")
    windows = torch.rand(B, H, N_q, generator=g, dtype=torch.float64) * 2 * case.w
    if case.get("equal"):
        windows = torch.full_like(windows, case.w + 0.4)
    if block:
        lists = (
            N_k // block + len(bounds) - 1 if bounds else -(-N_k // block) - (N_k - N_q) // block
        )
        shape = (B, H, lists, case.K)
    else:
        shape = (B, H, case.K)
    idx = torch.randint(-2, N_k + 2, shape, generator=g, dtype=torch.int32)
    if case.get("empty"):
        idx.fill_(-1)
    tensors = {
        "Q": randn(B, H, N_q, D) * case.get("gain", 1.0),
        "K": randn(B, case.H_kv, N_k, D),
        "V": randn(B, case.H_kv, N_k, D),
        "window_sizes": windows if case.soft else windows.to(torch.int32),
        "landmark_idx": idx,
    }
    if case.bias:
        tensors["landmark_bias"] = randn(*shape)
    options = {"window_ramp": case.get("ramp", 3.0), "landmark_block": block or None}
    if bounds:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    return tensors, options


def differentiable(case: Case) -> list[str]:
    names = ["Q", "K", "V"]
    names += ["window_sizes"] if case.soft else []
    return names + (["landmark_bias"] if case.bias else [])


def attention(options: dict, backend: str):
    """``dsalt_attention`` with everything but the tensors filled in; it looks at what has run."""
    ran = "torch" if backend == "cpu" else backend

    def attend(**tensors: torch.Tensor) -> torch.Tensor:
        out = dsalt_attention(**tensors, **options, backend=backend)
        assert dispatch.last("dsalt::attention") == ran
        return out

    return attend
