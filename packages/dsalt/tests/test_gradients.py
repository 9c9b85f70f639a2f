"""gradcheck of everything that has a gradient."""

from __future__ import annotations

import pytest
import torch

from dsalt.kernels import HybridEnergyScorer, dsalt_attention, hybrid_energy
from dsalt.modules import DSALTAttention, WindowSizePredictor, window_regulariser
from shared_kernels.testing import pairwise

DIFFERENCES = 1e-2  # a float32 loss, by differences along its gradient

F64 = torch.float64


def _leaf(*shape, low=None, high=None):
    x = torch.randn(*shape, dtype=F64)
    if low is not None:
        x = low + (high - low) * torch.rand(*shape, dtype=F64)
    return x.requires_grad_()


OPTIONS = {
    "cpu": {"backend": "cpu"},
    "reference": {"backend": "reference"},
    "normalizer": {"normalizer": lambda s, dim: torch.softmax(1.5 * s, dim)},
}


@pairwise(name=OPTIONS, block=[None, 4], H=[4, 2])
def test_attention(name, block, H):
    n = 11
    q, k, v = _leaf(1, H, n, 3), _leaf(1, 2, n, 3), _leaf(1, 2, n, 3)
    windows = _leaf(1, H, n, low=0.1, high=6.9)
    shape = (1, H, 3) if block is None else (1, H, 3, 3)
    idx = torch.randint(-1, n, shape)
    options = {"landmark_block": block, "window_ramp": 2.5, **OPTIONS[name]}

    def attend(q, k, v, windows, bias):
        return dsalt_attention(q, k, v, windows, idx, landmark_bias=bias, **options)

    assert torch.autograd.gradcheck(attend, (q, k, v, windows, _leaf(*shape)))


def test_window_gradient_points_to_the_loss():
    """Widening the windows by a little changes the loss as the gradient says."""
    q, k, v = torch.randn(3, 2, 2, 60, 8)
    windows = (20 * torch.rand(2, 2, 60)).requires_grad_()
    idx = torch.randint(0, 60, (2, 2, 6))
    weight = torch.randn(2, 2, 60, 8)

    def loss(w):
        return (dsalt_attention(q, k, v, w, idx) * weight).sum()

    (grad,) = torch.autograd.grad(loss(windows), windows)
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        moved = loss(windows + step) - loss(windows - step)
    assert abs(moved / (2 * (grad * step).sum()) - 1) < DIFFERENCES


def test_integer_windows_and_constant_inputs_get_none():
    q, k, v = torch.randn(3, 1, 1, 10, 4)
    q.requires_grad_()
    windows, idx = torch.full((1, 1, 10), 3), torch.zeros(1, 1, 1, dtype=torch.int64)
    dsalt_attention(q, k, v, windows, idx).sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_energy(causal, spread):
    X, WV = _leaf(2, 7, 4), _leaf(3, 4, 2)
    X.data[:] = torch.ones(4) + spread * X.data  # 1e-3: the standard deviation is at its floor
    alpha = _leaf(3, low=0.2, high=0.8)
    assert torch.autograd.gradcheck(
        lambda X, WV, alpha: hybrid_energy(X, WV, alpha, causal=causal)[..., 1:], (X, WV, alpha)
    )


def test_energy_of_equal_tokens_has_finite_gradients():
    X, WV = torch.ones(1, 5, 4, requires_grad=True), torch.randn(2, 4, 2)
    for causal in (False, True):
        scores = hybrid_energy(X, WV, torch.full((2,), 0.6), causal=causal)
        assert bool((scores == 0).all())
        (grad,) = torch.autograd.grad(scores.sum(), X)
        assert bool(grad.isfinite().all())


def test_gate_reaches_alpha():
    scorer = HybridEnergyScorer(2, 3, landmark_block=4).double()
    x, values = torch.randn(1, 12, 8, dtype=F64), torch.randn(1, 2, 12, 4, dtype=F64)
    assert torch.allclose(scorer.alpha, torch.full((2,), 0.6, dtype=F64))
    (grad,) = torch.autograd.grad(scorer(x, values).bias.sum(), scorer.alpha_logit)
    assert bool((grad != 0).all())


def test_predictor_and_regulariser():
    predictor = WindowSizePredictor(4, 2, 3, 9).double()
    x = _leaf(1, 12, 4)
    assert torch.autograd.gradcheck(predictor, (x,))
    for kind in ("entropy", "length"):
        assert torch.autograd.gradcheck(
            lambda x, kind=kind: window_regulariser(predictor(x), 3, 9, kind), (x,)
        )


def test_whole_layer_in_every_parameter():
    layer = DSALTAttention(8, 2, 1.3, 4.7, 2, window_ramp=2.5, landmark_block=3, n_kv_heads=1)
    layer = layer.double()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(1, 10, 8, dtype=F64)

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradcheck(run, values)
