"""The names of the published 0.1.2 give what they gave there, wherever that was right."""

import numpy as np
import pytest
import torch

from flashdiffusion import DiffusionMap, FlashDiffusion, eigensolver, utils
from flashdiffusion.kernel import prepass_rowsum

from .cases import CANCELLED, FLOAT32, ROUNDING, TOL

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(shape) for shape in ((30, 3), (50, 3), (50, 4)))
LEFT, RIGHT, H = RNG.random(30) + 0.5, RNG.random(50) + 0.5, RNG.random(50) + 0.5
SQ = ((Q[:, None] - K[None]) ** 2).sum(2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("weights", [None, RIGHT])
def test_prepass_rowsum(dtype, kind, weights):
    w = np.ones(50) if weights is None else weights
    given = None if weights is None else kind(weights.astype(dtype))
    sums = prepass_rowsum(kind(Q.astype(dtype)), kind(K.astype(dtype)), 0.7, given, tile=16)
    assert type(sums) is type(kind(Q)) and len(sums) == 30
    atol = CANCELLED if dtype == np.float64 else FLOAT32 * 50
    np.testing.assert_allclose(np.asarray(sums), np.exp(-0.7 * SQ) @ w, atol=atol)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("columns", [V, V[:, 0]], ids=["matrix", "vector"])
@pytest.mark.parametrize(
    "scales",
    [
        {"rscale_q": LEFT},
        {"rscale_k": RIGHT},
        {"rscale_q": LEFT, "rscale_k": RIGHT, "h": H},
    ],
    ids=list,
)
def test_scales_of_your_own(scales, columns, backend):
    left, right, h = (scales.get(name, 1.0) for name in ("rscale_q", "rscale_k", "h"))
    wanted = (left * ((right * h * columns.T) @ np.exp(-0.7 * SQ).T)).T
    given = columns.copy()
    found = FlashDiffusion(Q, K, given, 0.7, **scales, backend=backend)
    np.testing.assert_allclose(found, wanted, atol=CANCELLED)
    np.testing.assert_array_equal(given, columns)


def test_scales_that_normalise_give_the_symmetric_operator():
    dm = DiffusionMap(beta=0.7, n_components=3).fit(K)
    rscale = dm.operator().rscale.numpy()
    found = FlashDiffusion(K, K, V, 0.7, rscale_q=rscale, rscale_k=rscale)
    np.testing.assert_allclose(found, FlashDiffusion(K, K, V, 0.7), atol=CANCELLED)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"rscale_q": RIGHT}, "`rscale_q` must have shape"),
        ({"rscale_k": np.full(50, np.nan)}, "`rscale_k` must be finite"),
        ({"rscale_k": RIGHT, "normalize": "row"}, "`normalize` must be"),
    ],
)
def test_scales_that_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        FlashDiffusion(Q, K, V, 0.7, **scales)


@pytest.mark.parametrize("solver", [eigensolver.lanczos_eigsh, eigensolver.lobpcg_eigsh])
def test_solvers_of_a_function(solver):
    M = np.exp(-((K[:, None] - K[None]) ** 2).sum(2))
    values, vectors = solver(lambda v: M @ v, len(M), k=4)
    exact = np.linalg.eigvalsh(M)[::-1][:4]
    np.testing.assert_allclose(values, exact, atol=CANCELLED)
    np.testing.assert_allclose(M @ vectors, vectors * values, atol=TOL)
    assert vectors.shape == (50, 4)


def test_nystrom_extend():
    dm = DiffusionMap(beta=0.7, n_components=3).fit(K)
    np.testing.assert_allclose(
        utils.nystrom_extend(dm, Q, t=2), dm.transform(Q, t=2), atol=ROUNDING
    )
