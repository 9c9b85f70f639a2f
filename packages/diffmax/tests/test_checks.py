"""Bad input: one clear error before any work."""

import math

import pytest
import torch

from diffmax import (
    DiffmaxBisectModule,
    HillMap,
    diffmax_bisect,
    diffmax_loss,
    explain,
    sparsity_stats,
)
from shared_kernels import dispatch, native

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, 1.3, math.nan, math.inf, 2])
@pytest.mark.parametrize("form", [lambda a: a, torch.tensor, lambda a: lambda: a])
def test_alpha_outside(alpha, form):
    alpha = form(float(alpha))
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, 1\), got .*softmax"):
        diffmax_bisect(X, alpha)


def test_one_bad_alpha_among_good_ones():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        diffmax_bisect(X, torch.tensor([[0.5], [0.2], [1.5]]))


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
@pytest.mark.parametrize(
    "call",
    [
        diffmax_bisect,
        lambda X, dim: DiffmaxBisectModule(dim)(X),
        lambda X, dim: diffmax_loss(X, X.softmax(-1), dim),
    ],
    ids=["bisect", "module", "loss"],
)
def test_a_dim_in_the_place_of_alpha(call, dim):
    """`torch.softmax(X, -1)` has its dim there."""
    with pytest.raises(ValueError, match=rf"got {dim}; .*did you mean dim={dim}\?"):
        call(X, dim)


def test_a_map_has_no_dim_to_mean():
    with pytest.raises(ValueError) as raised:
        HillMap().inverse(1)
    assert "dim" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int64, "float32", float])
def test_a_dtype_that_holds_no_weights(dtype):
    with pytest.raises(TypeError, match="`dtype` must be a floating-point"):
        diffmax_bisect(X, 0.5, dtype=dtype)


@pytest.mark.parametrize("alpha", ["0.5", None, True, [0.5], lambda: "0.5"])
def test_alpha_of_a_wrong_type(alpha):
    with pytest.raises(TypeError, match="alpha"):
        diffmax_bisect(X, alpha)


def test_alpha_of_integers():
    with pytest.raises(TypeError, match="floating"):
        diffmax_bisect(X, torch.tensor(1))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (5, 1), (1, 2, 3, 1)])
def test_alpha_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"`alpha` must broadcast to \(2, 3, 1\)"):
        diffmax_bisect(X, torch.full(shape, 0.5))


@pytest.mark.parametrize("dim", [3, -4])
def test_dim_out_of_range(dim):
    with pytest.raises(IndexError, match="`dim`"):
        diffmax_bisect(X, dim=dim)


def test_wrong_types():
    with pytest.raises(TypeError, match="floating"):
        diffmax_bisect(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="X"):
        diffmax_bisect([1.0, 2.0])
    with pytest.raises(TypeError, match="dim"):
        diffmax_bisect(X, dim=1.0)
    with pytest.raises(TypeError, match="n_iter"):
        diffmax_bisect(X, n_iter=5.0)


@pytest.mark.parametrize("n_iter", [0, -3])
def test_too_few_steps(n_iter):
    with pytest.raises(ValueError, match="`n_iter` must be at least 1"):
        diffmax_bisect(X, n_iter=n_iter)


def test_backends():
    with pytest.raises(ValueError, match="backend"):
        diffmax_bisect(X, backend="fast")
    with pytest.raises(ValueError, match="reduction"):
        diffmax_loss(X[0], torch.tensor([1, 2, 3]), reduction="max")
    chosen = "torch" if native.why_not() else "native"
    assert f"{chosen}: chosen" in explain(diffmax_bisect, X)
    text = explain(DiffmaxBisectModule(0.5), X)
    assert "reference: can run" in text and "triton: cannot run: the tensors are on cpu" in text
    assert explain(torch.softmax, X, -1) == ""


def test_without_the_native_library(monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")
    text = explain(diffmax_bisect, X)
    assert "native: cannot run: SHARED_KERNELS_NATIVE=0" in text and "torch: chosen" in text
    diffmax_bisect(X)
    assert dispatch.last("diffmax::bisect") == "torch"
    with pytest.raises(NotImplementedError, match="'native' cannot run .* SHARED_KERNELS_NATIVE=0"):
        diffmax_bisect(X, backend="native")
    monkeypatch.delenv("SHARED_KERNELS_NATIVE")
    with pytest.raises(NotImplementedError, match="'native' cannot run .* on meta"):
        diffmax_bisect(X.to("meta"), backend="native")


def test_numbers_of_other_libraries():
    import numpy

    for kind in (numpy.float32, numpy.float64):
        assert torch.equal(diffmax_bisect(X, kind(0.5)), diffmax_bisect(X, 0.5))


def test_the_layer_s_arguments():
    with pytest.raises(TypeError, match="`dim` must be an int"):
        DiffmaxBisectModule(dim=1.5)
    with pytest.raises(TypeError, match="`ensure_sum_one` must be True or False, got 'no'"):
        DiffmaxBisectModule(ensure_sum_one="no")
    with pytest.raises(TypeError, match="`ensure_sum_one`"):
        diffmax_bisect(X, ensure_sum_one=1)
    for wrong in (HillMap, "hill"):
        with pytest.raises(TypeError, match="`alpha_map` must be a map, .*pass an instance"):
            DiffmaxBisectModule(alpha_map=wrong)
    layer = DiffmaxBisectModule(alpha_map=HillMap(), num_heads=8)
    for wrong in (X, X[0]):
        with pytest.raises(ValueError, match="`X` must have num_heads=8 at dim=-3"):
            layer(wrong)
    with pytest.raises(TypeError, match="`c` must be a number, got str"):
        HillMap(c="1")
    with pytest.raises(ValueError, match="`beta` must be positive, got -1"):
        HillMap()(-1.0)


def test_targets_of_the_loss():
    indices = torch.zeros(2, 3, dtype=torch.int64)
    assert diffmax_loss(X, indices.to(torch.int32)) == diffmax_loss(X, indices)
    with pytest.raises(TypeError, match=r"`target` must be a torch\.Tensor, got list"):
        diffmax_loss(X, [0, 1])
    with pytest.raises(TypeError, match="`target` must be an integer tensor"):
        diffmax_loss(X, indices > 0)
    with pytest.raises(ValueError, match=r"without dim=-1, \(2, 3\)"):
        diffmax_loss(X, indices[0])
    with pytest.raises(ValueError, match=r"`target` must have the shape of `X`, \(2, 3, 4\)"):
        diffmax_loss(X, X[..., :3])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"`target` must be in \[0, 3\], got {wrong}"):
            diffmax_loss(X, indices + wrong)


def test_stats_name_their_own_argument():
    with pytest.raises(TypeError, match="`Y`"):
        sparsity_stats(torch.ones(3, dtype=torch.int64))
