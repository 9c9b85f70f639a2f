"""Rows as a fixed list of operators: the answers of the solver that looks at values."""

import math

import pytest
import torch

from shared_kernels import qexp, rows
from shared_kernels.ops import decompositions
from shared_kernels.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [0.0, 1e-6, 0.15, 0.3, 0.5, 0.6, 0.8, 0.95, 0.999, 1.0])
def test_operators_give_what_the_solver_gives(s, dtype):
    for N in (1, 2, 37, 4096):
        for scale in (0.0, 1e-4, 0.01, 0.1, 1.0, 10.0, 1000.0):  # flat rows take the most steps
            x = (scale * torch.randn(4, N, dtype=torch.float64)).to(dtype)
            x[0, N // 2 :] = -math.inf
            found = rows.in_operators(x, torch.tensor(s, dtype=torch.float64))
            assert found.dtype == dtype
            assert_close(found, qexp.entmax(x.double(), 1 + s))


def test_operators_keep_the_rules_of_rows():
    inf, nan = math.inf, math.nan
    x = torch.tensor([[-inf, -inf, -inf], [nan, 1.0, 2.0], [inf, 1.0, 2.0], [1.0, -inf, 0.0]])
    s = torch.tensor([[0.5], [0.5], [0.5], [1.0]])
    found = rows.in_operators(x, s)
    assert not found[0].any() and found[1:3].isnan().all()
    assert torch.equal(found[3], torch.tensor([1.0, 0.0, 0.0]))
    assert rows.in_operators(torch.ones(2, 0), s[:2]).shape == (2, 0)


def test_the_table_has_the_row_op_beside_torch_s_own():
    table = decompositions()
    assert torch.ops.shared_kernels.entmax.default in table
    assert all(op in table for op in torch.export.default_decompositions())
