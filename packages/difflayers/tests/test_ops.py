import torch

from difflayers import _ops
from shared_kernels.testing import contracts

from .cases import randn


def _symmetric():
    A = torch.zeros(6, 6)
    for i, j, w in ((0, 1, 0.5), (1, 4, 0.25), (2, 3, 1.5), (0, 5, 0.75)):
        A[i, j] = A[j, i] = w
    csr = A.to_sparse_csr()
    parts = csr.crow_indices(), csr.col_indices(), csr.values()
    return A, *(part.clone() for part in parts)


class TestNeighbourSum(contracts.OpContract):
    op = staticmethod(_ops.neighbour_sum)

    def samples(self):
        A, crow, col, val = _symmetric()
        x = randn(6, 3)
        return [(x.requires_grad_(), crow, col, val), (randn(6, 1), crow, col, val)]

    def test_value_and_gradient(self):
        A, crow, col, val = _symmetric()
        x = randn(6, 3).requires_grad_()
        out = _ops.neighbour_sum(x, crow, col, val)
        torch.testing.assert_close(out, A @ x)
        g = randn(6, 3, seed=1)
        (grad,) = torch.autograd.grad(out, x, g)
        torch.testing.assert_close(grad, A.T @ g)

    def test_same_bits_twice(self):
        _, crow, col, val = _symmetric()
        x = randn(6, 3)
        assert torch.equal(
            _ops.neighbour_sum(x, crow, col, val), _ops.neighbour_sum(x, crow, col, val)
        )
