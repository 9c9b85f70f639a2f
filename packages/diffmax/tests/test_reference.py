"""The specification itself: against arbitrary precision, known answers and the limits of alpha."""

import mpmath
import pytest
import torch

from diffmax import diffmax_bisect
from shared_kernels.testing import assert_close, pairwise
from shared_kernels.testing.tolerances import tolerance

from .cases import gradients, reference

ROUNDING64 = tolerance(torch.float64, "rounding")
ROUNDING32 = tolerance(torch.float32, "rounding")
FLOAT64 = tolerance(torch.float64)
GRADIENT = tolerance(torch.float64, "gradient")
BISECTION = 1e-3  # the derivative in alpha of the reference, by differences of a bisection
LIMIT = 1e-7  # alpha = 1 - 1e-9 is this near to softmax


def by_mpmath(x, alpha):
    """Weights and their derivatives in alpha to 40 digits."""
    with mpmath.workdps(40):
        x = [mpmath.mpf(float(v)) for v in x]
        top = max(x)

        def weights(alpha):
            a = 1 - alpha
            power = lambda u: max(mpmath.mpf(0), 1 + a * u) ** (1 / a)  # noqa: E731
            low, high = top, top + mpmath.log(len(x)) + 1
            if a * (high - top) > 1:
                high = top + 1 / a
            for _ in range(160):
                middle = (low + high) / 2
                if sum(power(v - middle) for v in x) >= 1:
                    low = middle
                else:
                    high = middle
            return [power(v - low) for v in x]

        step = mpmath.mpf(10) ** -15
        alpha = mpmath.mpf(alpha)
        up, down = weights(alpha + step), weights(alpha - step)
        slope = [float((u - d) / (2 * step)) for u, d in zip(up, down, strict=True)]
        return torch.tensor([float(p) for p in weights(alpha)], dtype=torch.float64), slope


@pairwise(
    backend=["reference", "torch"],
    scale=[0.1, 1.0, 10.0],
    alpha=[0.05, 0.3, 0.5, 0.75, 0.85, 0.999, 1 - 1e-6],
)
def test_agrees_with_arbitrary_precision(alpha, scale, backend):
    x = torch.randn(12, dtype=torch.float64) * scale
    exact, slope = by_mpmath(x, alpha)
    p = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    y = diffmax_bisect(x, p, backend=backend)
    assert (y - exact).abs().max() < 10 * ROUNDING64
    for i in (int(x.argmax()), int(y.argmin())):
        (grad,) = torch.autograd.grad(y[i], p, retain_graph=True)
        assert abs(grad.item() - slope[i]) < (
            BISECTION if backend == "reference" else GRADIENT / 10
        )


@pytest.mark.parametrize("alpha", [1 - 1e-3, 1 - 1e-5, 1 - 1e-6])
def test_alpha_gradient_is_stable_in_single_precision(alpha):
    x = torch.randn(12)
    _, slope = by_mpmath(x, float(torch.tensor(alpha)))
    p = torch.tensor(alpha, requires_grad=True)
    y = diffmax_bisect(x, p)
    for i in range(12):
        (grad,) = torch.autograd.grad(y[i], p, retain_graph=True)
        assert abs(grad.item() - slope[i]) < 2 * ROUNDING32


def test_known_answers():
    # alpha = 1/2: Y = [1 + (x - tau)/2]_+^2; for x = (0, 0): Y = 1/2 each
    assert_close(diffmax_bisect(torch.zeros(2), 0.5), torch.full((2,), 0.5))
    # x = (c, 0): with t = 1 + (0 - tau)/2, (t + c/2)^2 + t^2 = 1
    c = 0.6
    t = (-c / 2 + (2 - c * c / 4) ** 0.5) / 2
    assert_close(
        diffmax_bisect(torch.tensor([c, 0.0]), 0.5), torch.tensor([(t + c / 2) ** 2, t * t])
    )
    assert torch.equal(diffmax_bisect(torch.tensor([2.1, 0.0]), 0.5), torch.tensor([1.0, 0.0]))


def test_limits():
    x = torch.randn(5, 30, dtype=torch.float64)
    assert (diffmax_bisect(x, 1 - 1e-9) - x.softmax(-1)).abs().max() < LIMIT
    ordered = x.sort(descending=True).values
    k = torch.arange(1, 31)
    taus = (ordered.cumsum(-1) - 1) / k
    tau = taus.gather(-1, ((ordered > taus).sum(-1, keepdim=True)) - 1)
    assert (diffmax_bisect(x, 1e-12) - (x - tau).clamp(min=0)).abs().max() < FLOAT64


def test_lower_alpha_is_sparser():
    x = torch.randn(64, 64)
    support = [(diffmax_bisect(x, a) > 0).sum().item() for a in (0.1, 0.3, 0.5, 0.7, 0.85, 0.99)]
    assert support == sorted(support) and len(set(support)) == len(support)


def test_the_formulas_of_the_gradients_match_autograd():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[0.2], [0.5], [0.8], [0.95]], dtype=torch.float64, requires_grad=True)
    y = reference(x, alpha)
    g = torch.randn_like(y)
    by_autograd = torch.autograd.grad((y * g).sum(), (x, alpha))
    for ours, theirs in zip(gradients(g, y, alpha), by_autograd, strict=True):
        assert_close(ours, theirs, "gradient")
