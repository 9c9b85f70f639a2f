"""Draws from the support, truncated decoding, calibration, and the router."""

import pytest
import torch
from torch import nn

from diffmax import (
    DiffmaxRouter,
    HillMap,
    diffmax_bisect,
    diffmax_calibrate,
    diffmax_loss,
    diffmax_sample,
    support_topk,
)
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

ROUNDING32 = tolerance(torch.float32, "rounding")
# A share of a few hundred rows: a row at the edge of the support moves it by less than this.
SHARE = 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_draws_follow_the_weights_and_stay_in_the_support(alpha):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(2)) * 2
    p = diffmax_bisect(logits, alpha)
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    index, log_prob = diffmax_sample(logits.expand(n, 6), alpha, generator=generator)
    assert bool((p[index] > 0).all())
    assert_close(log_prob.exp(), p[index])
    share = torch.bincount(index, minlength=6) / n
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + ROUNDING32).all())
    again, _ = diffmax_sample(
        logits.expand(n, 6), alpha, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(index, again)


def test_the_log_probability_has_its_gradient():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    index, log_prob = diffmax_sample(logits, 0.7)
    (found,) = torch.autograd.grad(log_prob.sum(), logits)
    exact = diffmax_bisect(logits, 0.7).gather(1, index[:, None]).log().sum()
    assert_close(found, torch.autograd.grad(exact, logits)[0], "gradient")
    assert diffmax_sample(torch.randn(2, 3, 7))[0].shape == (2, 3)


def test_rows_that_cannot_be_drawn_from():
    for row in ([-torch.inf, -torch.inf], [0.0, torch.nan]):
        with pytest.raises(ValueError, match=r"`logits` must have a finite entry .* row \(1,\)"):
            diffmax_sample(torch.tensor([[0.0, 0.0], row]))
    with pytest.raises(ValueError, match="`logits` must have at least one class"):
        diffmax_sample(torch.empty(3, 0))
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        support_topk(torch.randn(3), 0)
    masked = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert diffmax_sample(masked)[0].item() == 1


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_largest_of_the_support(k):
    logits = torch.randn(4, 9) * 2
    p = diffmax_bisect(logits, 0.4)
    weights, index = support_topk(logits, k, 0.4)
    assert weights.shape == index.shape == (4, min(k, 9))
    exact = p.sort(-1, descending=True).values[:, :k]
    assert torch.equal(weights, exact) and torch.equal(index == -1, exact == 0)
    inside = index >= 0
    assert torch.equal(p.gather(1, index.clamp(min=0))[inside], weights[inside])


# --- calibration --------------------------------------------------------------------------------


def held_out(sharpness, n=400):
    """Logits that are `sharpness` times those of the distribution the targets come from."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 8, generator=generator) * 1.5
    target = diffmax_sample(logits, 0.5, generator=generator)[0]
    return logits * sharpness, target


def test_the_temperature_is_found_and_is_a_minimum():
    for sharpness in (0.3, 1.0, 4.0):
        logits, target = held_out(sharpness)
        found = diffmax_calibrate(logits, target, 0.5)
        assert 0.85 < found.temperature / sharpness < 1.15
        assert found.loss_after <= found.loss_before
        assert found.loss_before == pytest.approx(diffmax_loss(logits, target, 0.5).item())
        for other in (0.98, 1.02):
            near = diffmax_loss(logits.double() / (found.temperature * other), target, 0.5)
            assert near >= found.loss_after
        p = diffmax_bisect(logits / found.temperature, 0.5)
        inside = (p.gather(1, target[:, None]) > 0).float().mean()
        assert found.coverage == pytest.approx(inside.item(), abs=SHARE)


def test_alpha_is_the_lowest_that_covers():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 8, generator=generator)
    target = torch.distributions.Categorical(logits=logits).sample()
    loose, tight = (diffmax_calibrate(logits, target, coverage=c) for c in (0.97, 0.99))
    assert loose.coverage >= 0.97 and tight.coverage >= 0.99
    assert loose.alpha < tight.alpha and loose.size < tight.size
    less = diffmax_calibrate(logits, target, tight.alpha - 0.01)
    assert less.coverage < 0.99
    with pytest.raises(ValueError, match=r"`coverage` must be in \(0, 1\), got 1.5"):
        diffmax_calibrate(logits, target, coverage=1.5)
    with pytest.raises(ValueError, match="`logits` must be finite"):
        diffmax_calibrate(logits[:0], target[:0])


# --- the router ---------------------------------------------------------------------------------


def experts_of(dim, number):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(dim, dim) for _ in range(number))


def test_the_mixture_is_the_dense_one():
    experts, x = experts_of(6, 5), torch.randn(3, 7, 6, requires_grad=True)
    router = DiffmaxRouter(6, 5, alpha=0.3, alpha_map=HillMap())
    y, routing = router.mixture(x, experts)
    assert (routing.weights == 0).any() and routing.dropped == 0
    dense = diffmax_bisect(router.gate(x), router.normalizer.alpha)
    exact = sum(dense[..., e, None] * expert(x) for e, expert in enumerate(experts))
    assert_close(y, exact)
    wanted = [x, *router.parameters(), *experts.parameters()]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(exact.square().sum(), wanted),
        strict=True,
    ):
        assert_close(a, b, "gradient")


def test_an_expert_without_tokens_is_not_called():
    router = DiffmaxRouter(2, 2, alpha=0.1)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[5.0, 0.0], [-5.0, 0.0]]))

    def never(x):
        raise RuntimeError("no token chose this expert")

    x = torch.ones(3, 2)
    y, _ = router.mixture(x, [lambda x: 2 * x, never])
    assert torch.equal(y, 2 * x)
    with pytest.raises(ValueError, match="`experts` must be num_experts=2"):
        router.mixture(x, [never])


def test_capacity_keeps_the_largest_weights():
    x = torch.randn(40, 6)
    free, limited = DiffmaxRouter(6, 4, 0.5), DiffmaxRouter(6, 4, 0.5, capacity_factor=0.5)
    limited.load_state_dict(free.state_dict())
    all_, kept = free(x).weights, limited(x)
    assert int((kept.weights > 0).sum(0).max()) <= 5 and kept.dropped > 0
    for e in range(4):
        taken = kept.weights[:, e] > 0
        assert all_[taken, e].min() >= all_[~taken, e].max()
    assert_close(kept.dropped, 1 - kept.weights.detach().sum() / all_.detach().sum())


def test_the_balance_is_1_where_the_load_is_even_and_training_evens_it():
    torch.manual_seed(0)
    router, x = DiffmaxRouter(4, 4, 0.3), torch.randn(200, 4)
    with torch.no_grad():
        router.gate.weight.copy_(5 * torch.eye(4))
    even = router(torch.eye(4)).balance
    assert_close(even, torch.tensor(1.0))
    with torch.no_grad():
        router.gate.weight.copy_(torch.randn(4, 4) + torch.tensor([[3.0], [0], [0], [0]]))
    x = x + 1.0
    before = router(x).balance.item()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        router(x).balance.backward()
        optimizer.step()
    assert before > 1.5 > 1.2 > router(x).balance.item()
