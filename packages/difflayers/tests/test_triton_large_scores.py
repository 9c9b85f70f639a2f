"""Scores of any size in the kernels: what ``test_large_scores.py`` asks of the torch backend."""

from __future__ import annotations

import pytest
import torch

from shared_kernels import device
from shared_kernels.testing import others_thorough, poisoned_empty

from .test_large_scores import SIZES, check

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
# What leaves an absolute threshold no digit in fp32; under --thorough the other sizes, too.
LARGE_FIRST = others_thorough(sorted(SIZES, key=lambda size: size != 1e8))


@pytest.mark.parametrize("size", LARGE_FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_neighbour_attention(scale, dtype, size):
    with poisoned_empty():
        check(size, dtype, scale, "triton", WHERE)
