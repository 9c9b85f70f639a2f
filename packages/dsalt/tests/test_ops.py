"""The registered operators: opcheck, and compilation without a graph break."""

from __future__ import annotations

import pytest
import torch

from dsalt import _landmarks, _ops
from dsalt._call import Attention, CausalLandmarks, LinearCrossEntropy
from dsalt.kernels import dsalt_attention, explain, hybrid_energy, select_landmarks
from dsalt.modules import DSALTTransformer
from shared_kernels import dispatch, native
from shared_kernels.testing import assert_close, contracts


def _arguments(block: int | None, packed: bool = False, n: int = 20):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, n, 4))
    windows = (9 * torch.rand(1, 2, n)).requires_grad_()
    cu = torch.tensor([0, 7, n], dtype=torch.int32) if packed else None
    idx = select_landmarks(torch.randn(1, 2, n), 3, landmark_block=block, cu_seqlens=cu)
    bias = torch.randn(idx.shape, requires_grad=True)
    return q, k, v, windows, idx, bias, cu, 0.5, 2.0, block, False


class TestAttention(contracts.OpContract):
    op = _ops.attention.overload

    def samples(self):
        return [_arguments(None), _arguments(8, packed=True)]


class TestBackward(contracts.OpContract):
    op = _ops.attention.backward

    def samples(self):
        found = []
        for needs in ("q,k,v,windows,bias", "q,k,v"):
            given = [x.detach() if isinstance(x, torch.Tensor) else x for x in _arguments(8)]
            out, *saved = _ops.attention.overload(*given)
            found.append((torch.randn_like(out), *given, out, *saved, needs))
        return found


class TestLandmarks(contracts.OpContract):
    op = _ops.causal_landmarks.overload

    def samples(self):
        return [
            (torch.randn(2, 2, 21), 3, 8, None),
            (torch.randn(1, 2, 20), 3, 8, torch.tensor([0, 7, 20])),
        ]

    @pytest.mark.system
    def test_compiles_without_graph_breaks(self):
        compiled = torch.compile(lambda *a: self.op(*a), fullgraph=True, backend="aot_eager")
        for given in self.samples():
            assert torch.equal(compiled(*given), self.op(*given))


class TestLoss(contracts.OpContract):
    op = _ops.linear_cross_entropy.overload

    def samples(self):
        hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
        labels = torch.tensor([0, 6, -100, 3, 3, 1, 2, -100, 5])
        return [
            (hidden, weight, labels, 4, True, False),
            (hidden, weight.clone().requires_grad_(), labels, 4, True, True),
        ]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 7, 7, 50]])
@pytest.mark.parametrize("n_chosen", [0, 4, 60])
def test_lists_are_the_same_by_loop_scan_and_reference(n_chosen, cu_seqlens):
    scores = torch.randn(1, 3, 50).round(decimals=1)
    scores[..., ::5] = -torch.inf
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    call = CausalLandmarks(scores, n_chosen, 8, bounds)
    exact = _ops.causal_landmarks(call, "reference")
    assert dispatch.last("dsalt::causal_landmarks") == "reference"
    used = slice(0, exact.shape[2] if bounds is None else 8)  # no query is in the last packed list
    assert torch.equal(_landmarks.by_loop(call)[:, :, used], exact[:, :, used])
    assert torch.equal(_landmarks.by_scan(call)[:, :, used], exact[:, :, used])


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu", "reference"])
def test_dispatch_names_the_backend_that_ran(backend):
    ran = "reference" if backend == "reference" else "torch"
    call = Attention(*_arguments(8))
    _ops.attention(call, backend)
    fast = "native" if backend == "auto" and native.why_not() is None else ran
    assert dispatch.last("dsalt::attention") == fast
    hidden, weight = torch.randn(9, 4), torch.randn(7, 4)
    labels = torch.randint(7, (9,))
    given = LinearCrossEntropy(hidden, weight, labels, 4, False, False)
    ours = _ops.linear_cross_entropy(given, backend)
    assert dispatch.last("dsalt::linear_cross_entropy") == ran
    assert_close(ours, _ops.linear_cross_entropy(given, "reference"))


def test_explain_names_every_operator_of_a_module():
    text = explain(DSALTTransformer(16, 2, 1, 3, 8, 2, landmark_block=8), torch.randn(1, 30, 16))
    for op in ("attention", "causal_landmarks"):
        paragraph = text.split(f"dsalt::{op}:")[1]
        fast = "native" if op == "attention" and native.why_not() is None else "torch"
        assert f"{fast}: chosen" in paragraph and "reference: can run" in paragraph


def test_the_torch_backend_makes_its_tensors_on_the_inputs_device():
    """Under another default device a tensor made without ``device=`` would not fit the others."""
    given = _arguments(8)
    packed = _arguments(8, packed=True)
    with torch.device("meta"):
        for arguments in (given, packed):
            out = _ops.attention(Attention(*arguments), "torch")
            grads = torch.autograd.grad(out.sum(), [*arguments[:4], arguments[5]])
            assert {x.device.type for x in (out, *grads)} == {"cpu"}
        scaled = (given[0] * 1e3, *given[1:])  # rows whose maximum is subtracted
        assert _ops.attention(Attention(*scaled), "torch").isfinite().all()


@pytest.mark.system
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


@pytest.mark.system
@pytest.mark.thorough
def test_transformer_compiles_whole():
    body = DSALTTransformer(16, 2, 2, 3, 8, 2, landmark_block=8)
    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 30, 16)
    assert_close(compiled(x), body(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in body.parameters())
