"""Decoding over pages is decoding over everything, and says what it may not read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash import (
    PagedCache,
    _ops,
    _paged_torch,
    adasplash,
    decode_stats,
    entmax_decode,
    explain,
)
from adasplash.paged import paged_call
from shared_kernels import dispatch, native, pages
from shared_kernels.testing import assert_close, assert_no_worse, contracts, pairwise
from shared_kernels.testing.defaults import each_default
from shared_kernels.testing.instructions import each_instruction_set

BACKENDS = ["torch", *(["native"] if native.why_not() is None else [])]
instructions = each_instruction_set()


@pytest.fixture(autouse=True)
def bounds_from_the_first_page(monkeypatch):
    """Short sequences, too, are read by their bounds."""
    monkeypatch.setattr(_paged_torch, "_SHORT", 1)


def clustered(B, H_kv, N, D, noise=0.1, run=16):
    """Runs of keys around a centre of each."""
    centres = torch.randn(B, H_kv, -(-N // run), D, dtype=torch.float64)
    keys = centres.repeat_interleave(run, 2)[:, :, :N]
    return 2 * keys + noise * torch.randn(B, H_kv, N, D, dtype=torch.float64)


def filled(
    lengths, H_kv=2, D=16, D_v=8, size=16, dtype=torch.float32, n_pages=None, keys=clustered
):
    """A cache of sequences that grew in turns, and their keys and values."""
    n_pages = sum(-(-n // size) for n in lengths) + 2 if n_pages is None else n_pages
    cache = PagedCache(n_pages, H_kv, D, D_v, page_size=size, dtype=dtype)
    whole = [
        (keys(1, H_kv, n, D).to(dtype), torch.randn(1, H_kv, n, D_v).to(dtype)) for n in lengths
    ]
    for k, v in whole:
        cache.add(k[:, :, : k.shape[2] // 2], v[:, :, : k.shape[2] // 2])
    for sequence, (k, v) in zip(cache.sequences, whole, strict=True):
        cache.append(k[:, :, k.shape[2] // 2 :], v[:, :, k.shape[2] // 2 :], [sequence])
    return cache, whole


OPTIONS = {
    "plain": {},
    "sparsemax": {"alpha": 2.0},
    "near softmax": {"alpha": 1.05},
    "softmax": {"alpha": 1.0},
    "per head": {"alpha": torch.tensor([1.0, 1.3, 1.5, 2.0])},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.01, 0.0, -0.02])},
    "window": {"window": 40},
    "scale": {"scale": -0.7},
    "sinks": {"s_aux": torch.tensor([2.0, -1.0, 30.0, 0.0])},
    "softcap": {"softcap": 0.8},
    "length scale": {"length_scale": torch.tensor([0.7, 0.3, 1.2])},
    "length scales": {"length_scale": torch.rand(4, 3)},
    "all": {
        "alpha": torch.tensor([1.5, 1.5, 1.7, 1.5]),
        "window": 70,
        "alibi_slopes": torch.tensor([0.1, 0.01, 0.0, 0.3]),
        "softcap": 5.0,
        "s_aux": torch.tensor([2.0, -1.0, 0.5, 0.0]),
        "length_scale": torch.tensor([0.7, 0.3, 1.2]),
    },
}


@pairwise(backend=[*BACKENDS, "reference"], n=[1, 35], name=OPTIONS)
def test_it_is_the_end_of_the_whole(name, n, backend):
    torch.manual_seed(0)
    cache, whole = filled([110, 0, 47, 3, 141])
    q, options = torch.randn(5, 4, n, 16), OPTIONS[name]
    out = entmax_decode(q, cache, **options, backend=backend)
    assert dispatch.last("adasplash::paged_decode") == backend
    for b, (k, v) in enumerate(whole):
        wide = (x.double() for x in (q[b : b + 1], k, v))
        expected = adasplash(
            *wide, is_causal=True, **{"alpha": 1.5, **options}, backend="reference"
        )
        assert_close(out[b : b + 1], expected)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_and_size_of_page(size, dtype, backend):
    torch.manual_seed(0)
    cache, [(k, v)] = filled([700], dtype=dtype, size=size)
    q = torch.randn(1, 4, 2, 16, dtype=dtype)
    if backend == "native" and dtype != torch.float32:
        with pytest.raises(NotImplementedError, match="takes fp32, got"):
            entmax_decode(q, cache, backend=backend)
        return
    out = entmax_decode(q, cache, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    exact = adasplash(*wide, is_causal=True, backend="reference")
    if dtype in (torch.float32, torch.float64):
        assert_close(out, exact)
    else:
        eager = adasplash(q, k, v, is_causal=True, backend="reference")
        assert_no_worse(out, eager=eager, exact=exact, factor=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_pages_are_read_where_keys_lie_in_clusters(backend):
    torch.manual_seed(0)
    cache, [(k, v)] = filled([4096], D=32)
    q = k.repeat_interleave(2, 1)[:, :, -1:]
    stats = decode_stats(q, cache, backend=backend)
    assert stats.pages_held.tolist() == [256] and bool((stats.pages_read <= 64).all())
    assert stats.bytes_read < 0.6 * stats.bytes_held and "of the pages read" in str(stats)
    assert bool((stats.tightness > 0).all())
    read = PagedCache(258, 2, 32, 8, page_size=16)
    read.add(k, v)
    everything = decode_stats(0 * q, read, backend=backend)
    assert everything.pages_read.tolist() == [[256, 256]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_needs_everything_leaves_the_others_alone(backend):
    torch.manual_seed(0)
    cache, [(k, v)] = filled([4096], H_kv=3, D=32)
    q = k[:, :, -1:].clone()
    q[:, 1] = 0
    stats = decode_stats(q, cache, backend=backend)
    assert stats.pages_read[0, 1] == 256 and bool((stats.pages_read[0, ::2] < 64).all())
    wide = (x.double() for x in (q, k, v))
    assert_close(entmax_decode(q, cache), adasplash(*wide, backend="reference"))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("D, D_v", [(1, 1), (7, 20), (40, 33), (256, 256)])
def test_every_instruction_set(D, D_v):
    torch.manual_seed(0)
    cache, [(k, v), (k2, v2)] = filled([333, 15], D=D, D_v=D_v)
    q, slopes = torch.randn(2, 2, 1, D), torch.tensor([0.0, 0.1])
    for options in ({}, {"alpha": 1.7, "alibi_slopes": slopes, "window": 100}):
        out = entmax_decode(q, cache, **options, backend="native")
        for b, tensors in enumerate(((k, v), (k2, v2))):
            wide = (x.double() for x in (q[b : b + 1], *tensors))
            exact = adasplash(
                *wide, is_causal=True, **{"alpha": 1.5, **options}, backend="reference"
            )
            assert_close(out[b : b + 1], exact)


def test_native_threads_change_nothing():
    torch.manual_seed(0)
    cache, _ = filled([700, 90, 3000], H_kv=4)
    q, before = torch.randn(3, 4, 1, 16), torch.get_num_threads()
    one = entmax_decode(q, cache)
    try:
        torch.set_num_threads(4)
        assert torch.equal(entmax_decode(q, cache), one)
    finally:
        torch.set_num_threads(before)


def test_a_row_owes_nothing_to_the_others():
    torch.manual_seed(0)
    cache, _ = filled([700, 90, 300], H_kv=2)
    q = torch.randn(3, 2, 1, 16)
    together = entmax_decode(q, cache)
    for b in range(3):
        alone = entmax_decode(q[b : b + 1], cache, sequences=[cache.sequences[b]])
        assert torch.equal(together[b], alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_score_is_above_the_bound_of_its_page(dtype, data):
    D, scale = data.draw(st.sampled_from([1, 3, 64])), data.draw(st.sampled_from([1e-6, 1.0, 1e3]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    keys = (scale * torch.randn(5, 16, D)).to(dtype)
    keys[0] = keys[0, :1]  # one key sixteen times: the bound is its score
    q = torch.randn(7, D, dtype=torch.promote_types(dtype, torch.float32))
    upper = pages.corners(q) @ pages.bounds_of(keys).mT
    for score in (keys.to(q.dtype) @ q.mT, (keys.to(q.dtype)[..., None, :] * q).sum(-1)):
        assert bool((score.amax(1) <= upper.mT).all())
        assert bool((score.double().amax(1) <= upper.mT.double()).all())


# --- the cache against a plain list of tensors --------------------------------------------------


class Model:
    """The same cache as a dictionary of tensors."""

    def __init__(self):
        self.cache = PagedCache(14, 1, 8, page_size=16)
        self.lists = {}

    def step(self, what, which, n):
        k, v = torch.randn(2, 1, 1, n, 8)
        if what == "add" or not self.lists:
            [new] = self.cache.add(k, v)
            assert new not in self.lists
            self.lists[new] = (k, v)
            return
        sequence = sorted(self.lists)[which % len(self.lists)]
        if what == "append":
            self.cache.append(k, v, [sequence])
            old = self.lists[sequence]
            self.lists[sequence] = tuple(torch.cat(x, 2) for x in zip(old, (k, v), strict=True))
        elif what == "fork":
            self.lists[self.cache.fork(sequence)] = self.lists[sequence]
        else:
            self.cache.free(sequence)
            del self.lists[sequence]

    def check(self):
        cache = self.cache
        assert cache.sequences == tuple(self.lists)
        assert cache.lengths.tolist() == [k.shape[2] for k, _ in self.lists.values()]
        held = {page for row in cache.block_table().tolist() for page in row if page >= 0}
        assert cache.n_free == 14 - len(held)
        if not self.lists:
            return
        q = torch.randn(len(self.lists), 2, 1, 8)
        out = entmax_decode(q, cache)
        for b, (k, v) in enumerate(self.lists.values()):
            assert_close(out[b : b + 1], adasplash(q[b : b + 1], k, v, is_causal=True))


STEPS = st.tuples(
    st.sampled_from(["add", "append", "append", "append", "fork", "fork", "free"]),
    st.integers(0, 5),
    st.integers(0, 40),
)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(STEPS, max_size=12))
def test_any_history_leaves_what_a_list_of_tensors_holds(steps):
    torch.manual_seed(0)
    model = Model()
    for step in steps:
        before = (model.cache.sequences, model.cache.lengths.tolist(), model.cache.n_free)
        try:
            model.step(*step)
        except ValueError as error:
            assert "free pages for this" in str(error)
            after = (model.cache.sequences, model.cache.lengths.tolist(), model.cache.n_free)
            assert after == before
        model.check()


def test_a_sequence_alone_lies_side_by_side_and_two_keep_apart():
    cache = PagedCache(16, 1, 4, page_size=16)
    cache.add(*torch.randn(2, 1, 1, 256, 4))
    assert cache.block_table().tolist() == [list(range(16))]
    cache = PagedCache(16, 1, 4, page_size=16)
    cache.add(*torch.randn(2, 2, 1, 16, 4))
    for _ in range(7):
        cache.append(*torch.randn(2, 2, 1, 16, 4))
    assert cache.block_table().diff().eq(1).all()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_nan_key_harms_only_the_rows_that_may_see_it(backend):
    torch.manual_seed(0)
    cache, whole = filled([300, 200])
    q = torch.randn(2, 4, 3, 16)
    clean = entmax_decode(q, cache, window=100, backend=backend)
    page = int(cache.block_table()[0, 12])  # tokens 192 to 207 of the first sequence
    k, v = (x.clone() for x in whole[0])
    k[0, 1, 198] = torch.nan  # the query at 297 sees it, those at 298 and 299 do not
    dirty = PagedCache(40, 2, 16, 8, page_size=16)
    dirty.add(k, v), dirty.add(*whole[1])
    assert bool(dirty.bounds[1].isnan().any()) and not bool(dirty.bounds[0].isnan().any())
    out = entmax_decode(q, dirty, window=100, backend=backend)
    assert page >= 0 and bool(out[0, 2:, 0].isnan().all())
    out[0, 2:, 0] = clean[0, 2:, 0]
    assert_close(out, clean.double())
    everywhere = entmax_decode(q, dirty, backend=backend)
    assert bool(everywhere[0, 2:].isnan().all())
    assert not bool(everywhere[0, :2].isnan().any()) and not bool(everywhere[1].isnan().any())


def test_values_of_no_weight_are_not_read_and_infinities_are_not_lost():
    torch.manual_seed(0)
    cache, [(k, v)] = filled([400])
    q = torch.randn(1, 4, 1, 16)
    for value in (torch.inf, -torch.inf):
        k = k.clone()
        k[0, 0, 77, 3] = value
        mixed = PagedCache(30, 2, 16, 8, page_size=16)
        mixed.add(k, v)
        ours, plain = entmax_decode(q, mixed), adasplash(q, k, v, is_causal=True, backend="torch")
        assert_close(ours.nan_to_num(7.0), plain.nan_to_num(7.0).double())
        k = torch.where(k.isfinite(), k, 0.0)


def test_what_is_refused():
    cache, _ = filled([40, 30])
    q = torch.randn(2, 4, 1, 16)
    with pytest.raises(ValueError, match=r"`block_table` must name pages in \[0, 7\).*got 7"):
        entmax_decode(
            q,
            cache,
            lengths=torch.tensor([40, 30]),
            block_table=torch.tensor([[0, 7, 1], [1, 2, 3]]),
        )
    with pytest.raises(ValueError, match=r"`block_table` must name pages .*got -1"):
        entmax_decode(
            q,
            cache,
            lengths=torch.tensor([40, 30]),
            block_table=torch.tensor([[0, 1, -1], [1, 2, 3]]),
        )
    table, lengths = cache.lookup()
    first, second = cache.sequences
    mine = entmax_decode(q, cache, lengths=lengths, block_table=table)
    assert torch.equal(mine, entmax_decode(q, cache))
    with pytest.raises(ValueError, match="end within the tokens of each page"):
        entmax_decode(q, cache, lengths=lengths + 1, block_table=table)
    with pytest.raises(ValueError, match=r"`lengths` must be in \[0, 48\]"):
        entmax_decode(q, cache, lengths=lengths + 10, block_table=table)
    cache.free(second)
    with pytest.raises(ValueError, match="name pages that a sequence holds, got .*, freed"):
        entmax_decode(q, cache, lengths=lengths, block_table=table)
    with pytest.raises(ValueError, match="`sequences` .* got 1, which was freed"):
        entmax_decode(q, cache, sequences=[first, second])
    with pytest.raises(ValueError, match="`sequences` .* got 9, which was never made"):
        cache.append(*torch.randn(2, 1, 2, 1, 16), [9])
    with pytest.raises(ValueError, match="block_table"):
        entmax_decode(q, cache, lengths=lengths)
    with pytest.raises(ValueError, match=r"`q` must have shape \(B, H, n, D=16\)"):
        entmax_decode(q[..., :8], cache)
    with pytest.raises(ValueError, match=r"`block_table` must have shape \(B=2, pages\)"):
        entmax_decode(q, cache)
    with pytest.raises(ValueError, match="dtype"):
        entmax_decode(q[:1].double(), cache)
    with pytest.raises(ValueError, match="`v_cache` must be None"):
        entmax_decode(q, cache, q)
    with pytest.raises(TypeError, match="`lengths` must be a tensor"):
        entmax_decode(q, q, q)
    with pytest.raises(ValueError, match="`sequences` must come with a PagedCache"):
        entmax_decode(q, q, q, torch.tensor([1, 1]), sequences=[0])
    with pytest.raises(ValueError, match="`page_size` must be one of"):
        PagedCache(3, 1, 4, page_size=20)
    with pytest.raises(ValueError, match="`keys` must need no gradient"):
        cache.append(*torch.randn(2, 1, 2, 1, 16, requires_grad=True))
    with pytest.raises(ValueError, match="have 9 free pages for this, got 4"):
        cache.add(torch.randn(1, 2, 140, 16), torch.randn(1, 2, 140, 8))


def test_a_gradient_is_refused():
    cache, _ = filled([40])
    with pytest.raises((RuntimeError, NotImplementedError), match="paged_decode"):
        entmax_decode(torch.randn(1, 4, 1, 16, requires_grad=True), cache).sum().backward()


class TestPagedDecodeOp(contracts.OpContract):
    op = staticmethod(_ops.paged_decode.overload)

    def samples(self):
        found = []
        for name in ("plain", "all"):
            cache, _ = filled([110, 0, 47])
            found.append(paged_call(torch.randn(3, 4, 2, 16), cache, **OPTIONS[name]))
        return found


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_it_maps_over_queries_of_one_cache(backend):
    torch.manual_seed(0)
    cache, _ = filled([5000, 90])
    q = torch.randn(3, 2, 4, 1, 16)
    mapped = torch.vmap(lambda x: entmax_decode(x, cache, backend=backend))(q)
    for found, x in zip(mapped, q, strict=True):
        assert torch.equal(found, entmax_decode(x, cache, backend=backend))


def test_a_table_out_of_range_is_refused_by_the_op_before_anything_is_read():
    cache, _ = filled([110, 47])
    call = paged_call(torch.randn(2, 4, 1, 16), cache)
    wrong = call.table.clone()
    wrong[1, 0] = cache.keys.shape[1]
    with pytest.raises(ValueError, match="`block_table` must name pages"):
        call._replace(table=wrong).check()
    with pytest.raises(ValueError, match="`lengths` must be in"):
        call._replace(lengths=call.lengths + 1000).check()


def test_explain_names_the_op():
    cache, _ = filled([40])
    assert "adasplash::paged_decode" in explain(entmax_decode, torch.randn(1, 4, 1, 16), cache)


def test_two_runs_same_bits_and_nothing_is_written():
    cache, _ = filled([400, 90])
    q, before = torch.randn(2, 4, 3, 16), [x.clone() for x in (cache.keys, cache.values)]
    assert torch.equal(entmax_decode(q, cache), entmax_decode(q, cache))
    assert torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])


@each_default()
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_defaults_change_no_result(default, backend):
    cache, whole = filled([40, 9])
    q = torch.randn(2, 4, 1, 16)
    exact = entmax_decode(q, cache, backend=backend)
    with default():
        again = PagedCache(8, 2, 16, 8, page_size=16, dtype=torch.float32, device="cpu")
        for k, v in whole:
            again.add(k, v)
        found = entmax_decode(q, again, backend=backend)
        table, lengths = again.lookup()
        of_table = entmax_decode(q, again, lengths=lengths, block_table=table, backend=backend)
    assert torch.equal(found, exact) and torch.equal(of_table, exact)
