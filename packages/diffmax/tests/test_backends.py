"""The backends of CPU tensors: cases in every dtype, accuracy over a grid, edges, memory, laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmax import diffmax_bisect
from shared_kernels import dispatch, qexp
from shared_kernels.testing import (
    assert_close,
    compare,
    contracts,
    cpu_backends,
    measure_memory,
    pairwise,
    parametrize,
)
from shared_kernels.testing.tolerances import tolerance

from .cases import CASES, backward, bound, gradients, inputs, on_each_backend, reference

ROUNDING32 = tolerance(torch.float32, "rounding")
FLOAT32 = tolerance(torch.float32)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@parametrize(CASES)
def test_cases(case, dtype, backend):
    given_inputs = inputs(case, dtype)
    compare(
        bound(diffmax_bisect, case, backend=backend),
        bound(diffmax_bisect, case, backend="reference"),
        given_inputs,
        differentiable=tuple(given_inputs),
        dtype=dtype,
    )
    assert dispatch.last("diffmax::bisect_backward") == backend


class OnEachBackend(contracts.NormalizerContract):
    alpha = 0.0

    @pytest.fixture(autouse=True, params=cpu_backends())
    def _backend(self, request):
        self.normalize = lambda x, dim: diffmax_bisect(x, self.alpha, dim, backend=request.param)


class TestSparseContract(OnEachBackend):
    alpha = 0.3


class TestGeneralContract(OnEachBackend):
    alpha = 0.85


@pairwise(
    alpha=[0.05, 0.1, 0.3, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1 - 1e-6],
    scale=[0.1, 1.0, 10.0],
    N=[1, 7, 64, 777, 5000, 65536],
    backend=cpu_backends(),
)
def test_single_precision_error(alpha, scale, N, backend):
    X = torch.randn(4 if N < 10_000 else 1, N) * scale
    exact = reference(X.double(), alpha)
    assert (diffmax_bisect(X, alpha, backend=backend) - exact).abs().max() <= 3 * ROUNDING32


@on_each_backend
@pytest.mark.parametrize("n_iter", [1, 9, 17])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.85, 0.98])
def test_sums(alpha, n_iter, backend):
    X = torch.randn(8, 600)
    Y = diffmax_bisect(X, alpha, n_iter=n_iter, backend=backend)
    assert (Y.sum(-1) - 1).abs().max() < ROUNDING32
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        raw = diffmax_bisect(X.to(dtype), alpha, ensure_sum_one=False, backend=backend)
        assert (raw.double().sum(-1) - 1).abs().max() < limit


@on_each_backend
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.85, 0.999])
def test_edges(alpha, backend):
    X = torch.randn(7, 600)
    X[0], X[1, 4], X[2, 4] = -torch.inf, torch.nan, torch.inf
    X[3, 9:] = -torch.inf
    X[4, 0], X[4, 1] = 3e38, -3e38
    X[5] = torch.finfo(torch.float32).min
    X[6, 0] = torch.finfo(torch.float32).min
    X.requires_grad_()
    Y = diffmax_bisect(X, alpha, backend=backend)
    (dX,) = torch.autograd.grad((Y * torch.randn(7, 600)).sum(), X)
    assert (Y[0] == 0).all() and (dX[0] == 0).all()
    assert Y[1].isnan().all() and Y[2].isnan().all()
    assert (Y[3, 9:] == 0).all() and (dX[3, 9:] == 0).all()
    assert Y[4, 0] == 1 and (Y[4, 1:] == 0).all()
    assert torch.allclose(Y[5], torch.tensor(1 / 600))
    assert Y[6, 0] == 0 and dX[6, 0] == 0
    assert Y[3:].isfinite().all() and dX[3:].isfinite().all()


@pytest.mark.system
@on_each_backend
@pytest.mark.parametrize("shape", [(8192, 64), (1024, 512), (128, 4096), (8, 65536)])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.85])
def test_memory_is_at_most_two_inputs(alpha, shape, backend):
    """The result among them, forward and backward, with room for nothing else of that size."""
    X = torch.randn(shape)
    for scale in (0.01, 1.0):
        Z = X * scale
        used = measure_memory(lambda: diffmax_bisect(Z, alpha, backend=backend))  # noqa: B023
        assert used.peak <= 2 * X.nbytes
    Y = diffmax_bisect(X, alpha, backend=backend)
    for needs in ("X", "X,alpha"):
        used = measure_memory(lambda: backward(X, Y, alpha, needs, backend=backend))  # noqa: B023
        assert used.peak <= 2 * X.nbytes
    x = X.clone().requires_grad_()
    kept = measure_memory(lambda: diffmax_bisect(x, alpha, backend=backend))
    assert kept.peak <= (2 if backend == "torch" else 1.1) * X.nbytes
    Y = diffmax_bisect(x, alpha, backend=backend)
    gone_back = measure_memory(lambda: torch.autograd.grad(Y, x, X))
    # PyTorch's path keeps no third array for this pass, and works on a few rows at a time instead
    assert gone_back.peak <= (1.4 if backend == "torch" else 1.1) * X.nbytes


@on_each_backend
@pytest.mark.parametrize("N", [1, 2, 100_003, 1_000_000])
def test_every_length(N, backend):
    for alpha in (0.2, 0.85):
        Y = diffmax_bisect(torch.randn(1, N), alpha, backend=backend)
        assert abs(Y.double().sum().item() - 1) < FLOAT32 / 2 and bool((Y >= 0).all())


ROWS = torch.tensor([[0.2], [0.97], [0.5], [0.9]]).repeat(10, 1)


@pairwise(
    alpha=[0.05, 0.3, 0.5, 0.6, 0.75, 0.85, 0.98, pytest.param(ROWS, id="rows")],
    N=[1, 64, 700, 4096],
    dtype=[torch.float64, torch.float32],
    backend=cpu_backends(),
)
def test_a_gradient_in_the_scores_alone(alpha, N, dtype, backend):
    """Against the formula on the same weights."""
    X, G = torch.randn(2, 40, N, dtype=torch.float64).to(dtype)
    X[1], X[2, N // 2] = -torch.inf, torch.nan
    X.requires_grad_()
    Y = diffmax_bisect(X, alpha, backend=backend)
    (dX,) = torch.autograd.grad(Y, X, G)
    with torch.no_grad():
        assert torch.equal(Y.nan_to_num(), diffmax_bisect(X, alpha, backend=backend).nan_to_num())
    exact = gradients(G.double(), Y.detach().double(), alpha)[0]
    assert bool((dX[1] == 0).all()) and bool(dX[2].isnan().all())
    assert bool(((dX == 0) | (Y != 0))[3:].all())
    assert_close(dX, exact.to(dtype), "gradient")


@on_each_backend
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.85])
@pytest.mark.parametrize("options", [{"n_iter": 1}, {"dim": 0}, {"ensure_sum_one": False}], ids=str)
def test_gradients_under_every_option(alpha, options, backend):
    X, G = torch.randn(2, 90, 80)
    X.requires_grad_()
    Y = diffmax_bisect(X, alpha, backend=backend, **options)
    (dX,) = torch.autograd.grad(Y, X, G)
    exact = gradients(G.double(), Y.detach().double(), alpha, options.get("dim", -1))[0]
    assert_close(dX, exact.float(), "gradient")


def _backwards(Y, G, alpha, backend="torch"):
    """dX of the op, and of the formula in fp64 on the same weights."""
    return backward(G, Y, alpha, "X", backend=backend)[0], gradients(G.double(), Y.double(), alpha)[
        0
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_long_sparse_rows_go_back_through_their_support_alone(alpha, dtype, monkeypatch):
    X, G = torch.randn(2, 40, 4096, dtype=torch.float64).to(dtype)
    X[1], X[2, 4] = -torch.inf, torch.nan
    Y = diffmax_bisect(X, alpha)
    whole, of_rows = [], qexp.backward
    with monkeypatch.context() as patch:
        patch.setattr(
            "shared_kernels.qexp.backward",
            lambda dy, p, s: whole.append(p) or of_rows(dy, p, s),
        )
        dX, exact = _backwards(Y, G, alpha)
    # the row of NaN has no zeros to leave out; each row decides for itself
    assert [len(rows) for rows in whole] == [1] and bool(whole[0].isnan().all())
    assert dX.dtype == dtype and bool((dX[1] == 0).all()) and bool(dX[2].isnan().all())
    assert bool(((dX == 0) | (Y != 0))[3:].all())
    assert_close(dX, exact, "gradient")
    strided, _ = _backwards(Y.T.contiguous().T, G.T.contiguous().T, alpha)
    assert torch.equal(strided[3:], dX[3:])


@on_each_backend
@pytest.mark.parametrize("N, scale", [(4096 + 1, 1.0), (4096, 0.1), (500, 1.0)])
def test_other_rows_go_back_whole(N, scale, backend):
    X, G = torch.randn(2, 3, N)
    assert_close(*_backwards(diffmax_bisect(scale * X, 0.3), G, 0.3, backend), "gradient")


@on_each_backend
@settings(max_examples=60)
@given(
    alpha=st.floats(1e-4, 1 - 1e-6),
    N=st.integers(1, 80),
    scale=st.floats(1e-3, 1e2),
    seed=st.integers(0, 10**6),
)
def test_laws(alpha, N, scale, seed, backend):
    X = torch.randn(2, N, generator=torch.Generator().manual_seed(seed)) * scale
    Y = diffmax_bisect(X, alpha, backend=backend)
    exact = reference(X.double(), alpha)
    assert (Y - exact).abs().max() < 5 * ROUNDING32
    assert (Y.sum(-1) - 1).abs().max() < 2 * ROUNDING32
