"""The threshold solver against bisection in float64, its laws, edges and derivatives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_kernels import qexp
from shared_kernels.testing import assert_close, others_thorough
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
DIFFERENCES = 1e-6  # derivatives by differences of float64
ROUNDING32 = tolerance(torch.float32, "rounding")
FLOAT64 = tolerance(torch.float64)

EXPONENTS = [0.0, 1e-6, 0.01, 0.029, 0.031, 0.1, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.95, 1.0]
ATOL = {torch.float32: 3e-6, torch.float64: 1e-11, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def by_bisection(x, s, steps=200):
    """The definition, solved by halving in float64; s is a float."""
    x = x.double()
    if s == 0:
        return torch.softmax(x, -1)
    z = x - x.amax(-1, keepdim=True)
    low, high = torch.zeros_like(z[..., :1]), torch.full_like(z[..., :1], math.log(z.shape[-1] + 1))
    if s > 1e-3:
        high = torch.full_like(low, 1 / s)

    def weights(theta):
        base = torch.log1p((s * (z - theta)).clamp(min=-1)) / s
        return base.exp()

    for _ in range(steps):
        mid = (low + high) / 2
        above = weights(mid).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    p = weights(low)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", EXPONENTS)
def test_matches_bisection(s, dtype):
    for N in (1, 2, 7, 64, 700):
        for scale in (0.1, 1.0, 10.0):
            torch.manual_seed(N)
            x = (torch.randn(4, N) * scale).to(dtype)
            p, tau = qexp.normalize(x, s)
            exact = by_bisection(x, s)
            assert p.dtype == dtype and tau.dtype == dtype and tau.shape == (4, 1)
            factor = 10 if s < 1e-3 else 1
            assert (p - exact).abs().max() <= factor * ATOL[dtype]
            if s >= 0.1:
                again = (s * x - tau).clamp(min=0) ** (1 / s)
                assert (again - exact).abs().max() <= 5 * FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_and_broken_rows_with_their_derivatives(dtype):
    """Nobody's NumPy settings are its business."""
    x, dy = torch.randn(2, 6, 700, dtype=dtype)
    x[0, 5:], x[1, 3], x[2] = -math.inf, math.nan, -math.inf
    with np.errstate(all="raise"):
        for s in (0.05, 0.15, 0.4, 0.5, 0.95):
            p, _ = qexp.normalize(x, s)
            exact = by_bisection(x[3:], s)
            assert (p[3:] - exact).abs().max() <= ATOL[dtype]
            dx, ds = qexp.backward_both(dy, p, s)
            S = exact ** (1 - s) * (exact > 0)
            mean = (S * dy[3:]).sum(-1, keepdim=True) / S.sum(-1, keepdim=True)
            assert_close(dx[3:], (S * (dy[3:] - mean)).to(dtype), "gradient")
            assert (dx[0, 5:] == 0).all() and dx[1].isnan().all() and (dx[2] == 0).all()
            assert ds[0].isfinite() and ds[1].isnan() and ds[2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("s", [0.01, 0.15, 0.5, 1.0])
def test_half_types_are_computed_wide(s, dtype):
    x = torch.randn(5, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    p, tau = qexp.normalize(x, s)
    assert p.dtype == dtype and tau.dtype == torch.float32
    assert (p - by_bisection(x, s)).abs().max() <= ATOL[dtype] / 4


@pytest.mark.parametrize("kind", ["low", "high", "mixed", "constant"])
def test_s_per_row(kind):
    torch.manual_seed(2)
    x = torch.randn(3, 4, 50)
    s = {"low": [0.0, 0.001, 0.01, 0.02], "high": [0.1, 0.25, 0.6, 1.0]}.get(
        kind, [0.0, 0.02, 0.5, 1.0]
    )
    s = torch.full((4, 1), 0.25) if kind == "constant" else torch.tensor(s).view(4, 1)
    p, tau = qexp.normalize(x, s)
    for i in range(4):
        assert (p[:, i] - by_bisection(x[:, i], s[i].item())).abs().max() <= 3 * ROUNDING32
        one, tau_one = qexp.normalize(x[:, i], s[i].item())
        torch.testing.assert_close(tau[:, i], tau_one, atol=2 * ROUNDING32, rtol=ROUNDING32)
        torch.testing.assert_close(p[:, i], one, atol=2 * ROUNDING32, rtol=ROUNDING32)


@pytest.mark.parametrize("s", [1e-6, 0.15, 0.25, 0.5, 0.9, 1.0])
def test_raw_weights_are_converged(s):
    x = torch.randn(4, 900, generator=torch.Generator().manual_seed(3))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        p, _ = qexp.normalize(x.to(dtype), s, divide=False)
        assert (p.double().sum(-1) - 1).abs().max() <= bound
        flat, _ = qexp.normalize(x.to(dtype) * 1e-4, s, divide=False)
        assert (flat.double().sum(-1) - 1).abs().max() <= bound


@pytest.mark.parametrize("n_iter", [1, 3, 9])
def test_a_small_cap_still_sums_to_one(n_iter):
    x = torch.randn(4, 900, generator=torch.Generator().manual_seed(3))
    for s in (0.01, 0.15, 0.5, 1.0):
        p, _ = qexp.normalize(x, s, n_iter=n_iter)
        assert (p.sum(-1) - 1).abs().max() <= ROUNDING32
        if n_iter == 9:
            assert (p - by_bisection(x, s)).abs().max() <= FLOAT32 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [0.06, 0.15, 0.3, 0.4, 0.55, 0.7, 0.95])
def test_rows_that_take_longer_than_their_neighbours(s, dtype):
    """Among rows that are soon there: two heights, a spike, a slope, a tie, a single entry."""
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[7] = torch.where(torch.arange(64) % 2 == 0, 0.0, -0.8 / s)
    x[8], x[8, 3] = 0.0, 0.9 / s
    x[9] = torch.linspace(-2 / s, 0, 64, dtype=torch.float64)
    x[10, :2] = 9.0
    x[11], x[11, 0] = -torch.inf, 1.0
    x = x.to(dtype)
    p, tau = qexp.normalize(x, s)
    exact = by_bisection(x, s)
    assert (p - exact).abs().max() <= ATOL[dtype]
    assert (p > 0)[exact > ROUNDING32].all() and (p == 0)[s * x < tau - 50 * FLOAT32].all()
    alone, _ = qexp.normalize(x[7:12], s)
    assert (p[7:12] - alone).abs().max() <= ATOL[dtype]


@pytest.mark.parametrize("s", [0.02, 0.2, 0.5, 0.8, 1.0])
def test_edges(s):
    inf, nan, big = math.inf, math.nan, torch.finfo(torch.float32).max
    x = torch.randn(8, 600, generator=torch.Generator().manual_seed(4))
    clean = x.clone()
    x[0] = -inf
    x[1, 3] = nan
    x[2, 3] = inf
    x[3, 5:] = -inf
    x[4, 0] = -big
    x[5, 0] = 3e38
    x[5, 1] = -3e38
    x[6] = -big
    kept = x.clone()
    p, tau = qexp.normalize(x, s)
    assert torch.equal(x.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert (p[0] == 0).all() and tau[0] == 0
    assert p[1].isnan().all() and p[2].isnan().all()
    assert (p[3, 5:] == 0).all() and torch.allclose(p[3].sum(), torch.tensor(1.0))
    assert p[4, 0] == 0 and torch.allclose(p[4].sum(), torch.tensor(1.0))
    assert p[5, 0] == 1 and p[5, 1:].abs().max() == 0
    assert torch.allclose(p[6], torch.tensor(1 / 600))
    torch.testing.assert_close(p[7], qexp.normalize(clean[7], s)[0])
    dx = qexp.backward(torch.ones_like(p), p, s)
    assert (dx[0] == 0).all() and (dx[3, 5:] == 0).all() and dx[4, 0] == 0
    assert dx[1].isnan().all() and dx[3:].isfinite().all()


def test_empty_and_views():
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 4)):
        p, tau = qexp.normalize(torch.empty(shape), 0.5)
        assert p.shape == shape and tau.shape == shape[:-1] + (1,)
    x = torch.randn(5, 4, 6)
    p, _ = qexp.normalize(x.transpose(0, 2), 0.3)
    torch.testing.assert_close(p, qexp.normalize(x.transpose(0, 2).contiguous(), 0.3)[0])
    assert torch.equal(qexp.normalize(x[0, 0], 0.3)[0], qexp.normalize(x[0], 0.3)[0][0])


def test_shift_and_order():
    x = torch.randn(3, 40, dtype=torch.float64)
    p, tau = qexp.normalize(x, 0.4)
    q, tau_q = qexp.normalize(x + 2.5, 0.4)
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(tau_q - tau, torch.full_like(tau, 1.0))
    order = torch.randperm(40)
    torch.testing.assert_close(qexp.normalize(x[:, order], 0.4)[0], p[:, order])


def test_long_flat_rows():
    x = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(5)) * 1e-6
    for s in (0.1, 0.5, 1.0):
        p, _ = qexp.normalize(x, s)
        assert (p - by_bisection(x, s, 50)).abs().max() <= 10 * FLOAT64
        assert abs(p.double().sum().item() - 1) <= FLOAT32 / 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(0.0, 1.0),
    st.integers(1, 40),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_laws(s, N, scale, seed):
    x = torch.randn(2, N, generator=torch.Generator().manual_seed(seed)) * scale
    p, _ = qexp.normalize(x, s)
    assert (p >= 0).all() and (p.sum(-1) - 1).abs().max() <= FLOAT32 / 2
    best = x.argmax(-1, keepdim=True)
    assert torch.equal(p.gather(-1, best), p.amax(-1, keepdim=True))
    order = x.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= -1e-7).all()


@pytest.mark.parametrize("alpha", [1.05, 1.5, 1.8, 2.0])
def test_gradcheck(alpha):
    torch.manual_seed(6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: qexp.entmax(x, alpha, -1), x)
    assert torch.autograd.gradcheck(lambda x: qexp.entmax(x, alpha, 0), x)


def test_gradcheck_in_alpha():
    torch.manual_seed(7)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[1.01], [1.3], [1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: qexp.entmax(x, a), (x, a))
    scalar = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: qexp.entmax(x, a, 0), (x, scalar))


@pytest.mark.parametrize("s", [0.0, 1e-6, 1e-4, 0.02, 0.3, 0.99])
def test_derivative_in_s_is_stable_in_single_precision(s):
    torch.manual_seed(8)
    x, dy = torch.randn(4, 64), torch.randn(4, 64)
    p, _ = qexp.normalize(x.double(), s)
    exact = qexp.backward_s(dy.double(), p, s)
    got = qexp.backward_s(dy, qexp.normalize(x, s)[0], s)
    assert (got - exact).abs().max() <= FLOAT32 / 2 * max(1.0, exact.abs().max().item())
    if 1e-3 < s < 0.9:
        eps = 1e-6
        up, down = (qexp.normalize(x.double(), s + d)[0] for d in (eps, -eps))
        numeric = ((up - down) / (2 * eps) * dy).sum(-1, keepdim=True)
        torch.testing.assert_close(exact, numeric, atol=DIFFERENCES, rtol=DIFFERENCES)
    if s == 0.0:  # softmax: -sum p L^2 / 2 (dy - mean)
        h = p * p.log() ** 2 / 2
        mean = (p * dy).sum(-1, keepdim=True)
        torch.testing.assert_close(exact, -(h * (dy - mean)).sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_in_chunks(dtype, monkeypatch):
    x, dy = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(9)).to(dtype)
    s = torch.tensor([0.0, 0.05, 0.2, 0.5, 0.6, 0.9, 1.0]).view(7, 1)

    def both_ways():
        p, tau = qexp.normalize(x, s)
        of_one = qexp.backward(dy, p, s), qexp.backward(dy, p, 0.3)
        return p, tau, *qexp.backward_both(dy, p, s), *of_one

    whole = both_ways()
    for name in ("_CHUNK", "_CHUNK_OF_DERIVATIVES"):
        monkeypatch.setattr(qexp, name, 64)
    parts = both_ways()
    for one, other in zip(whole, parts, strict=True):
        assert_close(one, other, "gradient")


def test_sparsemax_is_the_projection():
    x = torch.tensor([[1.2, 0.9, -0.3, 0.1]])
    torch.testing.assert_close(qexp.sparsemax(x), torch.tensor([[0.65, 0.35, 0.0, 0.0]]))
    assert torch.equal(qexp.sparsemax(x.T, 0), qexp.sparsemax(x).T)


def test_refusals():
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="floating"):
        qexp.normalize(torch.ones(3, dtype=torch.int64), 0.5)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            qexp.normalize(x, bad)
    with pytest.raises(ValueError, match="n_iter"):
        qexp.normalize(x, 0.5, n_iter=0)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        qexp.entmax(x, 2.5)
    with pytest.raises(ValueError, match="broadcast"):
        qexp.entmax(x, torch.full((2, 3), 1.5))


@pytest.mark.parametrize("s", [0.02, 0.25, 0.5, 0.7, 1.0])
def test_masked_entries_are_exactly_zero_every_time(s):
    """Rounding in the last step must not lift an entry outside the support."""
    for seed in range(60):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 3
        x[:, 40:] = -torch.inf
        for dtype in (torch.float32, torch.float64):
            assert (qexp.normalize(x.to(dtype), s)[0][:, 40:] == 0).all()


def test_masked_entries_with_one_s_per_row_below_a_third():
    """All rows smooth, and entries that weigh nothing from the first step on."""
    x = torch.tensor([[-0.65, -torch.inf, -torch.inf], [0.3, 0.2, -torch.inf], [9.0, -90.0, 8.0]])
    s = torch.tensor([[0.3238], [0.31], [0.2]])
    p, _ = qexp.normalize(x, s)
    for row, (scores, value) in enumerate(zip(x, s.view(-1).tolist(), strict=True)):
        assert_close(p[row], qexp.normalize(scores, value)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", others_thorough([5, 513, 33, 4096], 2))
def test_a_row_does_not_depend_on_the_others(N, dtype):
    """Alone, elsewhere in the batch or beside flat, sharp, dead and broken rows: the same bits."""
    generator = torch.Generator().manual_seed(N)
    scale = torch.logspace(-2, 1.5, 60)[torch.randperm(60, generator=generator), None]
    x = (torch.randn(60, N, generator=generator) * scale).to(dtype)
    x[7], x[8, 0] = -math.inf, math.nan
    dy = torch.randn(60, N, generator=generator).to(dtype)
    per_row = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.8, 1.0]).repeat(10).view(60, 1)
    other = torch.randperm(60, generator=generator)
    for s in (0.0, 0.02, 0.25, 0.4, 0.5, 0.6, 1.0, per_row):

        def of(rows, s=s):
            at = s if isinstance(s, float) else s[rows]
            p, tau = qexp.normalize(x[rows], at)
            return p, tau, *qexp.backward_both(dy[rows], p, at), qexp.backward(dy[rows], p, at)

        together, moved = of(torch.arange(60)), of(other)
        for a, b in zip(together, moved, strict=True):
            assert torch.equal(a[other].nan_to_num(), b.nan_to_num())
        for row in (0, 3, 7, 20, 21, 22, 41, 59):
            for a, b in zip(together, of(torch.tensor([row])), strict=True):
                assert torch.equal(a[row : row + 1].nan_to_num(), b.nan_to_num())
