"""The backends of the CPU against the float64 reference: values, gradients, laws and memory."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash import adasplash, adasplash_no_block_mask, triton_entmax
from adasplash._call import Attention
from adasplash._torch import attention_forward
from shared_kernels import native
from shared_kernels.testing import (
    assert_close,
    compare,
    contracts,
    measure_memory,
    others_thorough,
    pairwise,
    poisoned_empty,
)

from .cases import ALPHAS, ATTENTION, BACKENDS, BY_NAME, PER_HEAD, inputs

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64)


def check(case, alpha, dtype, seed=0, backend="torch"):
    tensors, options = inputs(case, alpha, seed)
    compare(
        lambda **x: adasplash(**x, **options, backend=backend),
        lambda **x: adasplash(**x, **options, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=dtype,
    )


@pairwise(case=ATTENTION, alpha=[1.5, PER_HEAD], dtype=FLOATS, backend=BACKENDS)
def test_every_case(case, alpha, backend, dtype):
    check(case, alpha, dtype, backend=backend)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", (*FLOATS, *HALVES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_alpha(alpha, backend, dtype):
    check(BY_NAME["grouped"], alpha, dtype, backend=backend)


@pytest.mark.parametrize("name", ["bias", "varlen", "window-causal"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types(name, backend, dtype):
    check(BY_NAME[name], PER_HEAD, dtype, backend=backend)


@pytest.mark.parametrize("backend", others_thorough(reversed(BACKENDS)))
def test_many_tiles(backend):
    """Several groups of heads and several tiles of queries."""
    case = BY_NAME["grouped"].replaced("long", N_q=300, N_k=700, B=1)
    check(case, PER_HEAD, torch.float32, backend=backend)
    case = case.replaced("long-window", window=90, is_causal=False)
    check(case, 1.5, torch.float32, backend=backend)


def test_sparse_tiles_keep_a_list_and_dense_tiles_do_not():
    """The compact path runs where it should, and both give the same."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 400, 8)
    for scale, compact in ((2.0, True), (0.01, False)):
        _, kept = attention_forward(Attention(q, k, v, alpha_value=1.5, scale=scale, save=True))
        counts = kept.counts
        assert bool(((counts >= 0) == compact).all())
        if compact:
            weights = triton_entmax(scale * q @ k.mT)
            assert bool((counts >= (weights > 1e-9).sum(-1)).all())
        case = BY_NAME["plain"].replaced("long", H=2, N_q=400, scale=scale)
        check(case, PER_HEAD, torch.float64)
        check(case, 1.5, torch.float32)


@pytest.mark.parametrize("alphas", others_thorough([(1.9, 1.6), (1.5, 1.4), (2.0, 1.2)]), ids=str)
def test_lists_with_an_alpha_per_head(alphas):
    torch.manual_seed(0)
    alpha = torch.tensor(alphas, dtype=torch.float64)
    q, k, v = torch.randn(3, 3, 2, 400, 8, dtype=torch.float64)
    _, kept = attention_forward(Attention(q, k, v, alpha, scale=2.0, save=True))
    assert bool((kept.counts >= 0).any())
    compare(
        lambda q, k, v, alpha: adasplash(q, k, v, alpha, scale=2.0, backend="torch"),
        lambda q, k, v, alpha: adasplash(q, k, v, alpha, scale=2.0, backend="reference"),
        {"q": q, "k": k, "v": v, "alpha": alpha},
        differentiable=["q", "k", "v", "alpha"],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    others_thorough(
        [
            {"is_causal": True, "H": 4, "H_kv": 2, "N_k": 411},
            {"varlen": (301, 77), "is_causal": True},
            {"is_causal": True},
            {"window": 90},
            {"is_causal": True, "N_k": 200},  # the first queries see nothing
            {"mask": True},
        ]
    ),
    ids=str,
)
def test_dense_tiles_at_three_halves(options, backend, dtype):
    """No list, no powers, a threshold from group maxima: alpha = 1.5 has a path of its own."""
    sizes = {"N_q": 301, "N_k": 301, "D_v": 24, "scale": 0.02}
    case = BY_NAME["plain"].replaced("dense", **{**sizes, **options})
    check(case, 1.5, dtype, backend=backend)


@pytest.mark.system
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", others_thorough([None, 0.01]))
def test_peak_memory_at_4096(scale, backend):
    """Forward and backward of (1, 4, 4096, 32): the scores alone would be 256 MB."""
    q, k, v = (torch.randn(1, 4, 4096, 32, requires_grad=True) for _ in range(3))

    def both() -> None:
        out = adasplash(q, k, v, 1.5, is_causal=True, scale=scale, backend=backend)
        out.sum().backward()

    assert measure_memory(both).peak < 60e6


def test_both_names_are_one_function():
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    assert torch.equal(adasplash(q, k, v), adasplash_no_block_mask(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_junk_in_the_padding_does_not_matter(backend):
    tensors, options = inputs(BY_NAME["varlen-causal-grouped"])
    tensors = {name: x.float() for name, x in tensors.items()}
    clean = adasplash(**tensors, **options, backend=backend)
    for b, n in enumerate((37, 12)):
        for x in tensors.values():
            x[b, :, n:] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = adasplash(**leaves, **options, backend=backend)
    assert torch.equal(out, clean)
    assert bool((out[1, :, 12:] == 0).all())
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    for grad in grads:
        assert bool(grad.isfinite().all()) and bool((grad[1, :, 12:] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bottom_right_causal_is_the_end_of_the_square(backend):
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    whole = adasplash(q, k, v, is_causal=True, backend=backend)
    assert_close(adasplash(q[:, :, 20:], k, v, is_causal=True, backend=backend), whole[:, :, 20:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_head_alpha_is_each_head_alone(backend):
    q, k, v = torch.randn(3, 2, 3, 30, 8)
    alpha = torch.tensor([1.2, 1.5, 2.0])
    out = adasplash(q, k, v, alpha, backend=backend)
    for h, a in enumerate(alpha.tolist()):
        each = slice(h, h + 1)
        assert_close(
            out[:, each], adasplash(q[:, each], k[:, each], v[:, each], a, backend=backend)
        )
    spelled = adasplash(q, k, v, alpha.view(1, 3, 1, 1), backend=backend)
    assert_close(spelled, out, scale=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_at_alpha_1(backend):
    q, k, v = torch.randn(3, 2, 3, 30, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(adasplash(q, k, v, 1.0, is_causal=True, backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [1.3, 1.7])
def test_niter_below_ten_caps_the_solver(alpha, backend):
    q, k, v = torch.randn(3, 1, 1, 200, 8)
    exact = adasplash(q, k, v, alpha, niter=40, backend=backend)
    assert_close(adasplash(q, k, v, alpha, niter=10, backend=backend), exact, scale=0.1)
    rough = adasplash(q, k, v, alpha, niter=1, backend=backend)
    # where p > 2 one step of the CPU's solver is nearly there
    assert alpha < 1.5 or (rough - exact).abs().max() > 1e-4
    ones = adasplash(q, k, torch.ones_like(v), alpha, niter=1, backend=backend)
    assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_empty_entry_is_written(backend):
    tensors, options = inputs(BY_NAME["mask"], PER_HEAD)
    tensors = {name: x.float() for name, x in tensors.items()}
    with poisoned_empty():
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        out = adasplash(**leaves, **options, backend=backend)
        grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    assert bool((out[0, :, 3] == 0).all())


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2),
    H_kv=st.integers(1, 2),
    G=st.integers(1, 3),
    N_q=st.integers(0, 40),
    N_k=st.integers(0, 40),
    D=st.integers(1, 9),
    alpha=st.floats(1.05, 2.0),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 45),
)
def test_any_shape(B, H_kv, G, N_q, N_k, D, alpha, causal, window):
    case = BY_NAME["plain"].replaced(
        "any", B=B, H=H_kv * G, H_kv=H_kv, N_q=N_q, N_k=N_k, D=D, is_causal=causal, window=window
    )
    check(case, alpha, torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 1.5, PER_HEAD])
@pytest.mark.parametrize("name", ["plain", "grouped", "packed-causal", "varlen-causal-grouped"])
def test_a_score_mod_is_a_bias_by_position(name, alpha, monkeypatch):
    """A callable with a learned tensor, in several tiles, beside slopes and sinks."""
    monkeypatch.setattr("adasplash._recomputed.TILE_SCORES", 500)
    tensors, options = inputs(BY_NAME[name], alpha)
    H, N_q, N_k = tensors["q"].shape[1], tensors["q"].shape[2], tensors["k"].shape[2]
    tensors["alibi_slopes"], tensors["s_aux"] = torch.rand(2, H, dtype=torch.float64)
    tensors["table"] = torch.randn(H, N_q, N_k, dtype=torch.float64)
    compare(
        lambda table, **x: adasplash(
            **x, **options, score_mod=lambda score, b, h, i, j: score + table[h, i, j]
        ),
        lambda table, **x: adasplash(**x, **options, bias=table, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=torch.float64,
    )


def test_a_score_mod_that_cannot_run_is_refused():
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    for backend in ("reference", "triton"):
        with pytest.raises(NotImplementedError, match="`score_mod` must be None for backend"):
            adasplash(q, k, v, score_mod=lambda score, *at: score, backend=backend)
    with pytest.raises(TypeError, match="`score_mod` must be callable"):
        adasplash(q, k, v, score_mod=3.0)
    with pytest.raises(ValueError, match="`score_mod's result` must have shape"):
        adasplash(q, k, v, score_mod=lambda score, *at: score[..., :1])


class Attending(contracts.AttentionContract):
    causal = {"is_causal": True}
    N_memory = 4096
    options = {
        "causal": lambda q, k, v: {"is_causal": True},
        "alpha gradient": lambda q, k, v: {"alpha": torch.tensor([1.5], requires_grad=True)},
        "bias": lambda q, k, v: {"bias": torch.zeros(k.shape[2], requires_grad=True)},
        "mask": lambda q, k, v: {"mask": torch.ones(k.shape[2], dtype=torch.bool)},
        "alibi": lambda q, k, v: {"alibi_slopes": torch.ones(1)},
        "window": lambda q, k, v: {"window": 2000},
        "varlen": lambda q, k, v: {"varlen": torch.tensor([k.shape[2] - 3])},
        "packed": lambda q, k, v: {"cu_seqlens": torch.tensor([0, 2500, k.shape[2]])},
        "sinks": lambda q, k, v: {"s_aux": torch.zeros(q.shape[1], requires_grad=True)},
        "soft cap": lambda q, k, v: {"softcap": 5.0},
        "dense support": lambda q, k, v: {"scale": 0.01},
    }


class TestTorchAttention(Attending):
    attend = staticmethod(functools.partial(adasplash, backend="torch"))

    @pytest.mark.system
    @pytest.mark.thorough  # by day at a length of 4096: test_peak_memory_at_4096
    def test_no_option_changes_the_memory_class(self):
        super().test_no_option_changes_the_memory_class()


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
class TestNativeAttention(Attending):
    attend = staticmethod(functools.partial(adasplash, backend="native"))


class TestEntmax15(contracts.NormalizerContract):
    normalize = staticmethod(lambda x, dim: triton_entmax(x, dim=dim))


class TestEntmaxNearSoftmax(contracts.NormalizerContract):
    normalize = staticmethod(lambda x, dim: triton_entmax(x, 1.02, dim=dim))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_rows(alpha, dtype):
    compare(
        lambda x: triton_entmax(x, alpha, backend="torch"),
        lambda x: triton_entmax(x, alpha, backend="reference"),
        {"x": 3 * torch.randn(9, 70, dtype=torch.float64)},
        differentiable=["x"],
        dtype=dtype,
    )


@pytest.mark.parametrize("shape", [(), (1, 1, 7), (5, 1, 7), (5, 1, 1)])
def test_rows_with_a_tensor_alpha(shape):
    compare(
        lambda x, alpha: triton_entmax(x, alpha, dim=1, backend="torch"),
        lambda x, alpha: triton_entmax(x, alpha, dim=1, backend="reference"),
        {
            "x": 3 * torch.randn(5, 30, 7, dtype=torch.float64),
            "alpha": 1.05 + 0.9 * torch.rand(shape, dtype=torch.float64),
        },
        differentiable=["x", "alpha"],
        dtype=torch.float64,
    )


def test_sums_to_one_with_large_scores():
    x = 100 * torch.randn(50, 300)
    assert_close(triton_entmax(x, 2.0).sum(-1), torch.ones(50), scale=0.1)


def test_fp16_with_very_negative_rows_is_finite():
    x = torch.full((3, 20), -60000.0, dtype=torch.float16)
    x[0, 3] = -59000.0
    y = triton_entmax(x, 1.3)
    assert bool(y.isfinite().all()) and y[0, 3] == 1


@pytest.mark.thorough  # the contract's test of the memory class holds a score matrix back, too
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear(backend):
    """16384 tokens: one score matrix would be 1 GB."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 16384, 8).unbind())
    alpha = torch.tensor(1.5, requires_grad=True)
    used = measure_memory(
        lambda: adasplash(q, k, v, alpha, is_causal=True, backend=backend).sum().backward()
    )
    assert used.peak < 100 * 2**20, used
