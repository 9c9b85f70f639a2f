import pytest
import torch

from difflayers import _ops, _reference
from shared_kernels.testing import assert_close, contracts

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

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_gradient_of_the_weights(self, dtype):
        A, crow, col, val = _symmetric()
        x, val = randn(6, 3, dtype=dtype).requires_grad_(), val.to(dtype).requires_grad_()
        g = randn(6, 3, seed=1, dtype=dtype)
        found = torch.autograd.grad((_ops.neighbour_sum(x, crow, col, val) * g).sum(), (x, val))
        assert_close(found[0], A.to(dtype).T @ g, "gradient")
        rows = torch.arange(6).repeat_interleave(crow.diff())
        assert_close(found[1], (g[rows] * x[col]).sum(-1).detach(), "gradient")
        (alone,) = torch.autograd.grad(_ops.neighbour_sum(x.detach(), crow, col, val).sum(), val)
        assert_close(alone, x[col].sum(-1).detach(), "gradient")

    def test_same_bits_twice(self):
        _, crow, col, val = _symmetric()
        x = randn(6, 3)
        assert torch.equal(
            _ops.neighbour_sum(x, crow, col, val), _ops.neighbour_sum(x, crow, col, val)
        )


def _lists(requires_grad):
    q, k, v = randn(2, 2, 5, 4), randn(2, 2, 6, 4, seed=1), randn(2, 2, 6, 3, seed=2)
    index = torch.tensor([[0, 1, 5], [2, -1, -1], [-1, -1, -1], [3, 4, 0], [1, 2, 3]])
    index = index.expand(2, -1, -1).contiguous()
    return [x.requires_grad_(requires_grad) for x in (q, k, v)], index


class TestNeighbourAttention(contracts.OpContract):
    op = staticmethod(_ops.neighbour_attention)

    def samples(self):
        inputs, index = _lists(True)
        return [(*inputs, index, 0.7)]

    def test_value_and_gradient(self):
        inputs, index = _lists(True)
        o, lse = _ops.neighbour_attention(*inputs, index, 0.7)
        exact, exact_lse = _reference.neighbour_attention(*inputs, index, 0.7)
        assert_close(o, exact)
        assert_close(lse, exact_lse)
        weight = randn(*o.shape, seed=4)
        ours = torch.autograd.grad((o * weight).sum(), inputs)
        for a, b in zip(ours, torch.autograd.grad((exact * weight).sum(), inputs), strict=True):
            assert_close(a, b, "gradient")


class TestNeighbourAttentionBackward(contracts.OpContract):
    op = staticmethod(_ops.neighbour_attention_backward)

    def samples(self):
        (q, k, v), index = _lists(False)
        o, lse = _ops.neighbour_attention(q, k, v, index, 0.7)
        return [(randn(*o.shape, seed=5), q, k, v, index, o, lse, 0.7)]
