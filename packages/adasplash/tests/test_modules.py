"""Modules: a bounded alpha, attention blocks, and that they learn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from adasplash import AlphaParameter, EntmaxAttention, LazyAttention, entmax_decode
from shared_kernels.testing import assert_close


def test_alpha_starts_where_it_is_told_and_stays_inside():
    alpha = AlphaParameter(3, init=1.3)
    assert_close(alpha(), torch.full((3,), 1.3))
    for raw in (-1e4, -50.0, 0.0, 50.0, 1e4):
        torch.nn.init.constant_(alpha.raw, raw)
        assert bool(((alpha() >= 1.01) & (alpha() <= 2.0)).all())
        assert alpha.to(torch.bfloat16)().dtype == torch.float32
        alpha.float()


def test_alpha_cannot_leave_under_training():
    alpha = AlphaParameter(init=1.5)
    optimiser = torch.optim.SGD(alpha.parameters(), lr=1e3)
    for sign in (1, -1):
        for _ in range(5):
            optimiser.zero_grad()
            (sign * alpha()).backward()
            optimiser.step()
            assert 1.0 < float(alpha().detach()) <= 2.0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_attention_is_its_weights_times_the_values(causal, n_kv_heads):
    torch.manual_seed(0)
    block = EntmaxAttention(24, 4, causal=causal, n_kv_heads=n_kv_heads, window=7).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    weights = block.weights(x)
    assert weights.shape == (2, 4, 13, 13) and bool((weights == 0).any())
    v = block.v_proj(x).view(2, 13, block.n_kv_heads, 6).transpose(1, 2)
    v = v.repeat_interleave(4 // block.n_kv_heads, 1)
    exact = block.o_proj((weights @ v).transpose(1, 2).reshape(2, 13, 24))
    assert_close(block(x), exact)
    if causal:
        assert bool((weights.triu(1) == 0).all())
        y = x.clone()
        y[:, 8:] += 1
        assert torch.equal(block(y)[:, :8], block(x)[:, :8])


def test_padding_and_mask_are_passed_on():
    block = EntmaxAttention(16, 2)
    x, lengths = torch.randn(2, 9, 16), torch.tensor([4, 9])
    short = block(x[:1, :4])
    assert_close(block(x, varlen=lengths)[:1, :4], short)
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    assert_close(block(x, mask=mask)[:1, :4], short)


@pytest.mark.parametrize("window", [None, 5])
def test_a_cache_continues_the_sequence(window):
    block = EntmaxAttention(24, 4, causal=True, n_kv_heads=2, window=window).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    exact, cache, parts = block(x), None, []
    for part in x.split([6, 1, 1, 5], 1):
        out, cache = block(part, past_key_value=cache, use_cache=True)
        parts.append(out)
    assert_close(torch.cat(parts, 1), exact)
    assert cache.length == 13 and cache.keys.shape == (2, 2, 13, 6)
    other = SimpleNamespace(keys=cache.keys[:, :, :12], values=cache.values[:, :, :12], more=1)
    assert_close(block(x[:, 12:], past_key_value=other), exact[:, 12:])
    assert_close(
        entmax_decode(
            block._split(block.q_proj(x[:, -1:]), 4),
            cache.keys,
            cache.values,
            torch.tensor([13, 13]),
            block.current_alpha(),
            window=window,
        )
        .transpose(1, 2)
        .flatten(2)
        @ block.o_proj.weight.T,
        exact[:, -1:],
    )


@pytest.mark.parametrize("hidden", [slice(0), slice(2)])
@pytest.mark.parametrize("window", [3, 200])
def test_a_cache_continues_lazy_attention(window, hidden):
    layer = LazyAttention(24, 2, window_size=window).double()
    with torch.no_grad():
        layer.attention_biases.normal_()[1, hidden] = -torch.inf
        layer.tau.copy_(torch.tensor([-1.0, 0.5]))
    x = torch.randn(2, 153, 24, dtype=torch.float64, requires_grad=True)
    exact, cache, parts = layer(x), None, []
    for part in x.split([6, 1, 1, 140, 5], 1):
        out, cache = layer(part, past_key_value=cache, use_cache=True)
        parts.append(out)
    found = torch.cat(parts, 1)
    assert_close(found, exact)
    weight = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (x, *layer.parameters())),
        torch.autograd.grad((exact * weight).sum(), (x, *layer.parameters())),
        strict=True,
    ):
        assert_close(a, b, "gradient")
    with pytest.raises(ValueError, match="`mask` must be None for a cache"):
        layer(x, torch.ones(153, 153, dtype=torch.bool), use_cache=True)
    with pytest.raises(ValueError, match=r"`past_key_value.keys` must have shape \(B=1"):
        layer(x[:1], past_key_value=cache)


def test_a_cache_that_does_not_fit_is_refused():
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match="`causal` must be True"):
        EntmaxAttention(16, 2)(x, use_cache=True)
    block = EntmaxAttention(16, 2, causal=True)
    _, cache = block(x, use_cache=True)
    with pytest.raises(ValueError, match="`varlen` must be None"):
        block(x, past_key_value=cache, varlen=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=r"`past_key_value.keys` must have shape \(B=1"):
        block(x[:1], past_key_value=cache)
    with pytest.raises(ValueError, match="`x` must have shape"):
        block(x[..., :8])


def test_fixed_alpha_has_no_parameter():
    block = EntmaxAttention(16, 2, alpha=2.0, learn_alpha=False)
    assert sorted(block.state_dict()) == [f"{n}_proj.weight" for n in "koqv"]
    assert block.current_alpha() == 2.0


def test_it_learns_alpha():
    """Copy one distant token: the loss falls, and every parameter moves."""
    torch.manual_seed(0)
    block = EntmaxAttention(16, 2, causal=True)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    optimiser = torch.optim.Adam(block.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(16, 6, 16)
        loss = (block(x) - x[:, :1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, p in block.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_copies_and_pickles():
    import copy
    import pickle

    block = EntmaxAttention(16, 2)
    x = torch.randn(1, 5, 16)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
    half = EntmaxAttention(16, 2).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16
