"""varlen and blockmask against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_kernels import blockmask, varlen


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_pack_and_unpack_are_inverse(lengths):
    lengths = torch.tensor(lengths)
    padded = torch.randn(len(lengths), 9, 2) * varlen.padding_mask(lengths, 9)[..., None]
    packed = varlen.pack(padded, lengths)
    assert packed.shape[0] == int(lengths.sum())
    assert torch.equal(varlen.unpack(packed, lengths, 9), padded)
    offsets = varlen.lengths_to_cu_seqlens(lengths)
    assert offsets.dtype == torch.int32
    assert torch.equal(varlen.cu_seqlens_to_lengths(offsets).long(), lengths)
    expected = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    assert torch.equal(varlen.sequence_ids(offsets, packed.shape[0]), expected)


def test_bad_lengths_are_named():
    with pytest.raises(
        ValueError, match=r"`varlen` must lie in \[0, N=4\], got values in \[1, 5\]"
    ):
        varlen.check_lengths(torch.tensor([1, 5]), 2, 4)
    with pytest.raises(ValueError, match="`varlen` must have shape"):
        varlen.check_lengths(torch.tensor([1, 2, 3]), 2, 4)
    with pytest.raises(ValueError, match="integer"):
        varlen.check_lengths(torch.tensor([1.0, 2.0]), 2, 4)
    with pytest.raises(ValueError, match="end at 7"):
        varlen.check_cu_seqlens(torch.tensor([0, 3, 6], dtype=torch.int32), 7)
    with pytest.raises(ValueError, match="int32"):
        varlen.check_cu_seqlens(torch.tensor([0, 3, 6]), 6)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))
def test_causal_tiles_are_those_with_a_visible_pair(N_q, N_k, tile_q, tile_k):
    i, j = torch.arange(N_q)[:, None], torch.arange(N_k)[None, :]
    mask = j <= i + N_k - N_q
    found = blockmask.causal(N_q, N_k, tile_q, tile_k)
    assert torch.equal(found, blockmask.from_mask(mask, tile_q, tile_k))


@given(st.integers(0, 2**12 - 1))
def test_lists_hold_each_wanted_tile_in_order(bits):
    mask = torch.tensor([bool(bits >> i & 1) for i in range(12)]).view(3, 4)
    offsets, tiles = blockmask.to_lists(mask)
    for row in range(3):
        expected = mask[row].nonzero().flatten().tolist()
        assert tiles[offsets[row] : offsets[row + 1]].tolist() == expected
    assert blockmask.density(mask).item() == pytest.approx(bits.bit_count() / 12)
