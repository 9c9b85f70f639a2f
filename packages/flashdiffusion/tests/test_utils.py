import numpy as np
import pytest
import torch
from scipy.special import ive

from flashdiffusion import bgh_bandwidth, knn_bandwidth, median_bandwidth

from .cases import ROUNDING, circle, sphere

SLOPE = 1e-4  # a slope of log S by differences
GRID = 2e-2  # the bandwidth stands on a grid
DIMENSION = 0.25  # of a thousand points
SCALED = 1e-3  # the grid of a scaled cloud
SAMPLE = 0.2  # the median of 100 points


def test_median_by_hand():
    X = np.array([[0.0], [1.0], [3.0]])  # squared distances 1, 4, 9
    assert median_bandwidth(X) == pytest.approx(1 / 8)
    assert median_bandwidth(torch.from_numpy(X) * 10 + 1e5) == pytest.approx(1 / 800)
    assert median_bandwidth(np.array([[0.0]] * 9 + [[2.0]])) == pytest.approx(1 / 8)
    assert median_bandwidth(np.ones((5, 2))) == 1.0


def test_bgh_on_the_circle_is_its_formula():
    # S(beta) = exp(-2 beta) I_0(2 beta): the largest slope is 0.608 at beta = 0.79 and at any
    # length; the curvature of the circle makes it more than 1/2
    betas = np.geomspace(0.1, 10.0, 20_001)
    slopes = 2 * betas * (1 - ive(1, 2 * betas) / ive(0, 2 * betas))
    found = bgh_bandwidth(circle(1500))
    assert found.dimension == pytest.approx(2 * slopes.max(), rel=SLOPE)
    assert found.beta == pytest.approx(betas[slopes.argmax()], rel=GRID)


@pytest.mark.parametrize(("X", "dimension"), [(circle(1500), 1), (sphere(1000), 2)])
def test_bgh_finds_the_dimension(X, dimension):
    found = bgh_bandwidth(X)
    assert found.dimension == pytest.approx(dimension, rel=DIMENSION)
    assert found.betas.shape == found.slopes.shape
    assert found.slopes.max() == pytest.approx(found.dimension / 2)
    # beta scales as 1 / length^2
    assert bgh_bandwidth(10 * X).beta == pytest.approx(found.beta / 100, rel=SCALED)


def test_bgh_slope_is_the_derivative():
    X = np.random.default_rng(0).standard_normal((60, 2))
    sq = ((X[:, None] - X[None]) ** 2).sum(-1)
    found = bgh_bandwidth(X)
    i = len(found.betas) // 2
    e = 1e-4
    log_s = [np.log(np.exp(-found.betas[i] * f * sq).sum()) for f in (np.exp(e), np.exp(-e))]
    assert found.slopes[i] == pytest.approx((log_s[1] - log_s[0]) / (2 * e), rel=SLOPE)


def test_sampling_is_deterministic():
    X = np.random.default_rng(0).standard_normal((500, 2))
    assert median_bandwidth(X, n_sample=100) == median_bandwidth(X, n_sample=100)
    assert median_bandwidth(X, n_sample=100) == pytest.approx(median_bandwidth(X), rel=SAMPLE)


def test_knn_bandwidth():
    X = np.random.default_rng(0).standard_normal((80, 3))
    exact = np.sort(((X[:, None] - X[None]) ** 2).sum(-1) ** 0.5, 1)
    np.testing.assert_allclose(knn_bandwidth(X, 5), exact[:, 5], rtol=ROUNDING)
    # rows among themselves, and a new point
    np.testing.assert_allclose(knn_bandwidth(X, 5, Y=X), exact[:, 5], rtol=ROUNDING)
    new = np.zeros((1, 3))
    far = np.sort(((X - new) ** 2).sum(-1) ** 0.5)
    np.testing.assert_allclose(knn_bandwidth(new, 5, Y=X), far[5], rtol=ROUNDING)
    out = knn_bandwidth(torch.from_numpy(X).float())
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32


def test_knn_bandwidth_of_duplicates_is_positive():
    X = np.concatenate((np.zeros((10, 1)), np.arange(1.0, 10.0)[:, None]))
    assert (knn_bandwidth(X, 3) > 0).all()
    assert knn_bandwidth(np.ones((4, 1))).tolist() == [1.0] * 4
