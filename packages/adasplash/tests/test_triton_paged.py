"""The kernels of decoding over pages, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from adasplash import PagedCache, _ops, adasplash, decode_stats, entmax_decode
from adasplash.paged import paged_call
from shared_kernels import dispatch
from shared_kernels.testing import assert_close, assert_no_worse

from .kernels import WHERE, nothing_unwritten, pytestmark  # noqa: F401
from .test_paged import OPTIONS, clustered


def filled(lengths, H_kv=2, D=16, D_v=8, size=16, dtype=torch.float32, **options):
    cache = PagedCache(
        sum(-(-n // size) for n in lengths) + 1,
        H_kv,
        D,
        D_v,
        page_size=size,
        dtype=dtype,
        device=WHERE,
    )
    whole = []
    for n in lengths:
        k, v = clustered(1, H_kv, n, D, **options), torch.randn(1, H_kv, n, D_v)
        whole.append((k.to(WHERE, dtype), v.to(WHERE, dtype)))
        cache.add(*whole[-1])
    return cache, whole


def on_device(options):
    return {k: x.to(WHERE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("n", [1, 11])
def test_it_is_the_end_of_the_whole(name, n):
    torch.manual_seed(0)
    cache, whole = filled([40, 0, 3])
    q, options = torch.randn(3, 4, n, 16, device=WHERE), on_device(OPTIONS[name])
    out = entmax_decode(q, cache, **options, backend="triton")
    assert dispatch.last("adasplash::paged_decode") == "triton"
    for b, (k, v) in enumerate(whole):
        wide = (x.double() for x in (q[b : b + 1], k, v))
        expected = adasplash(
            *wide, is_causal=True, **{"alpha": 1.5, **options}, backend="reference"
        )
        assert_close(out[b : b + 1], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size, D, D_v", [(16, 16, 8), (64, 40, 20)])
def test_half_types_and_pages_of_several_tiles(dtype, size, D, D_v):
    torch.manual_seed(0)
    cache, [(k, v)] = filled([100], D=D, D_v=D_v, size=size, dtype=dtype)
    q = torch.randn(1, 4, 2, D, dtype=dtype, device=WHERE)
    out = entmax_decode(q, cache, backend="triton")
    exact = adasplash(*(x.double() for x in (q, k, v)), is_causal=True, backend="reference")
    eager = adasplash(q, k, v, is_causal=True, backend="reference")
    assert_no_worse(out, eager=eager, exact=exact, factor=2.0)


def test_wide_heads_are_refused_with_a_reason():
    cache, _ = filled([20], D=136)
    with pytest.raises(NotImplementedError, match="head dims up to 128, got 136"):
        entmax_decode(torch.randn(1, 2, 1, 136, device=WHERE), cache, backend="triton")


def test_float64_is_refused_with_a_reason():
    cache, _ = filled([20], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        entmax_decode(
            torch.randn(1, 2, 1, 16, dtype=torch.float64, device=WHERE), cache, backend="triton"
        )


def test_few_pages_are_read_where_keys_lie_in_clusters():
    torch.manual_seed(0)
    cache, [(k, v)] = filled([640], H_kv=1, D=32)
    q = 2 * k[:, :, -1:]
    stats = decode_stats(q, cache, backend="triton")
    assert stats.pages_held.tolist() == [40] and int(stats.pages_read) <= 16
    expected = adasplash(*(x.double() for x in (q, k, v)), backend="reference")
    assert_close(entmax_decode(q, cache, backend="triton"), expected)
    flat = decode_stats(0 * q, cache, backend="triton")
    assert flat.pages_read.tolist() == [[40]]


def test_a_nan_key_harms_only_the_rows_that_may_see_it():
    torch.manual_seed(0)
    cache, [(k, v)] = filled([80])
    q = torch.randn(1, 4, 3, 16, device=WHERE)
    clean = entmax_decode(q, cache, window=40, backend="triton")
    k[0, 1, 38] = torch.nan  # the query at 77 sees it, those at 78 and 79 do not
    dirty = PagedCache(6, 2, 16, 8, page_size=16, device=WHERE)
    dirty.add(k, v)
    out = entmax_decode(q, dirty, window=40, backend="triton")
    assert bool(out[0, 2:, 0].isnan().all())
    out[0, 2:, 0] = clean[0, 2:, 0]
    assert_close(out, clean.double())


def test_the_op_takes_a_table_with_nothing_in_it():
    cache, _ = filled([0])
    call = paged_call(torch.randn(1, 2, 1, 16, device=WHERE), cache)
    out, read = _ops.paged_decode(call, "triton")
    assert bool((out == 0).all()) and read.tolist() == [[0, 0]]
