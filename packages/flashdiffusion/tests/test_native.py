"""The CPU leg's cases on the native backend, and the maps that it fits."""

import numpy as np
import pytest
import torch

from flashdiffusion import DiffusionMap, FlashDiffusion, _reference, explain
from flashdiffusion._operator import Kernel, Reversible
from flashdiffusion._problem import Problem
from flashdiffusion._tiles import spatial_order
from shared_kernels import dispatch, native
from shared_kernels.testing import assert_close, measure_memory, parametrize, poisoned_empty
from shared_kernels.testing.instructions import each_instruction_set, needs_library

from .cases import CASES, SOLVED, inputs, power_score, swiss_roll

pytestmark = needs_library()
instructions = each_instruction_set()


def runs(case):
    """Where FlashDiffusion is made of products with entries as they are, of a score with a name."""
    if callable(case.get("score")):
        return False
    two_sets = "M" in case.values
    return case.get("normalize") == "none" or (case.get("score") is None and not two_sets)


@parametrize([c for c in CASES if runs(c)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("instructions")
def test_equals_the_dense_operator(case, dtype):
    Q, K, V, kwargs = inputs(case, dtype)
    exact = _reference.flash_diffusion(Q.double(), K.double(), V.double(), **kwargs)
    with poisoned_empty():
        out = FlashDiffusion(Q, K, V, **kwargs, backend="native")
    assert dispatch.last("flashdiffusion::matvec") == "native"
    assert out.dtype == dtype and out.shape == exact.shape
    assert_close(out, exact)


@pytest.mark.parametrize("score", ["sqeuclidean", "dot", "cosine", "l1"])
@pytest.mark.parametrize("precision", ["float32", "mixed", "float64"])
@pytest.mark.parametrize("two_sets", [False, True])
def test_every_score_and_precision(score, precision, two_sets):
    x, y = torch.randn(150, 4), torch.randn(70, 4)
    V = torch.randn(70 if two_sets else 150, 3)
    problem = Problem(x, y if two_sets else None, 0.7, score, precision=precision)
    out = Kernel(problem, backend="native").matvec(V)
    wide = x.double(), (y if two_sets else x).double()
    exact = (-0.7 * _reference.scores(*wide, score)).exp() @ V.double()
    assert out.dtype == problem.dtype
    assert_close(out.float(), exact)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [40, 900])
def test_tiles_that_are_skipped_change_nothing(scaled, dtype, N):
    x = torch.from_numpy(swiss_roll(N)[0]).to(dtype)
    sigma = (torch.rand(N, dtype=torch.float64) + 0.5,) * 2 if scaled else None
    problem = Problem(x, None, 2.0, sigma=sigma)
    V = torch.randn(N, 2, dtype=dtype)
    skipping = Kernel(problem, skip_below=problem.negligible, backend="native")
    exponent = -2.0 * torch.cdist(x.double(), x.double()).square()
    exact = (exponent / (sigma[0][:, None] * sigma[0]) if sigma else exponent).exp() @ V.double()
    assert_close(skipping.matvec(V), exact)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: FlashDiffusion(
                x, x, x, score_mod=power_score, normalize="none", backend="native"
            ),
            "score of the caller's own",
        ),
        (lambda x: FlashDiffusion(x, x[:5], x[:5], backend="native"), "unshifted"),
        (
            lambda x: FlashDiffusion(
                0 * x, x, x, score_mod="cosine", normalize="none", backend="native"
            ),
            "a vector is zero",
        ),
    ],
)
def test_what_it_cannot_run_is_refused(call, words):
    with pytest.raises(NotImplementedError, match=words):
        call(torch.randn(9, 3))


def test_it_is_chosen_on_a_cpu_and_explained(monkeypatch):
    x = torch.randn(20, 3)
    assert "native: chosen" in explain(FlashDiffusion, x, x, x)
    monkeypatch.setattr(native, "why_not", lambda: "it is switched off")
    output = explain(FlashDiffusion, x, x, x)
    assert "torch: chosen" in output and "it is switched off" in output


@pytest.mark.parametrize("parameters", [{"beta": 8.0}, {"beta": "self-tuning"}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_map_is_that_of_the_torch_backend(parameters, dtype, monkeypatch):
    X = (swiss_roll(900)[0] / 10.0).astype(dtype)
    found = DiffusionMap(n_components=4, **parameters).fit(X)
    assert dispatch.last("flashdiffusion::matvec") == "native"
    monkeypatch.setattr(native, "why_not", lambda *_: "it is switched off")
    exact = DiffusionMap(n_components=4, precision="float64", **parameters).fit(X)
    assert dispatch.last("flashdiffusion::matvec") == "torch"
    assert found.converged_
    np.testing.assert_allclose(found.eigenvalues_, exact.eigenvalues_, atol=4 * found.tol)
    if dtype == np.float64:
        np.testing.assert_allclose(found.density_, exact.density_, rtol=SOLVED)


def test_points_beyond_the_range_are_refused():
    x = torch.tensor([[0.0], [1e30]])
    with pytest.raises(FloatingPointError, match="take another unit"):
        FlashDiffusion(x, x, x, 1e30, normalize="none", precision="float32", backend="native")


def test_nothing_of_size_n_squared():
    N = 16384
    x, V = torch.randn(N, 3), torch.ones(N, 2)
    memory = measure_memory(lambda: FlashDiffusion(x, x, V, normalize="none", backend="native"))
    assert memory.peak < N * N * 4 / 8


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_a_solve_leaves_out_is_below_rounding(alpha):
    """The row sums allow more than could be left out without them; M changes by less than 2^-26."""
    x = torch.rand(1500, 3, generator=torch.Generator().manual_seed(0))
    problem = Problem(x, None, 30.0)
    kernel = Kernel(problem, None, problem.negligible)
    operator = Reversible.normalised(kernel, alpha)
    thin = operator.without_negligible(kernel)
    assert thin.skip_below > 2.0 * kernel.skip_below
    K = torch.exp(-30.0 * torch.cdist(x.double(), x.double()).square())
    lost = K.where(thin.skip_below > K, 0.0) * operator.rscale[:, None] * operator.rscale
    assert float(torch.linalg.matrix_norm(lost, 2)) <= 2.0**-26
    # a threshold that is not above the kernel's own changes nothing
    assert kernel.leaving_out(kernel.skip_below) is kernel
    whole = Kernel(problem)
    assert operator.without_negligible(whole) is whole


@pytest.mark.parametrize(
    ("n", "leaf"), [(1, 16), (15, 16), (128, 16), (130, 16), (1000, 16), (700, 8)]
)
def test_runs_of_points_are_boxes(n, leaf):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 2, generator=generator)
    order = spatial_order(x, leaf)
    assert torch.equal(order.sort().values, torch.arange(n))
    areas = [(t.amax(0) - t.amin(0)).prod() for t in x[order].split(leaf)]
    # boxes that do not overlap: what they cover is at most the square that all lie in
    assert sum(areas) <= 1.0


def test_columns_stay_side_by_side_in_memory():
    x = torch.from_numpy(swiss_roll(700)[0]).float()
    kernel = Kernel(Problem(x, None, 5.0), skip_below=1e-9, backend="native")
    V = torch.randn(5, 700).T
    beside, apart = kernel.matvec(V), kernel.matvec(V.contiguous())
    assert torch.equal(beside, apart)
    assert beside.T.is_contiguous() and apart.is_contiguous()
