"""Pages that were not read cannot hold a weight."""

from __future__ import annotations

import doctest

import pytest
import torch

from shared_kernels import pages, qexp
from shared_kernels.testing import assert_close

SIZE = 16


def problem(heads, R, P, D, sharp=3.0, dtype=torch.float64):
    torch.manual_seed(0)
    centres = torch.randn(heads, P, 1, D, dtype=dtype)
    keys = centres + 0.1 * torch.randn(heads, P, SIZE, D, dtype=dtype)
    q = sharp * torch.randn(heads, R, D, dtype=dtype)
    return q, keys, torch.bmm(pages.corners(q), pages.bounds_of(keys).mT)


def certified(q, keys, upper, s, hidden=None):
    scores = torch.einsum("hrd,hpjd->hrpj", q, keys)
    if hidden is not None:
        scores = scores.masked_fill(hidden[..., None], -torch.inf)

    def read(which):
        index = which[:, None, :, None].expand(-1, q.shape[1], -1, SIZE)
        return scores.gather(2, index).flatten(2)

    found = pages.certify(upper, s, SIZE, read, lambda x: qexp.normalize(x, s))
    whole = qexp.normalize(scores.flatten(2), s)[0].unflatten(-1, (-1, SIZE))
    index = found.pages[:, None, :, None].expand(-1, q.shape[1], -1, SIZE)
    placed = torch.zeros_like(whole).scatter_(2, index, found.weights.unflatten(-1, (-1, SIZE)))
    return found, placed, whole


@pytest.mark.parametrize("s", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("R", [1, 3])
def test_the_weights_are_those_of_reading_everything(s, R):
    q, keys, upper = problem(3, R, 400, 8)
    found, placed, whole = certified(q, keys, upper, s)
    assert not bool(found.is_dense.any()) and found.pages.shape[1] < 200
    assert_close(placed, whole)
    assert all(len(set(row)) == len(row) for row in found.pages.tolist())


def test_rows_that_see_nothing_or_a_nan():
    q, keys, upper = problem(1, 3, 400, 8)
    hidden = torch.zeros(1, 3, 400, dtype=torch.bool)
    hidden[0, 0] = True
    upper = upper.masked_fill(hidden, -torch.inf)
    upper[0, 1, 7] = torch.nan  # nothing is known of that page: it is read
    found, placed, whole = certified(q, keys, upper, 0.5, hidden)
    assert 7 in found.pages[0].tolist()
    assert_close(placed, whole)
    assert bool((placed[0, 0] == 0).all())


def test_bounds_that_do_not_separate_are_said_to():
    q, keys, upper = problem(2, 1, 400, 8)
    q[1], upper[1] = 0, 0
    found, placed, whole = certified(q, keys, upper, 0.5)
    assert found.is_dense.tolist() == [False, True]
    assert_close(placed[0], whole[0])


def test_a_bound_without_keys_is_that_of_no_score():
    bounds = pages.empty_bounds(2, head_dim=3, dtype=torch.float32, device=torch.device("cpu"))
    low, high = pages.outwards(torch.ones(2, 3))
    grown = torch.cat((torch.maximum(bounds[:, :3], high), torch.minimum(bounds[:, 3:], low)), -1)
    assert torch.equal(grown, torch.cat((high, low), -1))
    assert bool((high > 1).all()) and bool((low < 1).all())


def test_docstring_examples():
    found = doctest.testmod(pages, extraglobs={"torch": torch})
    assert found.attempted and not found.failed
