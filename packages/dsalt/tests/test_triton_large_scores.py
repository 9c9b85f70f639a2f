"""Scores of any size in the kernels: what ``test_large_scores.py`` asks of the other backends."""

from __future__ import annotations

import pytest
import torch

from shared_kernels import device
from shared_kernels.testing import others_thorough, pairwise, poisoned_empty

from .test_large_scores import OPTIONS, SIZES, check

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
# What leaves an absolute threshold no digit in fp32; under --thorough the other sizes, too.
LARGE_FIRST = others_thorough(sorted(SIZES, key=lambda size: size != 1e8))


@pairwise(dtype=(torch.float32, torch.bfloat16), size=LARGE_FIRST, option=OPTIONS)
def test_attention(dtype, size, option):
    with poisoned_empty():
        check(option, size, dtype, "triton", WHERE)
