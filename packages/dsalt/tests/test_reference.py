"""The specification itself, against loops and a dense softmax."""

from __future__ import annotations

import math

import pytest
import torch

from dsalt import _geometry, _landmarks, _reference
from dsalt._call import CausalLandmarks
from dsalt.kernels import (
    HybridEnergyScorer,
    dsalt_attention,
    hybrid_energy,
    select_landmarks,
)
from shared_kernels.testing import assert_close, parametrize

from .cases import CASES, inputs


@parametrize([c for c in CASES if c.N_k <= 70])
def test_attention_is_the_sentence_of_the_docstring(case):
    tensors, options = inputs(case)
    out = dsalt_attention(**tensors, **options, backend="reference")
    Q, K, V, windows, idx = (tensors[n] for n in ("Q", "K", "V", "window_sizes", "landmark_idx"))
    bias = tensors.get("landmark_bias")
    N_q, N_k, R = case.N_q, case.N_k, options["window_ramp"]
    bounds = case.get("bounds", (0, N_k))
    b, h = case.B - 1, case.H - 1  # one batch entry and head, row by row
    h_kv = h // (case.H // case.H_kv)
    for r in range(0, N_q, 3):
        i = r + N_k - N_q
        s = max(s for s, start in enumerate(bounds[:-1]) if start <= i)
        start, w = bounds[s], float(windows[b, h, r])
        slots, gates = idx[b, h], None if bias is None else bias[b, h]
        if case.block:
            c = start // case.block + s + (i - start) // case.block
            c -= 0 if "bounds" in case.values else (N_k - N_q) // case.block
            slots, gates = slots[c], None if gates is None else gates[c]
        weights, named = torch.zeros(N_k, dtype=torch.float64), set()
        for j in range(start, i + 1):
            d = i - j
            if d <= w:
                weights[j] = 1
            elif case.soft and d < w + R:
                weights[j] = (R + w - d) / R
        for slot, l in enumerate(slots.tolist()):
            if start <= l < i - w and l not in named:
                g = 1.0 if gates is None else math.exp(gates[slot])
                weights[l] = weights[l] + (1 - weights[l]) * g
            named.add(l)
        scores = (Q[b, h, r] * case.D**-0.5) @ K[b, h_kv].T
        p = weights * (scores - scores.max()).exp()
        assert_close(out[b, h, r], (p / p.sum()) @ V[b, h_kv])


def test_a_window_of_everything_is_causal_attention():
    q, k, v = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64)
    windows = torch.full((1, 2, 50), 60.0)
    out = dsalt_attention(q, k, v, windows, torch.zeros(1, 2, 0, dtype=torch.int32))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(out, dense)


def test_every_token_a_landmark_is_causal_attention():
    q, k, v = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64)
    windows = 9 * torch.rand(1, 2, 50, dtype=torch.float64)
    every = torch.arange(50).expand(1, 2, 50)
    out = dsalt_attention(q, k, v, windows, every)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(out, dense)


def test_nothing_jumps_as_a_window_grows():
    q, k, v = torch.randn(3, 1, 1, 40, 4, dtype=torch.float64)
    idx = torch.tensor([[[3, 9, 20]]])
    bias = torch.tensor([[[-2.0, 0.5, 1.0]]])
    rows = torch.linspace(0, 30, 3001, dtype=torch.float64)
    outs = [
        dsalt_attention(q, k, v, w.expand(1, 1, 40), idx, landmark_bias=bias, window_ramp=4.0)
        for w in rows[::10]
    ]
    steps = torch.stack(outs).diff(dim=0).abs().amax((1, 2, 3, 4))
    assert steps.max() < 0.25  # 0.1 of a token moves at most a fortieth of a weight's range


@pytest.mark.parametrize("causal", [False, True])
def test_energy(causal):
    value, norm = torch.rand(2, 3, 30, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64)
    value[:, 1] = 3 + 0.01 * value[:, 1]  # spread below and about 1 % of the mean
    norm[1] = 1 + 0.03 * norm[1]
    alpha = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    exact = _reference.energy(value, norm, alpha, causal)
    z = (lambda n: _landmarks.z_prefix(n)[0]) if causal else _landmarks.z_global
    a = alpha[:, None]
    assert_close(a * z(value) + (1 - a) * z(norm)[:, None], exact)
    if causal:
        assert bool((exact[..., 0] == 0).all())


@pytest.mark.parametrize("causal", [False, True])
def test_rounding_of_normed_states_does_not_move_the_scores(causal):
    """All norms are nearly equal there: what the last digit says must not decide."""
    x = torch.nn.functional.rms_norm(torch.randn(2, 200, 64), (64,))
    W_V = torch.randn(4, 64, 16)
    nudge = 1 + 2.0**-24 * torch.randint(-1, 2, (2, 200, 1))  # a row's common factor, ...
    nudged = x * nudge * (1 + 2.0**-24 * torch.randint(-1, 2, x.shape))  # ... and each entry's
    assert not torch.equal(nudged, x)
    alpha = torch.full((4,), 0.6)
    scores = [hybrid_energy(y, W_V, alpha, causal=causal) for y in (x, nudged)]
    assert_close(scores[1], scores[0], scale=0.5)  # 1e-5


def test_repeated_tokens_tie_and_the_earlier_wins():
    """Without the rounding of what is compared, the last digit would choose among them."""
    x = torch.ones(1, 12, 16) * (1 + 1e-7 * torch.randn(1, 12, 1))
    found = HybridEnergyScorer(2, 2, landmark_block=4)(x, x[:, None, :, :4])
    assert found.idx[:, :, 1:].unique(dim=2).tolist() == [[[[0, 1]], [[0, 1]]]]


@pytest.mark.parametrize("block", [1, 3, 8, 50])
@pytest.mark.parametrize("k", [0, 1, 4, 60])
@pytest.mark.parametrize("n", [0, 1, 24, 29])
def test_block_causal_lists(block, k, n):
    scores = torch.randn(2, 2, n)
    call = CausalLandmarks(scores, k, block, None)
    exact = _reference.causal_landmarks(call)
    assert torch.equal(select_landmarks(scores, k, landmark_block=block), exact)
    assert torch.equal(_landmarks.by_scan(call), exact)


def test_block_causal_lists_with_equal_scores_and_sinks():
    scores = torch.randint(0, 3, (2, 2, 40)).float()
    for n_sink in (0, 2, 5):
        sunk = scores.masked_fill(torch.arange(40) < n_sink, float("inf"))
        call = CausalLandmarks(sunk, 4, 8, None)
        exact = _reference.causal_landmarks(call)
        found = select_landmarks(scores, 4, landmark_block=8, n_sink=n_sink)
        assert torch.equal(found, exact)
        assert torch.equal(_landmarks.by_scan(call), exact)
        if n_sink:
            assert bool((found[:, :, 1:, 0] == 0).all()) and bool((found[:, :, 1:, 1] == 1).all())


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "often never", "never"])
@pytest.mark.parametrize(("k", "block"), [(5, 1), (40, 8), (3, 300)])
def test_lists_of_long_sequences(kind, k, block):
    """Merges grow with the sequence, and shrink again where every token is a newcomer."""
    scores = torch.randn(1, 2, 2500)
    if kind in ("rising", "falling"):
        scores[:, 0] = scores[:, 0].sort(descending=kind == "falling").values
    if "never" in kind:
        never = torch.rand(1, 2, 2500) < (0.99 if kind == "often never" else 2.0)
        scores = scores.masked_fill(never, float("-inf"))
    found = select_landmarks(scores, k, landmark_block=block)
    assert torch.equal(found, _landmarks.by_scan(CausalLandmarks(scores, k, block, None)))


@pytest.mark.parametrize("bounds", [(0, 40), (0, 7, 7, 8, 31, 40), (0, 0, 40, 40)])
def test_packed_lists_are_those_of_each_sequence(bounds):
    cu, block, k = torch.tensor(bounds, dtype=torch.int32), 8, 3
    scores = torch.randn(1, 2, 40)
    packed = select_landmarks(scores, k, landmark_block=block, cu_seqlens=cu)
    scanned = _landmarks.by_scan(CausalLandmarks(scores, k, block, cu))
    assert packed.shape[2] == 40 // block + len(bounds) - 1
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = select_landmarks(scores[..., start:stop], k, landmark_block=block)
        alone = torch.where(alone < 0, -1, alone + start)
        first = start // block + s
        for lists in (packed, scanned):
            assert torch.equal(lists[:, :, first : first + alone.shape[2]], alone)


def test_global_choice_leaves_the_last_window_out():
    scores = torch.randn(2, 3, 30)
    windows = torch.randint(0, 12, (2, 3, 30))
    found = select_landmarks(scores, 5, windows)
    allowed = torch.arange(30) < 30 - windows[..., -1:]
    assert torch.equal(found, _reference.select(scores, 5, allowed))
    assert bool((select_landmarks(scores, 40)[..., 30:] == -1).all())
    everything = torch.full((2, 3, 30), 30)
    assert bool((select_landmarks(scores, 5, everything) == -1).all())


def test_duplicates_and_strangers_become_empty_slots():
    idx = torch.tensor([[[4, 2, 4, -1, 9, 2, 100, -7]]])
    assert _geometry.unique_landmarks(idx, 10).tolist() == [[[4, 2, -1, -1, 9, -1, -1, -1]]]
