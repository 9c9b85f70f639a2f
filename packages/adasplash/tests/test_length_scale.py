"""Scores that grow with the length, and slopes on half of the heads."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash import EntmaxAttention, adasplash, attention_stats, entmax_decode
from shared_kernels import device
from shared_kernels.testing import assert_close, compare

from .cases import BY_NAME, inputs

BACKEND = "triton" if device.interpreting() else "torch"
DTYPE = torch.float32 if device.interpreting() else torch.float64
CASES = (
    "plain",
    "causal",
    "cross-fewer-queries",
    "varlen",
    "varlen-causal-grouped",
    "packed-causal",
    "softcap-bias-alibi",
    "sink",
)


def written_out(call, scale):
    """Factors (B, H, N_q, 1) from the definition, one query after the other."""
    q, k = call["q"], call["k"]
    (B, H, N_q, _), N_k = q.shape, k.shape[2]
    rows = []
    for b in range(B):
        for i in range(N_q):
            start, n_q, n_k = 0, N_q, N_k
            if call.get("varlen") is not None:
                n_q = n_k = int(call["varlen"][b])
            if call.get("cu_seqlens") is not None:
                ends = call["cu_seqlens"].tolist()
                start, stop = next(
                    ((x, y) for x, y in zip(ends, ends[1:], strict=False) if x <= i < y), (0, N_q)
                )
                n_q = n_k = stop - start
            n = i - start + n_k - n_q + 1 if call.get("is_causal") else n_k
            delta, beta, gamma = scale.expand(H, 3).unbind(-1)
            log_n = math.log(n) if n > 1 else 0.0
            rows.append(delta + beta * log_n**gamma)
    return torch.stack(rows).view(B, N_q, H, 1).transpose(1, 2)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("name", ["causal"] if device.interpreting() else CASES)
def test_it_is_a_factor_of_each_query(name, per_head):
    tensors, options = inputs(BY_NAME[name])
    H = tensors["q"].shape[1]
    scale = torch.tensor([0.6, 0.4, 1.3], dtype=torch.float64)
    if per_head:
        scale = scale + 0.1 * torch.rand(H, 3, dtype=torch.float64)
    tensors["length_scale"] = scale

    def exact(length_scale, **x):
        factor = written_out({**x, **options}, length_scale)
        return adasplash(**{**x, "q": x["q"] * factor}, **options, backend="reference")

    compare(
        lambda **x: adasplash(**x, **options, backend=BACKEND),
        exact,
        tensors,
        differentiable=list(tensors),
        dtype=DTYPE,
    )


def test_derivatives_of_every_order_and_a_first_token():
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scale = torch.tensor([[1.0, 0.5, 0.7], [0.8, 0.2, 1.5]], dtype=torch.float64).requires_grad_()

    def f(q, k, v, scale):
        return adasplash(q, k, v, is_causal=True, length_scale=scale)

    assert torch.autograd.gradcheck(f, (q, k, v, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v, scale), fast_mode=True)
    (grad,) = torch.autograd.grad(f(q[:, :, :1], k[:, :, :1], v[:, :, :1], scale).sum(), scale)
    assert bool(grad.isfinite().all())


def test_decoding_is_the_end_of_the_whole():
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    scale = torch.tensor([0.7, 0.3, 1.2])
    lengths = torch.tensor([30, 19])
    for b, n in enumerate(lengths.tolist()):
        x = [x[b : b + 1, :, :n] for x in (q, k, v)]
        whole = adasplash(*x, is_causal=True, length_scale=scale)
        newest = q[:, :, n - 3 : n]
        found = entmax_decode(newest, k, v, lengths, length_scale=scale)
        assert_close(found[b], whole[0, :, -3:])


def test_it_makes_long_rows_sparser():
    q, k = torch.randn(2, 1, 1, 800, 16)
    plain = attention_stats(q, k, is_causal=True)
    scaled = attention_stats(q, k, is_causal=True, length_scale=torch.tensor([1.0, 0.5, 1.0]))
    assert (
        scaled.support[..., 400:].double().mean() < 0.7 * plain.support[..., 400:].double().mean()
    )


@pytest.mark.parametrize(
    "bad", [torch.ones(4), torch.ones(3, 3), torch.ones(3, dtype=torch.int64)], ids=str
)
def test_bad_scales_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match="`length_scale` must"):
        adasplash(*torch.randn(3, 1, 2, 5, 4), length_scale=bad)


@pytest.mark.parametrize("causal", [False, True])
def test_the_module_has_both(causal):
    torch.manual_seed(0)
    module = EntmaxAttention(32, 4, causal=causal, length_scale=True, alibi="half")
    plain = EntmaxAttention(32, 4, causal=causal, alibi="half")
    x = torch.randn(2, 12, 32)
    plain.load_state_dict(module.state_dict(), strict=False)
    assert_close(module(x), plain(x))  # nothing at the start
    assert module.alibi_slopes.tolist() == [2.0**-4, 2.0**-8, 0.0, 0.0]
    torch.nn.init.normal_(module.length_scale, 1.0, 0.2)
    module(x).square().sum().backward()
    assert bool((module.length_scale.grad != 0).any(0).all())
    weights, v = module.weights(x), module._split(module.v_proj(x), 4)
    assert_close(module.o_proj((weights @ v).transpose(1, 2).flatten(2)), module(x))
    with pytest.raises(ValueError, match="`alibi` must be 'half' or None"):
        EntmaxAttention(32, 4, alibi="all")
