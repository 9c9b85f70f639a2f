"""Lists of tiles against the mask that they list."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_kernels import blockmask


@given(st.integers(0, 2**12 - 1))
def test_lists_hold_each_wanted_tile_in_order(bits):
    mask = torch.tensor([bool(bits >> i & 1) for i in range(12)]).view(3, 4)
    offsets, tiles = blockmask.to_lists(mask)
    for row in range(3):
        expected = mask[row].nonzero().flatten().tolist()
        assert tiles[offsets[row] : offsets[row + 1]].tolist() == expected


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0)])
def test_lists_of_no_tiles(shape):
    offsets, tiles = blockmask.to_lists(torch.zeros(shape, dtype=torch.bool))
    assert offsets.shape == (*shape[:-2], shape[-2] + 1)
    assert not offsets.any()
    assert tiles.shape == (*shape[:-2], 0)


def test_a_partial_tile_counts():
    assert [blockmask.n_tiles(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
