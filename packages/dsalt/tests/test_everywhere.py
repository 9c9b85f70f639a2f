"""Every public function and module: empty sizes, gradients, transforms, tracing, export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsalt
from dsalt.kernels import (
    HybridEnergyScorer,
    compute_hybrid_energy_scores,
    dsalt_attention,
    hybrid_energy,
    select_landmarks,
)
from dsalt.model import DSALTLMHeadModel
from dsalt.modules import (
    DSALTAttention,
    DSALTBlock,
    DSALTTransformer,
    SwiGLU,
    WindowSizePredictor,
    window_regulariser,
)
from shared_kernels.testing import assert_close

SIZES = {"n_min": 2, "n_max": 6, "k_lmk": 2}


def _attend(**options):
    def run(q, k, v):
        B, H, N, _ = q.shape
        windows = torch.full((B, H, N), 3.5)
        block = options.get("landmark_block")
        lists = (-(-k.shape[2] // block) - (k.shape[2] - N) // block if N else 0,) if block else ()
        idx = torch.zeros(B, H, *lists, 2, dtype=torch.int32)
        return dsalt_attention(q, k, v, windows, idx, **options)

    return run


FUNCTIONS = {
    "attention": _attend(),
    "attention-blocks": _attend(landmark_block=4),
    "attention-reference": _attend(backend="reference"),
    "attention-normalizer": _attend(normalizer=torch.softmax),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("B", "H", "H_kv", "n_q", "n_k"),
    [(0, 2, 2, 5, 5), (2, 0, 1, 5, 5), (2, 2, 1, 0, 5), (2, 2, 2, 0, 0), (0, 0, 1, 0, 0)],
)
def test_empty_attention(name, B, H, H_kv, n_q, n_k):
    q = torch.randn(B, H, n_q, 4, requires_grad=True)
    k, v = (torch.randn(B, H_kv, n_k, 4, requires_grad=True) for _ in range(2))
    out = FUNCTIONS[name](q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize(("B", "N", "H"), [(0, 5, 2), (2, 0, 2), (0, 0, 2)])
def test_empty_scores_and_landmarks(B, N, H):
    x, values = torch.randn(B, N, 6, requires_grad=True), torch.randn(B, H, N, 3)
    windows = torch.full((B, H, N), 2.0)
    for causal in (False, True):
        scores = hybrid_energy(x, torch.randn(H, 6, 3), torch.full((H,), 0.5), causal=causal)
        assert scores.shape == (B, H, N)
        scores.sum().backward()
    for k in (0, 2):
        assert select_landmarks(scores, k).shape == (B, H, k)
        lists = select_landmarks(scores, k, landmark_block=2)
        assert lists.shape == (B, H, -(-N // 2), k) and bool((lists < N).all())
        found = compute_hybrid_energy_scores(
            x, torch.randn(H, 6, 3), windows, k, torch.full((H,), 0.5)
        )
        assert found.shape == (B, H, k)
        for mode in ("block_causal", "global"):
            marks = HybridEnergyScorer(H, k, landmark_mode=mode)(x, values, windows)
            assert marks.idx.shape == marks.bias.shape
    assert WindowSizePredictor(6, H, 1, 3)(x).shape == (B, H, N)
    for kind in ("entropy", "length"):
        assert bool(window_regulariser(windows, 1, 3, kind).isfinite())


MODULES = {
    "attention": lambda: DSALTAttention(8, 2, **SIZES, landmark_block=4),
    "attention-global": lambda: DSALTAttention(8, 2, **SIZES, landmark_mode="global"),
    "attention-normalizer": lambda: DSALTAttention(8, 2, **SIZES, normalizer=torch.softmax),
    "block": lambda: DSALTBlock(8, 2, **SIZES),
    "swiglu": lambda: SwiGLU(8),
    "transformer": lambda: DSALTTransformer(8, 2, 2, **SIZES, landmark_block=4),
}


def first(output):
    if isinstance(output, dsalt.LMOutput):
        return output.logits
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty_modules(name, B, N):
    module = MODULES[name]()
    x = torch.randn(B, N, 8, requires_grad=True)
    out = first(module(x))
    assert out.shape == x.shape
    out.sum().backward()
    assert not x.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty_language_model(B, N):
    model = DSALTLMHeadModel(11, 8, 1, 2, **SIZES)
    ids = torch.zeros(B, N, dtype=torch.long)
    for shift in (False, True):
        out = model(ids, labels=ids, shift_labels=shift)
        assert out.logits.shape == (B, N, 11)
        out.loss.backward()
        assert float(out.loss) == 0.0
    if N:
        assert model.generate(ids, max_new_tokens=2).shape[0] == B
