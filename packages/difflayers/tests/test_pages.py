"""Certified retrieval is retrieval, and reads few patterns where they lie in clusters."""

from __future__ import annotations

import pytest
import torch

from difflayers import PatternPages, retrieve
from shared_kernels.testing import assert_close


def clustered(N, d, dtype=torch.float32, clusters=40):
    torch.manual_seed(0)
    centres = torch.randn(clusters, d, dtype=torch.float64)
    which = torch.randint(0, clusters, (N,))
    return (centres[which] + 0.1 * torch.randn(N, d, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("separation", ["entmax15", "sparsemax"])
@pytest.mark.parametrize("N", [0, 1, 63, 65, 1000, 9000])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_retrieval(separation, N, steps):
    memory, query = clustered(N, 16), torch.randn(70, 16)
    options = {"beta": 2.0, "steps": steps, "separation": separation}
    exact = retrieve(memory.double(), query.double(), **options)
    for certified in (True, PatternPages(memory, page_size=16)):
        found = retrieve(memory, query, **options, certified=certified)
        assert_close(found.patterns, exact.patterns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype):
    memory = clustered(3000, 8, dtype)
    options = {"beta": 8.0, "steps": 1, "separation": "sparsemax"}
    found = retrieve(memory, memory[:5], **options, certified=True)
    exact = retrieve(memory.double(), memory[:5].double(), **options)
    assert found.patterns.dtype == dtype
    assert_close(found.patterns, exact.patterns)


def test_every_pattern_lies_in_one_page_and_few_are_read():
    memory = clustered(20_000, 32)
    held = PatternPages(memory)
    there = held.order[held.order >= 0]
    assert torch.equal(there.sort().values, torch.arange(len(memory)))
    assert held.order.shape[1] <= 64
    reading = held.update(memory[::4000], beta=4.0)
    assert bool((reading.pages_read < 0.1 * len(held.order)).all())
    flat = held.update(0 * memory[:1], beta=4.0)
    assert flat.pages_read.tolist() == [len(held.order)]
    assert_close(flat.patterns[0], memory.double().mean(0))


def test_a_retrieval_from_pages_that_are_there_does_not_read_the_memory():
    """A memory of NaN in the place of the one that the pages were made of changes nothing."""
    memory = clustered(9000, 16)
    held, options = PatternPages(memory), {"beta": 4.0, "separation": "entmax15"}
    assert_close(held.longest, torch.linalg.vector_norm(memory.double(), dim=-1).amax())
    query = memory[:3].clone()
    before = retrieve(memory, query, **options, certified=held)
    exact = retrieve(memory.double(), query.double(), **options)
    assert_close(before.patterns, exact.patterns)
    found = retrieve(memory.fill_(torch.nan), query, **options, certified=held)
    assert torch.equal(found.steps, before.steps)
    assert torch.equal(found.patterns, before.patterns)


@pytest.mark.parametrize("separation", ["entmax15", "sparsemax"])
def test_the_pattern_that_is_retrieved_is_that_of_the_largest_score(separation):
    memory = torch.nn.functional.normalize(clustered(9000, 24), dim=-1)
    query = memory[::900] + 1e-3 * torch.randn(10, 24)
    found = retrieve(memory, query, 1e6, 1, separation=separation, certified=True).patterns
    assert_close(found, memory[(query @ memory.mT).argmax(1)].double())


def test_a_nan_pattern_is_seen_by_every_query_and_a_nan_query_harms_itself():
    memory = clustered(2000, 8)
    query = memory[:3].clone()
    query[1] = torch.nan
    found = retrieve(memory, query, 2.0, 1, separation="entmax15", certified=True).patterns
    assert found.isnan().all(1).tolist() == [False, True, False]
    memory[77, 2] = torch.nan
    found = retrieve(memory, query, 2.0, 1, separation="entmax15", certified=True).patterns
    assert bool(found.isnan().all())


def test_what_is_refused():
    memory = torch.randn(100, 4)
    with pytest.raises(ValueError, match="`separation` must be one of 'entmax15', 'sparsemax'"):
        retrieve(memory, memory[:1], certified=True)
    with pytest.raises(ValueError, match="pages of this memory"):
        retrieve(memory, memory[:1], separation="sparsemax", certified=PatternPages(memory[:9]))
    with pytest.raises(ValueError, match="`memory` must have shape"):
        retrieve(memory[None], memory[:1], separation="sparsemax", certified=True)
    with pytest.raises(ValueError, match="`query` must need no gradient"):
        query = memory[:1].clone().requires_grad_()
        retrieve(memory, query, separation="sparsemax", certified=True)
    with pytest.raises(TypeError, match="`certified` must be True or False"):
        retrieve(memory, memory[:1], separation="sparsemax", certified=3)
