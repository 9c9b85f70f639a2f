"""The reference itself: laws, limits and closed forms that need no other implementation."""

from __future__ import annotations

import pytest
import torch

from adasplash import _reference as reference
from adasplash import adasplash, lazy_attention_triton
from adasplash._call import Lazy
from adasplash.api import attention_call
from shared_kernels.testing import assert_close, parametrize
from shared_kernels.testing.tolerances import tolerance

from .cases import ALPHAS, ATTENTION, BY_NAME, inputs

FLOAT64 = tolerance(torch.float64)
EPS = torch.finfo(torch.float64).eps

x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_is_the_maximiser(alpha):
    """y maximises <y, x> + Tsallis entropy: every neighbour on the simplex is worse."""

    def objective(y):
        if alpha == 1.0:
            return (y * x).sum(-1) - torch.xlogy(y, y).sum(-1)
        return (y * x).sum(-1) + ((y - y.pow(alpha)) / (alpha * (alpha - 1))).sum(-1)

    y = reference.entmax(x, alpha)
    assert_close(y.sum(-1), torch.ones(6, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        other = torch.softmax(torch.randn(6, 9, dtype=torch.float64, generator=generator) * 3, -1)
        assert bool((objective(y) >= objective(torch.lerp(y, other, size))).all())


@pytest.mark.parametrize("excess", [2.3e-16, 1e-12, 1e-8])
def test_next_to_softmax(excess):
    """The distance to softmax is of the order of alpha - 1, however small that is."""
    alpha = torch.tensor(1 + excess, dtype=torch.float64, requires_grad=True)
    y = reference.entmax(x, alpha)
    assert (y - torch.softmax(x, -1)).abs().max() < 10 * excess + 4 * EPS
    at_one = torch.ones((), dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 1, 54, dtype=torch.float64).view(6, 9)
    gradients = [
        torch.autograd.grad((reference.entmax(x, a) * weight).sum(), a)[0] for a in (alpha, at_one)
    ]
    assert_close(*gradients, "gradient")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_in_nothing_out(shape):
    assert reference.entmax(torch.empty(shape), 1.5).shape == shape


def test_limits():
    assert torch.equal(reference.entmax(x, 1.0), torch.softmax(x, -1))
    assert_close(reference.entmax(x, 1.0001), torch.softmax(x, -1), scale=1e6)
    order = x.sort(-1, descending=True).values
    sizes = torch.arange(1, 10)
    support = (1 + sizes * order > order.cumsum(-1)).sum(-1, keepdim=True)
    tau = (order.cumsum(-1).gather(-1, support - 1) - 1) / support
    assert_close(reference.entmax(x, 2.0), (x - tau).clamp(min=0))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8])
def test_gradients_by_differences(alpha):
    a = torch.full((6, 1), alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.entmax, (x.clone().requires_grad_(), a))


def test_alpha_gradient_at_softmax_is_the_one_sided_derivative():
    a = torch.ones(6, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (exact,) = torch.autograd.grad((reference.entmax(x, a) * weight).sum(), a)
    f = [(reference.entmax(x, 1 + t * 1e-3) * weight).sum(-1) for t in range(3)]
    assert_close(exact[:, 0], (-3 * f[0] + 4 * f[1] - f[2]) / 2e-3, "gradient", scale=1e3)


@parametrize(ATTENTION)
def test_weights_of_visible_keys_sum_to_one(case):
    tensors, options = inputs(case)
    ones = torch.ones_like(tensors["v"])
    out = adasplash(**{**tensors, "v": ones}, **options, backend="reference")
    if "s_aux" in tensors:  # the sink has the rest
        assert bool(((out >= 0) & (out < 1 + FLOAT64)).all()) and float(out.min()) < 0.99
    else:
        assert bool(((out - 1).abs() < FLOAT64).logical_or(out == 0).all())


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_a_sink_is_a_key_with_its_score_and_no_value(alpha):
    """Built of the other arguments: one more key that is 0, and a bias."""
    tensors, _ = inputs(BY_NAME["sink"])
    q, k, v, s_aux = (tensors[x] for x in ("q", "k", "v", "s_aux"))
    more = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v)]
    bias = torch.zeros(1, 4, 1, k.shape[2] + 1, dtype=torch.float64)
    bias[0, :, 0, -1] = s_aux
    exact = adasplash(q, *more, alpha, bias=bias, backend="reference")
    for backend in ("reference", "torch"):
        assert_close(adasplash(q, k, v, alpha, s_aux=s_aux, backend=backend), exact)
    none = torch.full_like(s_aux, -torch.inf)
    assert_close(adasplash(q, k, v, alpha, s_aux=none), adasplash(q, k, v, alpha))
    all_of_it = adasplash(q, k, v, alpha, s_aux=torch.full_like(s_aux, 1e4))
    assert bool((all_of_it.abs() < FLOAT64).all())


def test_a_soft_cap_bounds_the_products_and_not_the_bias():
    tensors, _ = inputs(BY_NAME["plain"])
    q, k = tensors["q"], tensors["k"]

    def scores(q, **options):
        return reference.attention_scores(attention_call(q, k, k, **options))

    capped = scores(20 * q, softcap=3.0)
    assert float(capped.abs().max()) <= 3.0
    plain = scores(q)
    assert_close(scores(q, softcap=3.0), 3 * torch.tanh(plain / 3))
    above = scores(q, softcap=3.0, bias=torch.full((1,), 5.0))
    assert_close(above, 3 * torch.tanh(plain / 3) + 5)
    assert_close(scores(q, softcap=1e6), plain)


def test_lazy_attention_by_hand():
    """Two tokens, zero scores: p = (1), (1/2, 1/2)."""
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    v = torch.tensor([[[[1.0], [10.0]]]], dtype=torch.float64)
    bias = torch.zeros(1, 3, dtype=torch.float64)

    def out(tau):
        tau = torch.tensor([tau], dtype=torch.float64)
        return lazy_attention_triton(q, q, v, bias, tau, 2, backend="reference").flatten()

    assert_close(out(-1.0), torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert_close(out(-0.5), torch.tensor([0.5, 0.25 * 11], dtype=torch.float64))
    # Above zero every visible key gains tau / i, and the hidden one stays at 0.
    assert_close(out(0.5), torch.tensor([1.5, 0.75 * 11], dtype=torch.float64))


def test_lazy_bias_is_zero_beyond_the_window():
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 1, 12, 4, dtype=torch.float64, generator=generator)
    bias = torch.randn(1, 4, dtype=torch.float64, generator=generator)
    wide = torch.cat([bias, torch.zeros(1, 8, dtype=torch.float64)], -1)
    tau = torch.zeros(1, dtype=torch.float64)

    def weights(bias, window_size):
        return reference.lazy_weights(Lazy(q, k, k, bias, tau, window_size))

    narrow = weights(bias, 3)
    assert_close(narrow, weights(wide, 11))
    clamped = torch.cat([bias, bias[:, -1:].expand(1, 8)], -1)
    assert (narrow - weights(clamped, 11)).abs().max() > 1e-2


def test_causal_ends_together():
    k = torch.randn(1, 1, 5, 4)
    call = attention_call(k[:, :, :2], k, k, is_causal=True)
    seen = reference.attention_scores(call)[0, 0].isfinite()
    assert seen.tolist() == [[True, True, True, True, False], [True] * 5]
    assert BY_NAME["cross-more-queries"].N_q > BY_NAME["cross-more-queries"].N_k
