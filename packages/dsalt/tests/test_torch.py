"""The CPU backends against the dense float64 reference, in every dtype, and their costs."""

from __future__ import annotations

import functools

import pytest
import torch

from dsalt import _torch
from dsalt.kernels import dsalt_attention, select_landmarks
from shared_kernels.testing import (
    assert_close,
    compare,
    contracts,
    measure_memory,
    parametrize,
    poisoned_empty,
)

from .cases import CASES, NATIVE, attention, differentiable, inputs, needs_native


@parametrize(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_matches_the_reference(case, dtype, backend):
    tensors, options = inputs(case)
    windows = tensors["window_sizes"]
    names = differentiable(case)
    if dtype.itemsize == 2:  # windows and gates stay what they are: a half type cannot hold them
        kept = {n: tensors.pop(n).float() for n in ("landmark_bias",) if n in tensors}
        kept |= {"window_sizes": tensors.pop("window_sizes")}
        options = {**options, **kept}
        names = ["Q", "K", "V"]
    if dtype == torch.float32 and case.name == "large-scores":
        tensors["Q"] /= 3  # scores of 100: fp32 itself rounds them by 1e-5
    with poisoned_empty():
        compare(
            attention(options, backend),
            attention(options, "reference"),
            tensors,
            differentiable=names,
            dtype=dtype,
        )
    assert windows.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "cpu"),
        (torch.float64, "cpu"),
        pytest.param(torch.float32, "native", marks=needs_native),
    ],
)
def test_exactness(dtype, backend):
    """Forward and all gradients: 2e-5 in fp32, 1e-10 in fp64."""
    bound = {torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    q, k, v = (x.to(dtype).requires_grad_() for x in torch.randn(3, 1, 2, 300, 64).double())
    windows = (100 * torch.rand(1, 2, 300)).to(dtype).requires_grad_()
    idx = select_landmarks(torch.randn(1, 2, 300), 16, landmark_block=32)
    bias = torch.randn(idx.shape).to(dtype).requires_grad_()
    leaves = (q, k, v, windows, bias)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    weight = torch.randn(1, 2, 300, 64)

    def run(q, k, v, windows, bias, backend):
        out = dsalt_attention(
            q, k, v, windows, idx, landmark_bias=bias, landmark_block=32, backend=backend
        )
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v, windows, bias))
        return out, *grads

    for ours, exact in zip(run(*leaves, backend), run(*exact_leaves, "reference"), strict=True):
        size = exact.detach().abs().max().clamp(min=1.0)
        assert (ours - exact).detach().abs().max() <= bound * size


def test_tiles_are_not_semantics(monkeypatch):
    tensors, options = inputs(CASES[5])
    runs = []
    for chunk, cached in ((64, 1 << 18), (7, 1 << 10), (128, 1)):
        monkeypatch.setattr(_torch, "CHUNK", chunk)
        monkeypatch.setattr(_torch, "CACHED", cached)
        runs.append(dsalt_attention(**tensors, **options, backend="torch"))
    assert_close(runs[1], runs[0])
    assert_close(runs[2], runs[0])


@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_nan_stays_in_the_rows_that_see_it(backend):
    q, k, v = torch.randn(3, 1, 1, 100, 8)
    windows = torch.full((1, 1, 100), 10.0)
    idx = torch.tensor([[[0, 30]]])
    clean = dsalt_attention(q, k, v, windows, idx, window_ramp=2.0, backend=backend)
    for which in (k, v):
        before = which[0, 0, 50].clone()
        which[0, 0, 50] = torch.nan
        out = dsalt_attention(q, k, v, windows, idx, window_ramp=2.0, backend=backend)
        which[0, 0, 50] = before
        harmed = out.isnan().any(-1)[0, 0]
        assert harmed.nonzero().flatten().tolist() == list(range(50, 62))
        assert_close(out[0, 0, ~harmed], clean[0, 0, ~harmed])


def test_autocast_gives_its_dtype():
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    windows = torch.full((1, 2, 40), 9.3, requires_grad=True)
    idx = torch.zeros(1, 2, 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        out = dsalt_attention(q, k, v, windows, idx)
    assert out.dtype == torch.bfloat16
    exact = dsalt_attention(q, k, v, windows, idx)
    assert_close(out, exact)
    out.sum().backward()
    assert windows.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # of several dtypes, as a cache of before may be
        for i in range(3):
            mixed = [x.bfloat16() if i == j else x for j, x in enumerate((q, k, v))]
            assert torch.equal(dsalt_attention(*mixed, windows, idx), out)


def _attend(
    q,
    k,
    v,
    soft=True,
    block=16,
    packed=False,
    backend="cpu",
    normalizer=None,
    bias=False,
    grouped=False,
    trained=False,
):
    q = q.repeat(1, 2, 1, 1) if grouped else q
    B, H, N, _ = q.shape
    block = 256 if block and N > 4096 else block  # fewer lists where only memory is looked at
    windows = torch.linspace(2, 12, max(1, N))[:N].expand(B, H, N)
    windows = windows if soft else windows.int()
    if trained:
        windows = windows.contiguous().requires_grad_()
    scores = torch.randn(B, H, N, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, N // 3, N], dtype=torch.int32) if packed else None
    if block:
        idx = select_landmarks(scores, 4, landmark_block=block, cu_seqlens=cu)
    else:
        idx = select_landmarks(scores, 4)
    more = {"normalizer": normalizer} if normalizer is not None else {"backend": backend}
    if bias:
        more["landmark_bias"] = torch.zeros(idx.shape, requires_grad=True)
    return dsalt_attention(
        q, k, v, windows, idx, landmark_block=block or None, cu_seqlens=cu, **more
    )


class TestAttention(contracts.AttentionContract):
    attend = staticmethod(_attend)
    always_causal = True
    options = {
        "hard": lambda q, k, v: {"soft": False},
        "one-list": lambda q, k, v: {"block": 0},
        "packed": lambda q, k, v: {"packed": True},
        "normalizer": lambda q, k, v: {"normalizer": torch.softmax},
        "everything": lambda q, k, v: dict.fromkeys(("trained", "bias", "grouped", "packed"), True),
    }


@needs_native
class TestNativeAttention(TestAttention):
    attend = staticmethod(functools.partial(_attend, backend="native"))


class TestNormalizer(contracts.AttentionContract):
    attend = staticmethod(lambda q, k, v: _attend(q, k, v, normalizer=torch.softmax))
    always_causal = True
    N_memory = 1024
    test_no_option_changes_the_memory_class = None


@parametrize([c for c in CASES if c.K and c.D < 80 and c.name != "large-scores"])
def test_softmax_as_the_normalizer_is_the_operator(case):
    tensors, options = inputs(case)
    names = differentiable(case)
    compare(
        lambda **t: dsalt_attention(**t, **options, normalizer=torch.softmax),
        attention(options, "reference"),
        tensors,
        differentiable=names,
        dtype=torch.float64,
    )


def _peak(attend, N, H=8, D=64):
    """Bytes held at most by forward and backward of ``attend(q, k, v)``."""
    qkv = [torch.randn(1, H, N, D).requires_grad_() for _ in range(3)]
    return measure_memory(lambda: attend(*qkv).sum().backward()).peak


def _trained(q, k, v, w=256, n_landmarks=64):
    """As in a model: soft windows and gates with a gradient, a list for every 32 queries."""
    shape = q.shape[:3]
    windows = torch.full(shape, float(w), requires_grad=True)
    idx = select_landmarks(torch.randn(shape), n_landmarks, landmark_block=32)
    bias = torch.zeros(idx.shape, requires_grad=True)
    return dsalt_attention(q, k, v, windows, idx, landmark_bias=bias, landmark_block=32)


def _hard(q, k, v, w=256, n_landmarks=64):
    windows = torch.full(q.shape[:3], w, dtype=torch.int32)
    idx = torch.arange(n_landmarks).expand(*q.shape[:2], n_landmarks)
    return dsalt_attention(q, k, v, windows, idx)


def _dense(q, k, v):
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return s.masked_fill(future, float("-inf")).softmax(-1) @ v


@pytest.mark.thorough
def test_memory_is_at_most_that_of_flash_attention():
    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert _peak(_trained, 8192) <= _peak(sdpa, 8192)


@pytest.mark.system
def test_memory_is_a_sixth_of_the_materialised_matrix():
    assert max(_peak(_hard, 2048), _peak(_trained, 2048)) <= 0.17 * _peak(_dense, 2048)


def test_memory_grows_with_the_length_only():
    def peak(n):
        q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
        windows = torch.full((1, 1, n), 64.0, requires_grad=True)
        idx = torch.arange(16).expand(1, 1, 16)
        return measure_memory(lambda: dsalt_attention(q, k, v, windows, idx).sum().backward()).peak

    assert peak(8192) < 5 * peak(2048)
