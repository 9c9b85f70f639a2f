"""Bad input gets one clear error that names the argument, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash import (
    AlphaParameter,
    EntmaxAttention,
    LazyAttention,
    MultiheadAttention,
    _ops,
    adasplash,
    register_transformers,
    triton_entmax,
)
from adasplash._call import Attention
from shared_kernels import device

q, k, v = torch.randn(3, 2, 4, 6, 8)
lengths = torch.tensor([3, 6])


@pytest.mark.parametrize("alpha", [0.99, 2.01, math.nan, -1, math.inf])
def test_alpha_out_of_range(alpha):
    for bad in (alpha, torch.tensor(float(alpha)), torch.tensor([1.5, alpha, 1.5, 1.5])):
        with pytest.raises(ValueError, match=r"`alpha` must be in \[1, 2\], got"):
            adasplash(q, k, v, bad)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[1, 2\], got"):
        triton_entmax(q, alpha)


ATTENTION = [
    ({"alpha": "1.5"}, TypeError, "`alpha` must be a number"),
    ({"alpha": torch.tensor([1, 2, 1, 1])}, TypeError, "`alpha` must be a floating-point"),
    ({"alpha": torch.full((3,), 1.5)}, ValueError, r"`alpha` must be a scalar or have shape"),
    ({"q": q.tolist()}, TypeError, "`q` must be a torch.Tensor"),
    ({"q": q[0]}, ValueError, "`q` must have four dimensions"),
    ({"q": q.int()}, TypeError, "`q` must be a floating-point tensor"),
    ({"k": k[:1]}, ValueError, "`k` must have shape"),
    ({"k": k[..., :4]}, ValueError, "`k` must have shape"),
    ({"v": v[:, :, :4]}, ValueError, "`v` must have shape"),
    ({"k": k[:, :3], "v": v[:, :3]}, ValueError, "divisible by k's"),
    ({"k": k.double()}, ValueError, "`k` must have the dtype of `q`"),
    ({"k": k.to("meta"), "v": v.to("meta")}, ValueError, "`k` must have the device of `q`"),
    ({"q": q.repeat(1, 1, 1, 40)}, ValueError, "`k` must have shape"),
    ({"varlen": lengths.float()}, TypeError, "`varlen` must be an integer"),
    ({"varlen": lengths[:1]}, ValueError, "`varlen` must have shape"),
    ({"varlen": torch.tensor([3, 7])}, ValueError, r"`varlen` must be in \[0, N=6\], got 7"),
    ({"varlen": torch.tensor([-1, 6])}, ValueError, r"`varlen` must be in \[0, N=6\], got -1"),
    ({"varlen": lengths, "q": q[:, :, :2]}, ValueError, "`varlen` must come with N_q = N_k"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "`cu_seqlens` must come with B = 1"),
    ({"varlen": lengths, "cu_seqlens": lengths}, ValueError, "`cu_seqlens` must not come with"),
    ({"mask": torch.zeros(6, 6)}, TypeError, "`mask` must be a boolean tensor"),
    ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError, "`mask` must broadcast"),
    ({"bias": torch.ones(6, 6, dtype=torch.int)}, TypeError, "`bias` must be a floating-point"),
    ({"bias": torch.ones(3, 6, 6)}, ValueError, "`bias` must broadcast"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, "`alibi_slopes` must have shape"),
    ({"window": 0}, ValueError, "`window` must be at least 1"),
    ({"s_aux": torch.ones(3)}, ValueError, "`s_aux` must have shape"),
    ({"s_aux": torch.ones(2, dtype=torch.int64)}, TypeError, "`s_aux` must be"),
    ({"softcap": 0.0}, ValueError, "`softcap` must be finite and above 0"),
    ({"softcap": float("nan")}, ValueError, "`softcap` must be finite and above 0"),
    ({"softcap": True}, TypeError, "`softcap` must be a number or None"),
    ({"niter": 0}, ValueError, "`niter` must be at least 1"),
    ({"niter": 2.5}, TypeError, "`niter` must be an int"),
    ({"backend": "cuda"}, ValueError, "`backend` must be one of"),
]


@pytest.mark.parametrize("bad, error, message", ATTENTION)
def test_attention(bad, error, message):
    with pytest.raises(error, match=message):
        adasplash(**{"q": q, "k": k, "v": v, **bad})


def test_packed_offsets():
    for offsets in ([1, 6], [0, 4, 3], [0, 7]):
        with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to at most N=6"):
            adasplash(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor(offsets))


ROWS = [
    ({"x": torch.ones(2, dtype=torch.int)}, TypeError, "`x` must be a floating-point"),
    ({"x": torch.tensor(1.0)}, ValueError, "`x` must have at least one dimension"),
    ({"x": q, "dim": 4}, IndexError, r"`dim` must be in \[-4, 3\]"),
    ({"x": q, "alpha": torch.full((8,), 1.5)}, ValueError, "`alpha` must broadcast"),
    ({"x": q, "n_iter": 0}, ValueError, "`n_iter` must be at least 1"),
    ({"x": q, "alpha": True}, TypeError, "`alpha` must be a number"),
    ({"x": q, "dim": 1.5}, TypeError, "`dim` must be an int"),
]


@pytest.mark.parametrize("bad, error, message", ROWS)
def test_rows(bad, error, message):
    with pytest.raises(error, match=message):
        triton_entmax(**bad)


def test_a_named_backend_never_falls_back():
    if device.interpreting() or torch.cuda.is_available():
        pytest.skip("Triton can run here")
    with pytest.raises((NotImplementedError, ValueError), match="triton"):
        adasplash(q, k, v, backend="triton")


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"is_causal": torch.tensor([3, 4])}, TypeError, "lengths go into `varlen`"),
        ({"is_causal": None}, TypeError, "`is_causal` must be True or False"),
        ({"scale": "x"}, TypeError, "`scale` must be a number"),
        ({"scale": torch.ones(())}, TypeError, "multiply q by a learned scale"),
        ({"scale": float("nan")}, ValueError, "`scale` must be finite"),
    ],
)
def test_flags_and_scales(bad, error, message):
    with pytest.raises(error, match=message):
        adasplash(q, k, v, **bad)


def test_numbers_of_numpy_are_numbers():
    import numpy

    exact = adasplash(q, k, v, 1.5)
    assert torch.equal(adasplash(q, k, v, numpy.float32(1.5)), exact)


def test_modules_name_a_wrong_input():
    for module in (EntmaxAttention(16, 4), LazyAttention(16, 4)):
        with pytest.raises(ValueError, match=r"`x` must have shape \(B, N, 16\)"):
            module(torch.randn(2, 3, 8))
    with pytest.raises(TypeError, match="`module` must be an nn.MultiheadAttention"):
        MultiheadAttention.from_torch(torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match="`name` must be a str"):
        register_transformers(3)


MODULES = [
    (lambda: AlphaParameter(2, init=2.0), "`init` must be in"),
    (lambda: AlphaParameter(2, low=0.9), "`low` must satisfy"),
    (lambda: EntmaxAttention(10, 4), "`d_model` must be a multiple"),
    (lambda: EntmaxAttention(16, 4, n_kv_heads=3), "`n_heads` must be a multiple"),
    (lambda: EntmaxAttention(16, 0), "`n_heads` must be at least 1"),
    (lambda: EntmaxAttention(16, 4, window=0), "`window` must be at least 1"),
    (lambda: EntmaxAttention(16, 4, alpha=3.0, learn_alpha=False), "`alpha` must be in"),
    (lambda: EntmaxAttention(16, 4, alpha=2.0), "learn_alpha=False fixes it"),
    (lambda: AlphaParameter(0), "`n` must be at least 1"),
]


@pytest.mark.parametrize("build, message", MODULES)
def test_modules(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("dtype", "width", "refused"),
    [
        (torch.float32, 129, True),
        (torch.float32, 128, False),
        (torch.bfloat16, 256, False),
        (torch.float64, 8, True),
    ],
)
def test_what_no_kernel_of_nvidia_holds_is_refused_in_words(dtype, width, refused):
    q = torch.zeros(1, 1, 3, width, dtype=dtype)
    with device.pretend(device.Target("cuda", "sm_90", device.SHARED_MEMORY["sm_90"], 132)):
        reason = _ops._too_wide(Attention(q, q, q))
    assert (reason is not None) == refused
    assert not refused or str(dtype)[6:] in reason
