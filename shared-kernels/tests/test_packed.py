"""Packed sequences against loops, and what their offsets may be."""

from __future__ import annotations

import pytest
import torch

from shared_kernels import packed


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [4], [0, 0, 2], [0], []])
def test_offsets_lengths_and_segments_agree(counts: list[int], dtype: torch.dtype) -> None:
    varlen = torch.tensor(counts, dtype=dtype)
    offsets = packed.from_lengths(varlen)
    N = sum(counts)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
    packed.check(offsets, N)
    assert packed.lengths(offsets).tolist() == counts
    expected = [i for i, n in enumerate(counts) for _ in range(n)]
    assert packed.segment_ids(offsets, N).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "values", [[0, 3], [1, 5], [0, 6], [0, 3, 2, 5], [0, -1, 5], [0], [5], [-1, 5]]
)
def test_offsets_that_do_not_divide_the_tokens_are_refused(
    values: list[int], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=r"`ends` must start at 0, never fall and end at N=5"):
        packed.check(torch.tensor(values, dtype=dtype), 5, "ends")


def test_shapes_and_types_of_offsets() -> None:
    for wrong in (torch.tensor([0.0, 5.0]), torch.tensor([False, True]), [0, 5]):
        with pytest.raises(TypeError, match="`cu_seqlens` must be"):
            packed.check(wrong, 5)
    for shape in ((0,), (1, 2), ()):
        with pytest.raises(ValueError, match=r"`cu_seqlens` must have shape \(sequences \+ 1,\)"):
            packed.check(torch.zeros(shape, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="a batch of one packed row, got B=2"):
        packed.check(torch.tensor([0, 5]), 5, B=2)
    with pytest.raises(ValueError, match="as many queries as keys, got N_q=1 and N_k=5"):
        packed.check(torch.tensor([0, 5]), 5, N_q=1)


def test_values_are_not_read_where_there_are_none() -> None:
    packed.check(torch.tensor([0, 3], device="meta"), 5)
    torch.vmap(lambda ends: packed.check(ends, 5) or ends)(torch.tensor([[0, 3]]))
