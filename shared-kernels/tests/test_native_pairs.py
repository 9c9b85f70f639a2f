"""Native products with kernel matrices against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from shared_kernels.native import pairs
from shared_kernels.native.pairs import Pairs
from shared_kernels.testing.compare import assert_close
from shared_kernels.testing.instructions import ON_EACH_SET, each_instruction_set

VISIBLE = 1e-4  # relative error that rounded coordinates show at least

pytestmark = ON_EACH_SET
instructions = each_instruction_set()
DTYPES = (torch.float32, torch.float64)


def exponents(x, y, score, scales=None):
    difference = x.double()[:, None] - y.double()[None]
    if score == "products":
        return x.double() @ y.double().T
    if score == "sums":
        return -difference.abs().sum(-1)
    e = -difference.square().sum(-1)
    return e if scales is None else e / (scales[0][:, None] * scales[1])


def points(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) / max(1, d) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["squares", "sums", "products"])
@pytest.mark.parametrize(
    ("n", "m", "d", "r"),
    [
        (1, None, 1, 1),
        (17, None, 3, 12),
        (300, None, 2, 3),
        (257, None, 5, 9),
        (70, 31, 4, 7),
        (31, 530, 0, 2),
        (5, 1, 40, 33),
        (600, None, 1, 8),
        (0, None, 3, 2),
        (4, 0, 3, 2),
    ],
)
def test_products_are_those_of_float64(dtype, score, n, m, d, r):
    x = points(n, d)
    y = None if m is None else points(m, d, 1)
    other = x if y is None else y
    V = torch.randn(len(other), r)
    out = Pairs(x, y, score=score, dtype=dtype).times(V)
    exact = torch.exp2(exponents(x, other, score)) @ V.double()
    assert out.dtype == torch.float64 and out.shape == exact.shape
    assert_close(out.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_sets", [False, True])
def test_scales_divide_squares(dtype, two_sets):
    x, y = points(130, 3), points(90, 3, 1)
    scales = [torch.rand(len(t), dtype=torch.float64) + 0.2 for t in (x, y)]
    other, own = (y, scales[1]) if two_sets else (x, scales[0])
    V = torch.randn(len(other), 5)
    found = Pairs(x, y if two_sets else None, scales=(scales[0], own), dtype=dtype).times(V)
    exact = torch.exp2(exponents(x, other, "squares", (scales[0], own))) @ V.double()
    assert_close(found.to(dtype), exact)


@pytest.mark.parametrize("n", [700, 9000])
def test_bits_do_not_depend_on_threads_or_on_who_takes_which_part(n):
    x, V = points(n, 3), torch.randn(n, 3)
    matrix = Pairs(3.0 * x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out = matrix.times(V)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, matrix.times(V, threads)) for threads in (None, 1, 2, 7))
    # parts are sums of other terms: what they add up to is the same to rounding
    parts = [matrix.times(V, part=(i, 3)) for i in range(3)]
    assert_close(sum(parts), out)


def test_near_points_keep_their_digits_far_from_the_origin():
    # exponents of float32 coordinates would be off by 2 to the 10
    x = points(200, 3) + 2.0**12
    V = torch.ones(200, 1)
    exact = torch.exp2(exponents(x, x, "squares")) @ V.double()
    assert_close(Pairs(x, low=True).times(V).float(), exact)
    rounded = Pairs(x).times(V)
    assert not torch.allclose(rounded, exact, rtol=VISIBLE)
    exact = torch.exp2(exponents(x.float(), x.float(), "squares")) @ V.double()
    assert_close(rounded.float(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_point_is_at_distance_zero_of_itself_and_far_ones_are_not_seen(dtype):
    x = torch.tensor([[0.0], [40.0], [1e6]], dtype=torch.float64)
    out = Pairs(x, dtype=dtype).times(torch.eye(3))
    assert torch.equal(out, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("two_sets", [False, True])
def test_what_is_left_out_is_small_and_is_left_out(dtype, scaled, two_sets):
    x = 30.0 * points(600, 2).sort(0).values
    y = 30.0 * points(333, 2, 1).sort(0).values if two_sets else x
    own = [torch.rand(len(t), dtype=torch.float64) + 0.5 for t in (x, y)]
    scales = (own[0], own[1] if two_sets else own[0]) if scaled else None
    K = torch.exp2(exponents(x, y, "squares", scales))
    V = torch.rand(len(y), 3, dtype=torch.float64)
    options = {"scales": scales, "dtype": dtype}
    found = Pairs(x, y if two_sets else None, skip_below=1e-4, **options).times(V)
    error = K @ V - found
    bound = 1e-4 * V.sum(0) + 1e-5 * (K @ V)
    assert (error.abs() <= bound).all() and error.max() > 1e-6
    assert_close(Pairs(x, y if two_sets else None, **options).times(V).to(dtype), K @ V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, None), (552, None), (1500, None), (530, 1100), (9, 2050)])
def test_padding_is_not_seen(n, m, dtype):
    """Sizes on both sides of what is taken at once, and of the squares within."""
    x, y = points(n, 2), None if m is None else points(m, 2, 1)
    other = x if y is None else y
    V = torch.randn(len(other), 2)
    exact = torch.exp2(exponents(x, other, "squares")) @ V.double()
    for skip_below in (None, 1e-30):
        out = Pairs(x, y, dtype=dtype, skip_below=skip_below).times(V)
        assert_close(out.to(dtype), exact)


def test_a_nan_value_is_seen_by_all_and_spoils_no_other_column():
    x, V = points(50, 2), torch.randn(50, 3)
    exact = Pairs(x).times(V)
    V[7, 1] = float("nan")
    out = Pairs(x).times(V)
    assert out[:, 1].isnan().all() and torch.equal(out[:, [0, 2]], exact[:, [0, 2]])


def test_what_the_dtype_cannot_hold_is_refused():
    for score, far in (("squares", 1e39), ("products", 1e20)):
        with pytest.raises(FloatingPointError, match=r"beyond the range of torch\.float32"):
            Pairs(torch.tensor([[0.0], [far]], dtype=torch.float64), score=score)
        Pairs(torch.tensor([[0.0], [far]], dtype=torch.float64), score=score, dtype=torch.float64)


@pytest.mark.parametrize("n", [70, 128, 390])
def test_each_pair_of_blocks_is_taken_once(n, monkeypatch):
    """Whatever the number of blocks, the order of the tasks and the parts of the work."""
    monkeypatch.setattr(pairs, "_BLOCK_POINTS", 32)
    generator = torch.Generator().manual_seed(n)
    x, V = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    matrix = pairs.Pairs(x, dtype=torch.float64)
    exact = torch.exp2(-torch.cdist(x, x).square()) @ V
    whole = matrix.times(V)
    assert_close(whole, exact)
    numbers = []

    def backwards(run, n, seconds, threads):
        numbers.append(n)
        for i in reversed(range(n)):
            run(i, i + 1)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "in_ranges", backwards)
        assert torch.equal(matrix.times(V), whole)
    assert all(number % 2 == 0 for number in numbers)  # as many for each of two threads
    assert_close(sum(matrix.times(V, part=(i, 3)) for i in range(3)), exact)
