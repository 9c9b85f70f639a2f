"""The registered operators: opcheck, and compilation without a graph break."""

from __future__ import annotations

import torch

from dsalt import _ops
from dsalt.kernels import dsalt_attention, hybrid_energy, select_landmarks
from dsalt.modules import DSALTTransformer
from shared_kernels.testing import assert_close, contracts


def _arguments(block: int, packed: bool = False, n: int = 20):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, n, 4))
    windows = (9 * torch.rand(1, 2, n)).requires_grad_()
    cu = torch.tensor([0, 7, n], dtype=torch.int32) if packed else None
    idx = select_landmarks(torch.randn(1, 2, n), 3, landmark_block=block or None, cu_seqlens=cu)
    bias = torch.randn(idx.shape, requires_grad=True)
    return q, k, v, windows, idx, bias, cu, 0.5, 2.0, block


class TestAttention(contracts.OpContract):
    op = _ops.attention

    def samples(self):
        return [_arguments(0), _arguments(8, packed=True)]


class TestBackward(contracts.OpContract):
    op = _ops.attention_backward

    def samples(self):
        found = []
        for with_windows in (True, False):
            q, k, v, w, idx, bias, cu, *numbers = _arguments(8)
            tensors = [x.detach() for x in (q, k, v, w, idx, bias)]
            out, lse = _ops.attention(*tensors, cu, *numbers)
            given = (torch.randn_like(out), *tensors, cu, out, lse)
            found.append((*given, *numbers, with_windows))
        return found


class TestLandmarks(contracts.OpContract):
    op = _ops.causal_landmarks

    def samples(self):
        return [
            (torch.randn(2, 2, 21), 3, 8, None),
            (torch.randn(1, 2, 20), 3, 8, torch.tensor([0, 7, 20])),
        ]

    def test_compiles_without_graph_breaks(self):
        compiled = torch.compile(lambda *a: self.op(*a), fullgraph=True, backend="aot_eager")
        for given in self.samples():
            assert torch.equal(compiled(*given), self.op(*given))


def test_scan_backend_is_the_loop():
    scores = torch.randn(2, 3, 50)
    both = [_ops.causal_landmarks(scores, 4, 8, None, backend) for backend in ("cpu", "scan")]
    assert torch.equal(*both)


def test_public_function_compiles_whole():
    def run(q, k, v, x, wv, windows, alpha):
        scores = hybrid_energy(x, wv, alpha, causal=True)
        idx = select_landmarks(scores, 3, landmark_block=8)
        return dsalt_attention(q, k, v, windows, idx, landmark_block=8).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (30, 41):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, n, 4))
        x, wv = torch.randn(1, n, 6), torch.randn(2, 6, 4)
        windows = (9 * torch.rand(1, 2, n)).requires_grad_()
        alpha = torch.full((2,), 0.6)
        given = (q, k, v, x, wv, windows, alpha)
        assert_close(compiled(*given), run(*given))
        ours = torch.autograd.grad(compiled(*given), (q, k, v, windows))
        eager = torch.autograd.grad(run(*given), (q, k, v, windows))
        for a, b in zip(ours, eager, strict=True):
            assert_close(a, b, "gradient")


def test_transformer_compiles_whole():
    body = DSALTTransformer(16, 2, 2, 3, 8, 2, landmark_block=8)
    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 30, 16)
    assert_close(compiled(x), body(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in body.parameters())
