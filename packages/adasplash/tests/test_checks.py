"""Bad input gets one clear error that names the argument, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash import AlphaParameter, EntmaxAttention, adasplash, triton_entmax

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
    ({"niter": 0}, ValueError, "`niter` must be at least 1"),
    ({"niter": 2.5}, TypeError, "`niter` must be an int"),
    ({"backend": "cuda"}, ValueError, "`backend` must be one of"),
]  # fmt: skip


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
]


@pytest.mark.parametrize("bad, error, message", ROWS)
def test_rows(bad, error, message):
    with pytest.raises(error, match=message):
        triton_entmax(**bad)


def test_a_named_backend_never_falls_back():
    from shared_kernels import device

    if device.interpreting() or torch.cuda.is_available():
        pytest.skip("Triton can run here")
    with pytest.raises((NotImplementedError, ValueError), match="triton"):
        adasplash(q, k, v, backend="triton")


MODULES = [
    (lambda: AlphaParameter(2, init=2.0), "`init` must be in"),
    (lambda: AlphaParameter(2, low=0.9), "`low` must satisfy"),
    (lambda: EntmaxAttention(10, 4), "`d_model` must be a multiple"),
    (lambda: EntmaxAttention(16, 4, n_kv_heads=3), "`n_heads` must be a multiple"),
    (lambda: EntmaxAttention(16, 0), "`n_heads` must be at least 1"),
]


@pytest.mark.parametrize("build, message", MODULES)
def test_modules(build, message):
    with pytest.raises(ValueError, match=message):
        build()
