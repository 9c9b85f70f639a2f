import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shared_kernels import dispatch, native, pairwise
from shared_kernels.testing import pairwise as pairs_of_values
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
LAST_BIT = 1e-7  # less than the last bit of a float32
ROUNDING64 = tolerance(torch.float64, "rounding")


@pytest.fixture(params=["cpu", *native.instruction_sets()], autouse=True)
def proposer(request, monkeypatch):
    """What proposes candidates: tiled torch, or the native library on each instruction set."""
    if request.param == "cpu":
        monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")
    else:
        monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", request.param)
    return request.param


def brute(X, k, Y=None, metric="sqeuclidean", exclude_self=False):
    """Dense float64, stable sort: the specification."""
    x = X.double()
    y = x if Y is None else Y.double()
    if metric == "sqeuclidean":
        s = ((x[:, None] - y[None]) ** 2).sum(-1)
    else:
        if metric == "cosine":
            x, y = (
                torch.where(
                    a.norm(dim=1, keepdim=True) > 0, a / a.norm(dim=1, keepdim=True), 0.0 * a
                )
                for a in (x, y)
            )
        s = -(x[:, None] * y[None]).sum(-1)
    if exclude_self:
        s.fill_diagonal_(float("inf"))
    s, i = s.sort(dim=-1, stable=True)
    return (s if metric == "sqeuclidean" else -s)[:, :k], i[:, :k]


def points(n, d, dtype=torch.float32, seed=0, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", pairwise.METRICS)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_knn_equals_the_dense_search(dtype, metric, exclude_self):
    X = points(157, 5, dtype)
    values, index = pairwise.knn(X, 7, metric=metric, tile=32, exclude_self=exclude_self)
    exact, exact_index = brute(X, 7, metric=metric, exclude_self=exclude_self)
    assert values.dtype == dtype and index.dtype == torch.int64
    if metric != "cosine":  # its ties differ by the last bit of the normalisation
        assert torch.equal(index, exact_index)
    torch.testing.assert_close(values, exact.to(dtype), rtol=LAST_BIT, atol=ROUNDING64)


@pytest.mark.parametrize("metric", pairwise.METRICS)
def test_two_sets(metric):
    X, Y = points(50, 3), points(301, 3, seed=1)
    values, index = pairwise.knn(X, 4, Y=Y, metric=metric, tile=64)
    exact, exact_index = brute(X, 4, Y=Y, metric=metric)
    assert torch.equal(index, exact_index)
    torch.testing.assert_close(values, exact.float())


def test_ties_go_to_the_smaller_index():
    grid = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0))
    X = torch.cat((grid, grid))[torch.randperm(162, generator=torch.Generator().manual_seed(3))]
    for tile in (16, 50, 1024):
        values, index = pairwise.knn(X, 10, tile=tile)
        exact, exact_index = brute(X, 10)
        assert torch.equal(index, exact_index) and torch.equal(values, exact.float())


def test_all_points_equal():
    values, index = pairwise.knn(torch.ones(60, 2), 3, tile=16, exclude_self=True)
    assert torch.equal(values, torch.zeros(60, 3))
    assert index[0].tolist() == [1, 2, 3] and index[1].tolist() == [0, 2, 3]
    assert index[59].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_origin_and_close_together(dtype):
    # squared distances near 1e-6 against squared norms near 1e8: a plain product finds noise
    X = points(300, 3, dtype, scale=1e-1, shift=1e4)
    values, index = pairwise.knn(X, 5, tile=64, exclude_self=True)
    exact, exact_index = brute(X, 5, exclude_self=True)
    assert torch.equal(index, exact_index) and torch.equal(values, exact.to(dtype))


def test_a_far_cluster_does_not_spoil_the_near_one():
    X = torch.cat((points(200, 3, scale=1e-3), points(3, 3, shift=1e5)))
    values, index = pairwise.knn(X, 6, tile=64)
    exact, exact_index = brute(X, 6)
    assert torch.equal(index, exact_index) and torch.equal(values, exact.float())


def test_zero_vectors_have_cosine_zero():
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    values, index = pairwise.knn(X, 3, metric="cosine")
    assert values[1].tolist() == [1.0, 0.0, -1.0] and index[1].tolist() == [1, 0, 2]
    assert values[0].tolist() == [0.0, 0.0, 0.0] and index[0].tolist() == [0, 1, 2]


def test_numbers_beyond_float32_products():
    X = points(100, 2) * 1e25  # the squares overflow float32
    values, index = pairwise.knn(X.double(), 3, tile=16)
    assert torch.equal(pairwise.knn(X, 3, tile=16)[1], index) and torch.isfinite(values).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10**6), st.integers(1, 70))
def test_any_size(n, d, seed, tile):
    X = points(n, d, seed=seed).mul(3).round()  # many ties
    k = 1 + seed % n
    values, index = pairwise.knn(X, k, tile=tile)
    exact, exact_index = brute(X, k)
    assert torch.equal(index, exact_index) and torch.equal(values, exact.float())


class LargestOutput(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.system
@pytest.mark.parametrize("metric", pairwise.METRICS)
def test_no_buffer_of_size_n_squared(metric, proposer):
    N = 4096
    with LargestOutput() as seen:
        pairwise.knn(points(N, 2), 4, tile=256, metric=metric)
    assert dispatch.last("shared_kernels::knn") == ("cpu" if proposer == "cpu" else "native")
    least = 256 * 256 if proposer == "cpu" else 4 * N  # a tile, or what is found
    assert least <= seen.largest < N * N // 8


def test_strided_input_is_read_and_left_alone():
    base = points(80, 6)
    X = base[:, ::2]
    before = base.clone()
    assert torch.equal(pairwise.knn(X, 3)[1], pairwise.knn(X.contiguous(), 3)[1])
    assert torch.equal(base, before)


def test_same_bits_twice():
    X = points(400, 8)
    a, b = pairwise.knn(X, 5, tile=100), pairwise.knn(X, 5, tile=100)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tiles(dtype):
    x, y = points(13, 4, dtype, shift=50.0), points(9, 4, dtype, seed=1, shift=50.0)
    exact = ((x.double()[:, None] - y.double()[None]) ** 2).sum(-1)
    out = pairwise.sqdist_tile(x, y)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=FLOAT32 / 2, atol=5 * FLOAT32)
    torch.testing.assert_close(
        pairwise.dot_tile(x, y).double(),
        x.double() @ y.double().T,
        rtol=FLOAT32 / 2,
        atol=5 * FLOAT32,
    )
    assert pairwise.sqdist_tile(x, y[:0]).shape == (13, 0)
    assert pairwise.sqdist_tile(x[:0], y).shape == (0, 9)


def test_sqdist_gradient():
    x = points(4, 3, torch.float64).requires_grad_()
    y = points(5, 3, torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(pairwise.sqdist_tile, (x, y))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"k": 0}, ValueError, "`k` must be at least 1"),
        ({"k": 7}, ValueError, "got 7"),
        ({"k": 6, "exclude_self": True}, ValueError, "at most 5"),
        ({"metric": "l7"}, ValueError, "`metric` must be one of"),
        ({"tile": 0}, ValueError, "`tile` must be at least 1"),
        ({"Y": torch.zeros(6, 3)}, ValueError, "like X"),
        ({"Y": torch.zeros(6, 2).double()}, ValueError, "float64"),
        ({"Y": torch.zeros(6, 2), "exclude_self": True}, ValueError, "exclude_self"),
        ({"X": torch.zeros(6)}, ValueError, r"\(N, D\)"),
        ({"X": torch.full((6, 2), float("nan"))}, ValueError, "finite"),
        ({"X": torch.zeros(6, 2, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"X": [[0.0]]}, TypeError, "torch.Tensor"),
    ],
)
def test_errors(kwargs, error, words):
    arguments = {"X": torch.zeros(6, 2), "k": 1, **kwargs}
    with pytest.raises(error, match=words):
        pairwise.knn(arguments.pop("X"), arguments.pop("k"), **arguments)


def test_no_rows():
    values, index = pairwise.knn(torch.zeros(0, 2), 2, Y=torch.zeros(3, 2))
    assert values.shape == index.shape == (0, 2)


@pytest.mark.parametrize("n", [1, 15, 16, 257, 1000])
@pytest.mark.parametrize("n_keep", [1, 3, 12])
def test_the_smallest_of_a_row_by_groups(n, n_keep):
    s = points(20, n, seed=n).mul(2).round() if n < 100 else points(20, n, seed=n)
    s[:, -1] = -9.0  # in the columns that fill no group
    values, columns = pairwise._smallest(s, min(n_keep, n))
    assert torch.equal(s.gather(1, columns), values)
    assert torch.equal(values.sort(1).values, s.sort(1).values[:, :n_keep])


@pytest.mark.parametrize("tile", [16, 1024])
def test_many_columns(tile):
    X, Y = points(301, 3), points(3001, 3, seed=1)
    values, index = pairwise.knn(X, 9, Y=Y, tile=tile)
    exact, exact_index = brute(X, 9, Y=Y)
    assert torch.equal(index, exact_index) and torch.equal(values, exact.float())


@pytest.mark.parametrize("metric", pairwise.METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("two_sets", [False, True])
def test_a_power_of_two_changes_no_neighbour(dtype, metric, two_sets):
    """From 1e-30 to 1e30, as far as the dtype reaches; fp64 to 1e-200 and 1e200 as well."""
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(300, 6, generator=generator, dtype=torch.float64).to(dtype)
    Y = (
        torch.randn(250, 6, generator=generator, dtype=torch.float64).to(dtype)
        if two_sets
        else None
    )
    values, indices = pairwise.knn(X, 4, Y=Y, metric=metric)
    for exponent in (-600, -100, -73, -40, -10, 10, 40, 63, 100, 600):
        if dtype != torch.float64 and abs(exponent) > 100 or dtype == torch.float16:
            exponent = max(min(exponent, 4), -4) if dtype == torch.float16 else 0
        c = 2.0**exponent
        scaled = [None if P is None else P * c for P in (X, Y)]
        if not torch.equal(scaled[0] / c, X):
            continue  # too small a number for the dtype
        found, index = pairwise.knn(scaled[0], 4, Y=scaled[1], metric=metric)
        assert torch.equal(index, indices)
        of_scores = 1.0 if metric == "cosine" else c * c
        if 1e-300 < of_scores < 1e300:
            assert torch.equal(found, (values.double() * of_scores).to(dtype))


@pytest.mark.parametrize("c", [1e-22, 1e-38, 1e19, 1e30])
def test_neighbours_at_any_scale_equal_the_dense_search(c):
    X = torch.randn(500, 4) * c
    exact = (X.double()[:, None] - X.double()[None]).square().sum(-1)
    _, index = pairwise.knn(X, 5)
    assert torch.equal(index, exact.sort(dim=-1, stable=True).indices[:, :5])


def test_one_set_much_smaller_than_the_other():
    X, Y = torch.randn(40, 3, dtype=torch.float64), torch.randn(200, 3, dtype=torch.float64)
    for a, b in ((1e-30, 1.0), (1.0, 1e-30), (1e150, 1e-150), (1e-150, 1e150)):
        x, y = X * a, Y * b
        exact = (x[:, None] - y[None]).square().sum(-1)
        _, index = pairwise.knn(x, 3, Y=y)
        if a < b:  # otherwise every distance is |x|^2 to rounding
            assert torch.equal(exact.gather(1, index), exact.sort(dim=-1).values[:, :3])
        dots = pairwise.knn(x, 3, Y=y, metric="dot")[1]
        assert torch.equal(dots, pairwise.knn(X, 3, Y=Y, metric="dot")[1])


@pairs_of_values(d=[1, 15, 16, 17, 100], k=[1, 40, 300], metric=["sqeuclidean", "dot"])
def test_every_width_and_number_of_neighbours(d, k, metric):
    X, Y = points(250, d), points(700, d, seed=1)
    values, index = pairwise.knn(X, k, Y=Y, metric=metric)
    exact, exact_index = brute(X, k, Y=Y, metric=metric)
    assert torch.equal(index, exact_index)
    torch.testing.assert_close(values, exact.float())


def test_threads_change_no_bit():
    X = points(1000, 20)
    before = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(pairwise.knn(X, 5, exclude_self=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))
