"""Decoding from a cache is the full forward: padded rows, packed rows, global landmarks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsalt.modules import DSALTTransformer
from shared_kernels.testing import others_thorough
from shared_kernels.testing.tolerances import tolerance

from .cases import SIZES

FLOAT64 = tolerance(torch.float64)
BOUND = tolerance(torch.float32) / 2
VARIANTS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2, "bias": True, "landmark_block": 5},
    "sinks": {"n_sink": 2, "window_ramp": 2.0, "rope_base": None},
    "normalizer": {"normalizer": lambda s, dim: torch.softmax(s, dim)},
    "no-landmarks": {"k_lmk": 0},
    "global": {"landmark_mode": "global"},
}


def stack(**options) -> DSALTTransformer:
    model = DSALTTransformer(**{**SIZES, **options}).eval()
    for p in model.parameters():  # nothing may hold by initialisation alone
        p.data += 0.2 * torch.randn_like(p)
    return model


class Rows:
    """Sequences of different lengths, each also run alone, and how far the cache has come."""

    def __init__(self, model: nn.Module, lengths: list[int], total: int = 45) -> None:
        self.model, self.at = model, list(lengths)
        self.x = [torch.randn(total, 32) for _ in lengths]
        scorer = model.blocks[0].attention.scorer
        prefixes = [None if scorer.causal else n for n in lengths]
        self.whole = [
            model(x[None], landmark_prefix=n)[0]
            if scorer.causal
            else torch.cat((model(x[None, :n])[0], model(x[None], landmark_prefix=n)[0, n:]))
            for x, n in zip(self.x, prefixes, strict=True)
        ]
        self.past = None

    def check(self, hidden: torch.Tensor, b: int, begin: int, end: int) -> None:
        assert (hidden - self.whole[b][begin:end]).abs().max() <= BOUND

    def step(self, counts: list[int], side: str = "right", masked: bool = True) -> None:
        """Continue row b by counts[b] tokens, in one call."""
        n = max(counts)
        x, mask = torch.full((len(counts), n, 32), 7.0), torch.zeros(len(counts), n)
        where = []
        for b, count in enumerate(counts):
            columns = torch.arange(count) + (n - count if side == "left" else 0)
            if side == "holes" and count:
                columns = torch.randperm(n)[:count].sort().values
            x[b, columns] = self.x[b][self.at[b] : self.at[b] + count]
            mask[b, columns] = 1
            where.append(columns)
        given = {"attention_mask": mask} if masked else {}
        out = self.model(x, past_key_values=self.past, use_cache=True, **given)
        self.past = out.past_key_values
        for b, count in enumerate(counts):
            if count:
                self.check(out.hidden[b, where[b]], b, self.at[b], self.at[b] + count)
            self.at[b] += count


@pytest.mark.parametrize(
    ("name", "side"), [*((n, "holes") for n in VARIANTS), ("plain", "left"), ("plain", "right")]
)
def test_prompts_of_different_lengths(name, side):
    prompts = [17, 1, 8, 24]
    rows = Rows(stack(**VARIANTS[name]), prompts)
    rows.at = [0] * 4
    rows.step(prompts, side)
    for _ in range(5):  # over a block's boundary, at another step in each row
        rows.step([1] * 4, masked=False)
    rows.step([5] * 4, masked=False)
    rows.step([2, 0, 6, 1], side)  # some rows have ended, some go faster
    rows.step([1, 0, 1, 0], side)
    assert rows.past[1].lengths.tolist() == rows.at
    assert all(
        y.shape[2] == rows.past[0].columns for y in (rows.past[0].values, rows.past[0].energy)
    )


@pytest.mark.parametrize("name", ["plain", "global"])
def test_rows_of_one_length_that_part_later(name):
    rows = Rows(stack(**VARIANTS[name]), [12, 12])
    rows.at = [0, 0]
    rows.step([12, 12], masked=False)
    assert rows.past[0].lengths is None
    rows.step([1, 1], masked=False)
    rows.step([9, 2])
    rows.step([1, 1], masked=False)


@pytest.mark.parametrize("name", ["plain", "grouped", "no-landmarks"])
def test_packed_prompts(name):
    prompts = [9, 1, 24, 16]
    rows = Rows(stack(**VARIANTS[name]), prompts)
    x = torch.cat([x[:n] for x, n in zip(rows.x, prompts, strict=True)])[None]
    bounds = torch.tensor([0, *prompts]).cumsum(0).to(torch.int32)
    first = rows.model(x, cu_seqlens=bounds, use_cache=True)
    assert first.hidden.shape == x.shape
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows.check(first.hidden[0, begin:end], b, 0, prompts[b])
    rows.past = first.past_key_values
    assert rows.past[0].keys.shape[0] == 4 and rows.past[0].lengths.tolist() == prompts
    rows.step([1] * 4, masked=False)
    rows.step([7] * 4, masked=False)
    counts = [3, 0, 2, 5]  # packed again
    more = torch.cat([x[a : a + n] for x, a, n in zip(rows.x, rows.at, counts, strict=True)])[None]
    bounds = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    out = rows.model(
        more, cu_seqlens=bounds, past_key_values=rows.past, use_cache=True, return_windows=True
    )
    assert out.windows[0].shape == (1, 4, 10)
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if counts[b]:
            rows.check(out.hidden[0, begin:end], b, rows.at[b], rows.at[b] + counts[b])
    rows.past, rows.at = out.past_key_values, [a + n for a, n in zip(rows.at, counts, strict=True)]
    rows.step([1] * 4, masked=False)


def test_a_global_list_is_that_of_the_first_call():
    model = stack(landmark_mode="global", k_lmk=6)
    x = torch.randn(2, 50, 32)
    past, parts = None, []
    for a, b in [(0, 30), (30, 31), (31, 40), *((t, t + 1) for t in range(40, 50))]:
        step = model(x[:, a:b], past_key_values=past, use_cache=True)
        parts.append(step.hidden)
        past = step.past_key_values
    whole = model(x, landmark_prefix=30)
    assert (torch.cat(parts, 1) - whole).abs().max() <= BOUND
    other = model(x)
    assert (other - whole).abs().max() > 1e-3  # a list of all 50 tokens is another one
    longer = model(x, landmark_prefix=80)
    assert (longer - other).abs().max() <= BOUND


def test_windows_come_back_in_place_and_padding_is_zero():
    model = stack()
    attention = model.blocks[0].attention
    x, mask = torch.randn(2, 20, 32), torch.ones(2, 20)
    mask[0, :7] = 0
    _, windows, cache = attention(x, attention_mask=mask, use_cache=True, return_window=True)
    alone = attention(x[:1, 7:], return_window=True)[1]
    assert (windows[:1, :, 7:] - alone).abs().max() <= BOUND
    again = torch.tensor([[1, 0, 1], [1, 1, 1]])
    y = torch.randn(2, 3, 32)
    out, windows = attention(y, attention_mask=again, past_key_value=cache, return_window=True)
    assert out.shape == y.shape and bool((out[0, 1] == 0).all())
    both = torch.cat((x[:1, 7:], y[:1, ::2]), 1)
    alone = attention(both, return_window=True)
    assert (windows[0, :, ::2] - alone[1][0, :, -2:]).abs().max() <= BOUND
    assert (out[0, ::2] - alone[0][0, -2:]).abs().max() <= BOUND


def test_a_ragged_cache_has_gradients():
    model = stack().double()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    mask = torch.ones(2, 12)
    mask[1, :5] = 0
    y = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    past = model(x, attention_mask=mask, use_cache=True).past_key_values
    (ours,) = torch.autograd.grad(model(y, past_key_values=past).square().sum(), y)
    z = y.detach().clone().requires_grad_()
    alone = [model(torch.cat((x[b, n:], z[b]))[None])[0, -4:] for b, n in ((0, 0), (1, 5))]
    (exact,) = torch.autograd.grad(torch.stack(alone).square().sum(), z)
    assert (ours - exact).abs().max() <= FLOAT64 * exact.abs().max()


def test_bad_caches():
    model = stack()
    x = torch.randn(2, 20, 32)
    past = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`x` must have the 2 rows of past_key_value, got 3"):
        model(torch.randn(3, 1, 32), past_key_values=past)
    with pytest.raises(ValueError, match="`attention_mask` must have shape"):
        model(x[:, :1], attention_mask=torch.ones(2, 21), past_key_values=past)
    with pytest.raises(ValueError, match="`landmark_prefix` must come with landmark_mode='global'"):
        model(x, landmark_prefix=5)
    wide = stack(landmark_mode="global")
    with pytest.raises(ValueError, match="`landmark_prefix` must be at least 1"):
        wide(x, landmark_prefix=0)
    past = wide(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`landmark_prefix` must be None with past_key_value"):
        wide(x, past_key_values=past, landmark_prefix=5)
    with pytest.raises(ValueError, match="`x` must hold at least one token"):
        model(x[:, :0], use_cache=True)


def least(model) -> int:
    """Columns that a layer needs: slots of landmarks, the reach of a window, two blocks."""
    layer = model.blocks[0].attention
    slots = layer.n_heads // layer.n_kv_heads * layer.scorer.k
    reach = math.ceil(layer.window.n_max + layer.window_ramp)
    return slots + max(reach, layer.scorer.landmark_block) + layer.scorer.landmark_block


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_is_bounded_by_window_and_landmarks(name):
    model, x = stack(**VARIANTS[name]), torch.randn(2, 200, 32)
    whole = model(x) if name != "global" else model(x, landmark_prefix=40)
    past, at = None, 0
    for n in [40] + [1] * 30 + [7, 1, 1, 23] + [1] * 20 + [50] + [1] * 28:
        out = model(x[:, at : at + n], past_key_values=past, use_cache=True)
        past = out.past_key_values
        if at or name != "global":
            assert (out.hidden - whole[:, at : at + n]).abs().max() <= BOUND
        at += n
        assert all(cache.columns < least(model) for cache in past)
    assert past[0].length == at == 200


@pytest.mark.parametrize("side", others_thorough(["holes", "left"]))
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_different_lengths_are_bounded_as_well(name, side):
    rows = Rows(stack(**VARIANTS[name]), [17, 1, 8, 60], total=150)
    rows.at = [0] * 4
    rows.step([17, 1, 8, 60], side)
    for turn in range(3):
        for _ in range(9):
            rows.step([1] * 4, masked=False)
        rows.step([4 + turn, 0, 11, 1], side)
    assert rows.past[0].columns < least(rows.model) + 12


def test_rows_of_a_cache_can_be_taken():
    model, x = stack(), torch.randn(2, 90, 32)
    past = model(x[:, :60], use_cache=True).past_key_values
    swapped = [cache.rows(torch.tensor([1, 0, 0])) for cache in past]
    out = model(x[[1, 0, 0], 60:], past_key_values=swapped)
    assert (out - model(x)[[1, 0, 0], 60:]).abs().max() <= BOUND
