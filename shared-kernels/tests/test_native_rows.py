"""The native rows against float64: every instruction set of this processor, every kind of power."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from shared_kernels import qexp, rows
from shared_kernels.native import rows as native_rows
from shared_kernels.testing.compare import assert_close
from shared_kernels.testing.instructions import ON_EACH_SET, each_instruction_set

pytestmark = ON_EACH_SET
instructions = each_instruction_set()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXPONENTS = (0.0, 1e-4, 0.01, 0.05, 0.15, 0.22, 0.3, 1 / 3, 0.34, 0.5, 0.62, 0.95, 1.0)


def exact_rows(x: torch.Tensor, s: float | torch.Tensor) -> torch.Tensor:
    """Bisection on the threshold in fp64; rows of -inf give zeros."""
    x = x.double()
    s = torch.as_tensor(s, dtype=torch.float64).expand(*x.shape[:-1], 1)
    top = x.amax(-1, keepdim=True)
    z = torch.where(top == -torch.inf, 0.0, x - top)
    tiny = s.clamp(min=1e-12)

    def weights(u):
        b = (tiny * (z - u)).clamp(min=-1)
        return torch.where(b > -1, torch.exp(torch.log1p(b) / tiny), 0.0)

    low, high = (
        torch.zeros_like(top),
        torch.full_like(top, 0.0) - torch.expm1(-tiny * math.log(max(1, x.shape[-1]))) / tiny,
    )
    for _ in range(60):
        middle = (low + high) / 2
        heavy = weights(middle).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    p = weights(low)
    p = p / p.sum(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, p)


@functools.cache
def exact_cases(dtype: torch.dtype, s: float) -> list[tuple[torch.Tensor, ...]]:
    """x, dy, the weights of x in float64 and as they are stored, and dx and ds at the latter."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for R, N in ((1, 1), (3, 2), (17, 7), (5, 64), (33, 65), (9, 129), (6, 700), (3, 5000)):
        for scale in (0.0, 0.1, 1.0, 6.0):
            x = (torch.randn(R, N, generator=generator) * scale).to(dtype)
            dy, p = torch.randn(R, N, generator=generator).to(dtype), exact_rows(x, s)
            stored = p.to(dtype)
            found.append((x, dy, p, stored, *qexp.backward_both(dy.double(), stored.double(), s)))
    return found


@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_gradients_are_those_of_float64(dtype, s):
    for x, dy, exact, p, exact_dx, exact_ds in exact_cases(dtype, s):
        found = native_rows.normalize(x, s)
        assert found.dtype == dtype
        assert_close(found, exact)
        dx, ds = native_rows.backward(dy, p, s, True, True)
        assert_close(dx, exact_dx, "gradient")
        assert_close(ds, exact_ds, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_may_have_its_own_s(dtype):
    x = torch.randn(4, 9, 200).to(dtype)
    s = torch.tensor([0.0, 0.02, 0.2, 0.25, 0.5, 0.5, 0.7, 1.0, 1.0])[:, None]
    p = native_rows.normalize(x, s)
    assert_close(p, exact_rows(x, s))
    dy = torch.randn(x.shape).to(dtype)
    dx, ds = native_rows.backward(dy, p, s, True, True)
    for i in range(9):
        assert torch.equal(p[:, i], native_rows.normalize(x[:, i], s[i].item()))
        alone = native_rows.backward(dy[:, i], p[:, i], s[i].item(), True, True)
        assert torch.equal(dx[:, i], alone[0]) and torch.equal(ds[:, i], alone[1])


@pytest.mark.parametrize("s", EXPONENTS)
def test_the_bits_of_a_row_are_its_own(s):
    x = torch.randn(37, 333) * torch.logspace(-2, 2, 37)[:, None]
    p = native_rows.normalize(x, s)
    threads = torch.get_num_threads()
    for i in range(len(x)):
        assert torch.equal(p[i], native_rows.normalize(x[i], s)), i
    big = x.repeat(200, 1)
    try:
        torch.set_num_threads(3)
        assert torch.equal(native_rows.normalize(big, s), p.repeat(200, 1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_in_their_row(dtype, s):
    x = torch.randn(8, 100).to(dtype)
    clean = native_rows.normalize(x, s)
    x[1] = -torch.inf
    x[3, 50] = torch.nan
    x[5, ::2] = -torch.inf
    x[6, 7] = torch.inf
    p = native_rows.normalize(x, s)
    assert (p[1] == 0).all()
    assert p[3].isnan().all() and p[6].isnan().all()
    assert (p[5, ::2] == 0).all()
    assert_close(p[5:6, 1::2], exact_rows(x[5:6, 1::2], s))
    for i in (0, 2, 4, 7):
        assert torch.equal(p[i], clean[i])
    dx, ds = native_rows.backward(torch.ones_like(p), p, s, True, True)
    assert (dx[1] == 0).all() and ds[1] == 0
    assert not dx[[0, 2, 4, 5, 7]].isnan().any() and not ds[[0, 2, 4, 5, 7]].isnan().any()
    assert dx[[3, 6]].isnan().all() and ds[[3, 6]].isnan().all()


def test_empty_strided_and_undivided_rows():
    assert native_rows.normalize(torch.empty(0, 5), 0.5).shape == (0, 5)
    assert native_rows.normalize(torch.empty(3, 0), 0.5).shape == (3, 0)
    x = torch.randn(40, 30)
    before = x.clone()
    assert torch.equal(
        native_rows.normalize(x.T, 0.4), native_rows.normalize(x.T.contiguous(), 0.4)
    )
    assert torch.equal(x, before)
    loose = native_rows.normalize(x, 0.5, divide=False)
    assert_close(loose, exact_rows(x, 0.5))


def test_the_op_can_be_differentiated_twice_from_these_weights():
    x, s = torch.randn(5, 40, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    p = native_rows.normalize(x, s)
    v, dp = torch.randn_like(p), torch.randn_like(p)
    step = 1e-6
    bent = native_rows.normalize(x + step * v, s) - native_rows.normalize(x - step * v, s)
    first = native_rows.backward(dp, p, s)[0]
    assert_close((first * v).sum(), (dp * bent).sum() / (2 * step), "gradient")
    assert rows.second_derivative(v, None, dp, p, s)[0].shape == p.shape
