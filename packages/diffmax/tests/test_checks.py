"""Bad input: one clear error before any work."""

import math

import pytest
import torch

from diffmax import diffmax_bisect, diffmax_loss, explain

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, 1.3, math.nan, math.inf, 2])
@pytest.mark.parametrize("form", [lambda a: a, torch.tensor, lambda a: lambda: a])
def test_alpha_outside(alpha, form):
    alpha = form(float(alpha))
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, 1\), got .*softmax"):
        diffmax_bisect(X, alpha)


def test_one_bad_alpha_among_good_ones():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        diffmax_bisect(X, torch.tensor([[0.5], [0.2], [1.5]]))


@pytest.mark.parametrize("alpha", ["0.5", None, True, [0.5], lambda: "0.5"])
def test_alpha_of_a_wrong_type(alpha):
    with pytest.raises(TypeError, match="alpha"):
        diffmax_bisect(X, alpha)


def test_alpha_of_integers():
    with pytest.raises(TypeError, match="floating"):
        diffmax_bisect(X, torch.tensor(1))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (5, 1), (1, 2, 3, 1)])
def test_alpha_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"`alpha` must broadcast to \(2, 3, 1\)"):
        diffmax_bisect(X, torch.full(shape, 0.5))


@pytest.mark.parametrize("dim", [3, -4])
def test_dim_out_of_range(dim):
    with pytest.raises(IndexError, match="`dim`"):
        diffmax_bisect(X, dim=dim)


def test_wrong_types():
    with pytest.raises(TypeError, match="floating"):
        diffmax_bisect(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="X"):
        diffmax_bisect([1.0, 2.0])
    with pytest.raises(TypeError, match="dim"):
        diffmax_bisect(X, dim=1.0)
    with pytest.raises(TypeError, match="n_iter"):
        diffmax_bisect(X, n_iter=5.0)


@pytest.mark.parametrize("n_iter", [0, -3])
def test_too_few_steps(n_iter):
    with pytest.raises(ValueError, match="`n_iter` must be at least 1"):
        diffmax_bisect(X, n_iter=n_iter)


def test_backends():
    with pytest.raises(ValueError, match="backend"):
        diffmax_bisect(X, backend="fast")
    with pytest.raises(ValueError, match="reduction"):
        diffmax_loss(X[0], torch.tensor([1, 2, 3]), reduction="max")
    assert "chosen" in explain(X) and "triton" in explain(X, torch.tensor(0.5), 0)
