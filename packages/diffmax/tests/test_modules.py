"""The maps and the layer."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffmax import (
    DiffmaxBisectModule,
    ExpMap,
    HillMap,
    TanhMap,
    diffmax_bisect,
    diffmax_loss,
    sparsity_stats,
)
from shared_kernels.testing.tolerances import tolerance

ROUNDING64 = tolerance(torch.float64, "rounding")
ROUNDING32 = tolerance(torch.float32, "rounding")
FLOAT64 = tolerance(torch.float64)
FLOAT32 = tolerance(torch.float32)

FORMULAS = {
    HillMap: lambda r: r / (r + 1),
    TanhMap: math.tanh,
    ExpMap: lambda r: 1 - math.exp(-r),
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("beta0", [0.5, 4.0])
def test_formula_and_inverse(kind, c, beta0):
    made = kind(c=c, beta0=beta0)
    for beta in (0.2, 1.0, 3.0):
        expected = FORMULAS[kind]((beta / beta0) ** c)
        got = made(torch.tensor(beta, dtype=torch.float64))
        assert abs(got.item() - expected) < ROUNDING64
        assert abs(made(beta).item() - expected) < ROUNDING32
        log_beta = torch.tensor(math.log(beta), dtype=torch.float64)
        assert abs(made.from_log_beta(log_beta).item() - expected) < ROUNDING64
        if expected < 0.999:
            assert abs(made.inverse(expected) / beta - 1) < FLOAT64


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradcheck_of_the_map(kind):
    log_beta = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kind(c=0.7, beta0=2.0).from_log_beta, log_beta)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.5, 0.85, 0.9999])
def test_initial_alpha_is_exact(kind, alpha):
    for c in (0.05, 0.3, 3.0):
        layer = DiffmaxBisectModule(alpha, alpha_map=kind(c=c, beta0=3.0))
        assert abs(layer.alpha.item() - alpha) < ROUNDING32
    assert math.isfinite(kind(c=0.01).log_inverse(0.9999))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("log_beta", [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30])
def test_far_out_log_beta_stays_finite(kind, log_beta):
    layer = DiffmaxBisectModule(0.5, alpha_map=kind(), num_heads=2)
    with torch.no_grad():
        layer.log_beta.fill_(log_beta)
    Y = layer(torch.randn(2, 2, 3, 9))
    Y.square().sum().backward()
    assert bool(Y.isfinite().all()) and bool(layer.log_beta.grad.isfinite().all())
    assert bool(((layer.alpha > 0) & (layer.alpha < 1)).all())


def test_layer_is_the_function():
    X = torch.randn(2, 3, 5, 7)
    assert torch.equal(DiffmaxBisectModule(0.3, dim=1)(X), diffmax_bisect(X, 0.3, 1))
    assert not list(DiffmaxBisectModule(0.3).parameters())
    raw = DiffmaxBisectModule(0.3, n_iter=3, ensure_sum_one=False)(X)
    assert torch.equal(raw, diffmax_bisect(X, 0.3, n_iter=3, ensure_sum_one=False))


def test_one_alpha_per_head():
    layer = DiffmaxBisectModule(0.6, alpha_map=HillMap(c=0.5), num_heads=3)
    with torch.no_grad():
        layer.log_beta.copy_(torch.tensor([-3.0, 0.0, 3.0]))
    X = torch.randn(2, 3, 4, 9)
    Y = layer(X)
    for head, alpha in enumerate(layer.alpha.tolist()):
        torch.testing.assert_close(Y[:, head], diffmax_bisect(X[:, head], alpha))
    Y.square().sum().backward()
    assert layer.log_beta.grad.shape == (3,) and bool((layer.log_beta.grad != 0).all())


def test_training_finds_the_sparsity_of_its_target():
    X = torch.randn(64, 20)
    target = diffmax_bisect(X, 0.3)
    layer = DiffmaxBisectModule(0.85, alpha_map=HillMap())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (layer(X) - target).square().sum().backward()
        optimizer.step()
    assert abs(layer.alpha.item() - 0.3) < 0.02


def test_state_and_repr():
    layer = DiffmaxBisectModule(0.85, alpha_map=TanhMap(c=0.3), num_heads=6)
    assert list(layer.state_dict()) == ["log_beta"]
    other = DiffmaxBisectModule(0.2, alpha_map=TanhMap(c=0.3), num_heads=6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.alpha, layer.alpha)
    assert "alpha=[0.85, 0.85" in repr(layer) and "TanhMap(c=0.3" in repr(layer)
    assert "alpha=0.85, dim=-1" in repr(DiffmaxBisectModule(0.85))


def test_half_precision_layer():
    layer = DiffmaxBisectModule(0.7, alpha_map=HillMap()).bfloat16()
    Y = layer(torch.randn(3, 9, dtype=torch.bfloat16))
    Y.square().sum().backward()
    assert Y.dtype == torch.bfloat16 and layer.log_beta.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("log_beta", [None, 12.0, 300.0, 6e4, -12.0, -300.0, -6e4])
def test_a_learned_alpha_stays_inside_in_every_dtype(kind, dtype, log_beta):
    for c in (0.3, 1.0, 5.0):
        layer = DiffmaxBisectModule(0.999, alpha_map=kind(c=c), num_heads=2).to(dtype)
        if log_beta is not None:
            torch.nn.init.constant_(layer.log_beta, log_beta)
        X = torch.randn(2, 2, 3, 9, dtype=dtype, requires_grad=True)
        Y = layer(X)
        Y.float().square().sum().backward()
        for x in (Y, X.grad, layer.log_beta.grad):
            assert x.dtype == dtype and bool(x.isfinite().all())
        assert bool(((layer.alpha > 0) & (layer.alpha < 1)).all())
        alpha = kind(c=c).from_log_beta(layer.log_beta)  # in the dtype itself
        assert alpha.dtype == dtype and bool(((alpha > 0) & (alpha < 1)).all())
        alpha = kind(c=c)(torch.tensor([1e-3, 1.0, 1e4], dtype=dtype))
        assert alpha.dtype == dtype and bool(((alpha > 0) & (alpha < 1)).all())
        assert bool(diffmax_bisect(X[..., :3], alpha.max()).isfinite().all())


@pytest.mark.parametrize("num_heads", [None, 3])
def test_reset_parameters_after_meta(num_heads):
    layer = DiffmaxBisectModule(0.7, alpha_map=HillMap(), num_heads=num_heads, device="meta")
    assert "alpha=" in repr(layer) and layer.log_beta.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.alpha, torch.full(layer.alpha.shape, 0.7))
    assert layer.alpha.shape == (() if num_heads is None else (3,))
    wide = DiffmaxBisectModule(0.7, alpha_map=HillMap(), dtype=torch.float64)
    assert wide.log_beta.dtype == wide.alpha.dtype == torch.float64


def test_a_checkpoint_with_a_scalar_loads():
    layer = DiffmaxBisectModule(0.7, alpha_map=HillMap())
    assert layer.log_beta.dim() == 1  # fully_shard takes no scalar
    torch.nn.Sequential(layer).load_state_dict({"0.log_beta": torch.tensor(0.0)})
    assert layer.alpha.item() == 0.5


def test_numpy_scalars():
    X = torch.randn(4, 6)
    found = diffmax_bisect(X, np.float32(0.5), np.int64(0), np.int64(50), np.bool_(True))
    assert torch.equal(found, diffmax_bisect(X, 0.5, 0))
    layer = DiffmaxBisectModule(
        np.float64(0.5),
        np.int64(-1),
        np.int32(9),
        np.bool_(False),
        HillMap(c=np.float32(1)),
        np.int64(4),
    )
    assert layer(X.expand(4, 4, 6)[None]).shape == (1, 4, 4, 6)
    assert diffmax_loss(X, X.argmax(0), np.float32(0.5), np.int64(0)).item() >= 0
    assert sparsity_stats(found, np.int64(0))["sum_error"] < FLOAT32 / 2


@pytest.mark.parametrize("learned", [False, True])
def test_fake_tensors(learned):
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = DiffmaxBisectModule(0.7, alpha_map=HillMap() if learned else None)
        X = torch.randn(3, 9, requires_grad=True)
        Y = layer(X)
        Y.sum().backward()
        assert Y.shape == X.grad.shape == (3, 9)
        assert "alpha=" in repr(layer)


@pytest.mark.parametrize("kind", FORMULAS)
def test_refusals(kind):
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`c`"):
            kind(c=bad)
        with pytest.raises(ValueError, match="`beta0`"):
            kind(beta0=bad)
    for bad in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            kind().inverse(bad)
        with pytest.raises(ValueError, match="alpha"):
            DiffmaxBisectModule(bad, alpha_map=kind())
        with pytest.raises(ValueError, match="alpha"):
            DiffmaxBisectModule(bad)
    with pytest.raises(ValueError, match="num_heads"):
        DiffmaxBisectModule(num_heads=4)
    with pytest.raises(ValueError, match="n_iter"):
        DiffmaxBisectModule(n_iter=0)
