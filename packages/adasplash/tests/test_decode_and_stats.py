"""Decoding with a cache is the last row of the whole; the statistics are those of the weights."""

from __future__ import annotations

import pytest
import torch

from adasplash import (
    _reference,
    adasplash,
    attention_stats,
    entmax_decode,
)
from adasplash.api import attention_call
from shared_kernels import dispatch
from shared_kernels.testing import assert_close

from .cases import BY_NAME, PER_HEAD, inputs


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"window": 6}, {"alibi_slopes": torch.tensor([0.1, 0.3] * 2)}]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_decoding_is_the_end_of_the_whole(n, options, backend):
    torch.manual_seed(0)
    q, alpha = torch.randn(3, 4, 20, 8), torch.tensor([1.2, 1.5, 1.5, 2.0])
    k, v = torch.randn(2, 3, 2, 20, 8)
    lengths = torch.tensor([20, 11, 5])
    for x in (k, v):
        for b, length in enumerate(lengths.tolist()):
            x[b, :, length:] = torch.nan
    newest = torch.stack([q[b, :, m - n : m] for b, m in enumerate(lengths.tolist())])
    out = entmax_decode(newest, k, v, lengths, alpha, **options, backend=backend)
    for b, m in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        whole = adasplash(
            q[one, :, :m], k[one, :, :m], v[one, :, :m], alpha, is_causal=True, **options
        )
        assert_close(out[one], whole[:, :, m - n :])


def test_decoding_has_gradients_and_checks():
    q, k, v = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (1, 9, 9))
    entmax_decode(q, k, v, torch.tensor([9, 4])).sum().backward()
    assert bool((v.grad[1, :, 4:] == 0).all()) and bool((v.grad[1, :, :4] != 0).any())
    assert bool((entmax_decode(q, k, v, torch.tensor([0, 4]))[0] == 0).all())
    with pytest.raises(ValueError, match=r"`lengths` must be in \[0, N=9\], got 10"):
        entmax_decode(q, k, v, torch.tensor([10, 4]))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["plain", "grouped", "window-causal", "mask", "varlen"])
def test_stats_are_those_of_the_weights(name, backend):
    case = BY_NAME[name]
    tensors, options = inputs(case, PER_HEAD)
    q, k, alpha = tensors["q"], tensors["k"], tensors["alpha"]
    stats = attention_stats(q, k, alpha, **options, tile=16, backend=backend)
    assert dispatch.last("adasplash::attention_stats") == backend
    other = attention_stats(q, k, alpha, **options, tile=16)
    assert torch.equal(stats.support, other.support)
    assert_close(stats.tau, other.tau)
    lengths = options.pop("varlen", None)
    if lengths is not None:
        n = int(lengths[1])
        assert bool((stats.support[0] == 0).all() and (stats.support[1, :, n:] == 0).all())
        stats = stats._replace(
            support=stats.support[1:, :, :n], tile_density=stats.tile_density[1:]
        )
        q, k = q[1:, :, :n], k[1:, :, :n]
    weights = _reference.attention_weights(attention_call(q, k, k, alpha, **options))
    assert torch.equal(stats.support, (weights > 0).sum(-1))
    visible = _reference.attention_weights(attention_call(q, k, k, 1.0, **options)) > 0

    def tiles(flags):
        pad = (0, -flags.shape[-1] % 16, 0, -flags.shape[-2] % 16)
        flags = torch.nn.functional.pad(flags, pad)
        return flags.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16)).any(-1).any(-2).sum((-1, -2))

    assert_close(stats.tile_density.double(), tiles(weights > 0) / tiles(visible), scale=1e3)


def test_block_diagonal_scores_leave_few_tiles():
    basis = 12 * torch.eye(16).repeat_interleave(64, 0)
    stats = attention_stats(basis[None, None], basis[None, None], alpha=1.5)
    assert bool((stats.tile_density <= 0.3).all()) and "tiles hold a weight" in str(stats)
    flat = attention_stats(0 * basis[None, None], basis[None, None])
    assert bool((flat.tile_density == 1).all()) and bool((flat.support == 1024).all())


def test_stats_of_no_query_can_be_shown():
    stats = attention_stats(torch.randn(1, 2, 0, 8), torch.randn(1, 2, 5, 8))
    assert stats.support.shape == (1, 2, 0) and str(stats) == "no query"
