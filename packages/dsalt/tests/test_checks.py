"""Illegal input: one clear message."""

from __future__ import annotations

import pytest
import torch

from dsalt.kernels import (
    HybridEnergyScorer,
    compute_hybrid_energy_scores,
    dsalt_attention,
    hybrid_energy,
    select_landmarks,
)
from shared_kernels import device


def arguments(**changed):
    q, k, v = torch.randn(3, 1, 2, 10, 4)
    given = {
        "Q": q,
        "K": k,
        "V": v,
        "window_sizes": torch.full((1, 2, 10), 3),
        "landmark_idx": torch.zeros(1, 2, 3, dtype=torch.int32),
    }
    return {**given, **changed}


WINDOWS = torch.full((1, 2, 10), 3.0)
LISTS = torch.zeros(1, 2, 3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"window_sizes": -WINDOWS}, ValueError, "`window_sizes` must be finite and >= 0"),
        ({"window_sizes": WINDOWS * torch.nan}, ValueError, "must be finite and >= 0"),
        ({"window_sizes": WINDOWS / 0}, ValueError, "must be finite and >= 0"),
        ({"window_sizes": WINDOWS[..., :9]}, ValueError, r"must have shape \(B=1, H=2, N=10\)"),
        ({"window_sizes": WINDOWS > 1}, TypeError, "must be integer or floating"),
        ({"landmark_idx": torch.zeros(1, 2, 3)}, TypeError, "`landmark_idx` must be an integer"),
        ({"landmark_idx": LISTS[:, :1, 0]}, ValueError, r"have shape \(B=1, H=2, K\)"),
        ({"landmark_idx": LISTS[0, 0]}, ValueError, "`landmark_idx` must have shape"),
        ({"landmark_idx": LISTS}, ValueError, "`landmark_block` must be given with a 4-D"),
        ({"landmark_idx": LISTS, "landmark_block": 3}, ValueError, "must hold 4 lists"),
        ({"landmark_block": 3}, ValueError, "`landmark_block` must be None with a 3-D"),
        ({"landmark_bias": torch.zeros(1, 2, 4)}, ValueError, "must have landmark_idx's shape"),
        ({"window_ramp": 0.0}, ValueError, "`window_ramp` must be a finite number > 0"),
        ({"Q": torch.randn(1, 2, 10, 5)}, ValueError, "`k` must have shape"),
        ({"Q": torch.randn(1, 3, 10, 4)}, ValueError, "divisible by k's"),
        ({"Q": torch.randn(1, 2, 11, 4)}, ValueError, "`Q` must have at most K's 10 tokens"),
        ({"V": torch.randn(1, 2, 10, 3)}, ValueError, "`V` must have Q's head dim"),
        ({"K": torch.randn(1, 2, 10, 4).double()}, ValueError, "must have the dtype of"),
        ({"K": torch.randn(1, 2, 10, 4, device="meta")}, ValueError, "must have the device of"),
        ({"Q": torch.ones(1, 2, 10, 4, dtype=torch.int32)}, TypeError, "be a floating-point"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "never fall and end at N=10"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, "`cu_seqlens` must be an integer"),
        ({"backend": "gpu"}, ValueError, "`backend` must be one of"),
    ],
)
def test_attention(changed, error, message):
    with pytest.raises(error, match=message):
        dsalt_attention(**arguments(**changed))


@pytest.mark.skipif(device.interpreting(), reason="Triton takes CPU tensors there")
def test_a_backend_asked_for_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run"):
        dsalt_attention(**arguments(backend="triton"))


def test_head_dim_limit():
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(ValueError, match=r"head dim in \[1, 256\]"):
        dsalt_attention(q, q, q, torch.ones(1, 1, 4), torch.zeros(1, 1, 1, dtype=torch.int32))


def test_devices_of_the_small_tensors():
    for name in ("window_sizes", "landmark_idx"):
        moved = arguments()[name].to("meta")
        with pytest.raises(ValueError, match=f"`{name}` must have the device of `Q`"):
            dsalt_attention(**arguments(**{name: moved}))


def test_landmarks():
    X, WV, alpha = torch.randn(1, 10, 4), torch.randn(2, 4, 3), torch.full((2,), 0.6)
    with pytest.raises(ValueError, match="`WV` must have shape"):
        hybrid_energy(X, WV[:, :3], alpha)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
        hybrid_energy(X, WV, alpha * 2)
    with pytest.raises(ValueError, match=r"`alpha` must have shape \(\) or \(H=2,\)"):
        hybrid_energy(X, WV, torch.full((3,), 0.6))
    with pytest.raises(TypeError, match="`k` must be an int"):
        select_landmarks(torch.randn(1, 2, 10), 2.0)
    with pytest.raises(ValueError, match="`k` must be >= 0"):
        compute_hybrid_energy_scores(X, WV, WINDOWS, -1, alpha)
    with pytest.raises(ValueError, match="`landmark_block` must be at least 1"):
        select_landmarks(torch.randn(1, 2, 10), 2, landmark_block=0)
    with pytest.raises(ValueError, match="`cu_seqlens` must come with landmark_block"):
        select_landmarks(torch.randn(1, 2, 10), 2, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, 1\), got 1.5"):
        HybridEnergyScorer(2, 3, alpha=1.5)
    with pytest.raises(TypeError, match="`k` must be an int, got float"):
        HybridEnergyScorer(2, 3.5)
    with pytest.raises(ValueError, match="`n_sink` must be >= 0, got -1"):
        select_landmarks(torch.randn(1, 2, 10), 2, n_sink=-1)
    with pytest.raises(ValueError, match="`window_sizes` must be None with landmark_block"):
        select_landmarks(torch.randn(1, 2, 10), 2, torch.ones(1, 2, 10), landmark_block=4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scale": float("nan")}, ValueError, "`scale` must be finite, got nan"),
        ({"scale": "x"}, TypeError, "`scale` must be a number, got str"),
        ({"window_ramp": True}, ValueError, "`window_ramp` must be a finite number > 0, got True"),
        ({"normalizer": "softmax"}, TypeError, "`normalizer` must be a callable"),
    ],
)
def test_numbers_and_callables(changed, error, message):
    with pytest.raises(error, match=message):
        dsalt_attention(**arguments(**changed))


def test_more_landmarks_than_tokens_is_legal():
    X, WV, alpha = torch.randn(1, 10, 4), torch.randn(2, 4, 3), torch.full((2,), 0.6)
    found = compute_hybrid_energy_scores(X, WV, torch.full((1, 2, 10), 4), 20, alpha)
    assert found.shape == (1, 2, 20) and found.dtype == torch.int32
    assert bool((found[..., :6] == torch.arange(6)).all()) and bool((found[..., 6:] == -1).all())
