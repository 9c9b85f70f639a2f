"""The neighbour kernel, interpreted (TRITON_INTERPRET=1) or on a GPU, against a dense search."""

import pytest
import torch

from shared_kernels import device, dispatch, pairwise
from shared_kernels.testing import poisoned_empty

pytest.importorskip("triton")

DEVICE = "cpu" if device.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)

from shared_kernels.triton import knn as kernel  # noqa: E402


def dense(X, k, Y=None, metric="sqeuclidean", exclude_self=False):
    x, y = X.double(), (X if Y is None else Y).double()
    if metric == "cosine":
        x, y = (torch.nn.functional.normalize(a, dim=1) for a in (x, y))
    s = -x @ y.T if metric != "sqeuclidean" else ((x[:, None] - y[None]) ** 2).sum(-1)
    if exclude_self:
        s.fill_diagonal_(float("inf"))
    return s.sort(dim=-1, stable=True).indices[:, :k]


@pytest.mark.parametrize("first", [None, 0, 20])
@pytest.mark.parametrize(
    ("N", "M", "D", "n_keep"), [(40, 70, 3, 12), (65, 100, 20, 33), (3, 9, 1, 9)]
)
def test_candidates_are_the_smallest(N, M, D, n_keep, first):
    keys, y = torch.randn(M, D, device=DEVICE), torch.randn(M, device=DEVICE)
    N = N if first is None else min(N, M - first) if M > first else 1
    x = torch.randn(N, D, device=DEVICE)
    with poisoned_empty():
        best, index = kernel.launch_knn_forward(x, keys, y, n_keep, first)
    s = (y - x @ keys.T).cpu()
    if first is not None:
        rows = torch.arange(N)[first + torch.arange(N) < M]
        s[rows, first + rows] = float("inf")
    exact = s.sort(1).values[:, : best.shape[1]]
    found = best.cpu().sort(1).values[:, : exact.shape[1]]
    assert torch.equal(exact.isinf(), found.isinf())
    finite = exact.isfinite()
    torch.testing.assert_close(found[finite], exact[finite])
    # each value is that of its own column, and no column is taken twice
    full = best.cpu().isfinite()
    torch.testing.assert_close(s.gather(1, index.cpu())[full], best.cpu()[full])
    for row, kept in zip(index.cpu(), full, strict=True):
        assert len(row[kept].unique()) == int(kept.sum())


@pytest.mark.parametrize("metric", pairwise.METRICS)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_knn_is_exact(metric, exclude_self, dtype):
    X = torch.randn(90, 5).to(dtype)
    values, index = pairwise.knn(
        X.to(DEVICE), 6, metric=metric, exclude_self=exclude_self, backend="triton"
    )
    assert dispatch.last("shared_kernels::knn") == "triton"
    expected = pairwise.knn(X, 6, metric=metric, exclude_self=exclude_self, backend="cpu")
    assert torch.equal(index.cpu(), expected[1]) and torch.equal(values.cpu(), expected[0])
    if metric != "cosine":
        assert torch.equal(index.cpu(), dense(X, 6, metric=metric, exclude_self=exclude_self))


def test_two_sets_ties_and_strides():
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    Y = torch.cat((grid, grid)).to(DEVICE)
    X = torch.randn(20, 4, device=DEVICE)[:, ::2]
    index = pairwise.knn(X, 5, Y=Y, backend="triton")[1].cpu()
    assert torch.equal(index, dense(X.cpu(), 5, Y.cpu()))
    index = pairwise.knn(Y, 5, backend="triton")[1].cpu()
    assert torch.equal(index, dense(Y.cpu(), 5))


def test_what_it_cannot_run_is_refused():
    X = torch.randn(300, 2, device=DEVICE)
    with pytest.raises(NotImplementedError, match="at most 64 candidates"):
        pairwise.knn(X, 60, backend="triton")
    with pytest.raises(NotImplementedError, match="256 dimensions"):
        pairwise.knn(torch.randn(40, 300, device=DEVICE), 3, backend="triton")
    assert pairwise.knn(X, 60, backend="cpu")[1].shape == (300, 60)


def test_bits_repeat():
    X = torch.randn(100, 3, device=DEVICE)
    a, b = (pairwise.knn(X, 4, backend="triton") for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
