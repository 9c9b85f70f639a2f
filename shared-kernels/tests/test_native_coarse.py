"""Keys found by products of bytes: the same attention as with scores in floats alone."""

from __future__ import annotations

import pytest
import torch

from shared_kernels import native
from shared_kernels.native import library
from shared_kernels.native.attention import Arguments, backward, forward
from shared_kernels.testing.compare import assert_close

from .test_native_attention import assert_like_dense, dense, make

has_bytes = native.why_not() is None and library.multiplies_bytes()
pytestmark = pytest.mark.skipif(not has_bytes, reason="needs AVX-512 with products of bytes")

N = 1300  # rows with a choice of enough tiles, and rows without
COARSE = {
    "noise": make(N_q=N, D=64, is_causal=True),
    "not causal, padded head dim": make(N_q=N, D=20),
    "window": make(N_q=N, D=16, sharp=2.0, window=1200, is_causal=True),
    "groups and sinks": make(
        H=4,
        H_kv=2,
        N_q=N,
        D=16,
        sharp=2.0,
        is_causal=True,
        s_aux=torch.tensor([0.5, 9.0, -2.0, 40.0]),
    ),
    "slopes": make(N_q=N, D=16, sharp=2.0, is_causal=True, slopes=torch.tensor([0.01, 0.001])),
    "negative slopes": make(N_q=N, D=16, sharp=2.0, slopes=torch.tensor([-0.002, 0.0])),
    "lengths": make(B=2, N_q=N, D=16, sharp=2.0, varlen=torch.tensor([N, 1100])),
    "fewer queries than keys": make(N_q=200, N_k=N, D=16, sharp=2.0, is_causal=True),
    "sparsemax and quarters": make(N_q=N, D=16, sharp=2.0, s=torch.tensor([1.0, 0.25])),
}


@pytest.mark.parametrize("name", COARSE)
def test_output_and_gradients_are_those_of_float64(name):
    assert_like_dense(COARSE[name])


@pytest.mark.parametrize("name", COARSE)
def test_coarse_scores_change_roundings_alone(name, monkeypatch):
    out, _ = forward(COARSE[name])
    monkeypatch.setattr(library, "multiplies_bytes", lambda: False)
    plain, _ = forward(COARSE[name])
    assert not torch.equal(out, plain)  # else no key was found by bytes
    assert_close(out, plain)


def changed(a: Arguments, **fields: torch.Tensor) -> Arguments:
    return a._replace(**fields)


@pytest.mark.parametrize("name", ["noise", "slopes", "window"])
def test_a_row_keeps_its_bits(name):
    """Not even a query that is not finite, or keys of one value, move another row."""
    a = COARSE[name]
    out, _ = forward(a)
    kept = 1180
    q, k, v = (x.clone() for x in (a.q, a.k, a.v))
    for x in (q, k, v):
        x[:, :, kept:] = 30 * x[:, :, kept:].flip(-1)
    assert torch.equal(forward(changed(a, q=q, k=k, v=v))[0][:, :, :kept], out[:, :, :kept])
    short = changed(a, q=a.q[:, :, :kept], k=a.k[:, :, :kept], v=a.v[:, :, :kept])
    assert torch.equal(forward(short)[0], out[:, :, :kept])
    for value in (torch.nan, torch.inf, 0.0, 1e-30, 1e25):
        q = a.q.clone()
        q[:, :, 1250] = value
        again, _ = forward(changed(a, q=q))
        others = torch.arange(N) != 1250
        assert torch.equal(again[:, :, others], out[:, :, others]), value
        assert torch.isnan(again[:, :, 1250]).all() == (value != value or value > 1e30)


@pytest.mark.parametrize("name", ["noise", "slopes", "window", "not causal, padded head dim"])
@pytest.mark.parametrize(
    "first, last", [(N - 1, N), (N - 5, N), (N - 96, N), (N - 203, N), (640, 641), (1001, 1100)]
)
def test_a_row_keeps_its_bits_among_other_queries(name, first, last):
    """Queries first .. last alone, as the last ones of their keys where the call is causal."""
    a = COARSE[name]
    out, _ = forward(a)
    keys = last if a.is_causal else N
    part = changed(a, q=a.q[:, :, first:last], k=a.k[:, :, :keys], v=a.v[:, :, :keys])
    assert torch.equal(forward(part)[0], out[:, :, first:last])


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_a_tile_without_coarse_scores_is_scored_in_floats(value):
    """Of keys that are not finite, or all zero."""
    a = COARSE["noise"]
    k = a.k.clone()
    k[:, :, 128:192] = value
    sees_it = torch.arange(N) >= 128
    a = changed(a, k=k)
    out, kept = forward(a)
    assert torch.isnan(out[:, :, sees_it]).all() == (value != value)
    if value == value:
        exact = dense(changed(a, q=a.q.double(), k=a.k.double(), v=a.v.double()))
        assert_close(out, exact)
        gradients = backward(a, kept, torch.ones_like(out))
        assert all(torch.isfinite(x).all() for x in gradients[:3])


def test_a_key_that_differs_by_less_than_its_rounding_is_told_apart():
    """Two keys per query that bytes cannot tell apart, with scores a hundredth apart."""
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(1, 1, N, 64, generator=generator)
    k[:, :, 1::2] = k[:, :, ::2] * (1 + 1e-4)
    a = make(H=1, N_q=N, D=64, sharp=3.0)._replace(k=k)
    assert_like_dense(a)
