"""The kernels, under the interpreter or on a GPU."""

import pytest
import torch

from difflayers import AttentionOperator, DiffusedHopfield, _graph, _ops, _reference
from difflayers._call import NeighbourAttention, NeighbourSum
from shared_kernels import device, dispatch
from shared_kernels.testing import Case, assert_close, guarded, parametrize, poisoned_empty

from .cases import data_of, randn, spread

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
DEVICE = "cpu" if device.interpreting() else "cuda"

LISTS = [
    Case("small", B=2, H=2, L=7, S=9, K=3, D=8, D_v=8),
    Case("odd", B=1, H=1, L=5, S=20, K=17, D=5, D_v=12),
    Case("one", B=1, H=2, L=3, S=1, K=1, D=16, D_v=16),
    Case("empty-slots", B=2, H=1, L=6, S=8, K=5, D=16, D_v=4, empty=True),
]


def _inputs(case, dtype=torch.float32):
    q = randn(case.B, case.H, case.L, case.D, dtype=dtype)
    k = randn(case.B, case.H, case.S, case.D, seed=1, dtype=dtype)
    v = randn(case.B, case.H, case.S, case.D_v, seed=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(case.B, case.L, case.S, generator=generator).argsort(-1)[..., : case.K]
    if case.get("empty"):
        index[:, 1, 2:] = -1
        index[0, 3] = -1
    return q, k, v, index.contiguous()


@parametrize(LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighbour_attention(case, dtype):
    tensors = _inputs(case, dtype)
    q, k, v, index = (x.to(DEVICE) for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with poisoned_empty():
        o, _, lse = _ops.neighbour_attention.overload(*inputs, index, 0.7, "triton")
        assert dispatch.last("difflayers::neighbour_attention") == "triton"
        weight = randn(*o.shape, seed=4, dtype=dtype).to(DEVICE)
        grads = torch.autograd.grad((o * weight).sum(), inputs)
        assert dispatch.last("difflayers::neighbour_attention_backward") == "triton"
    exact_in = [x.double().requires_grad_() for x in tensors[:3]]
    exact = _reference.neighbour_attention(NeighbourAttention(*exact_in, tensors[3], 0.7))
    doubles = [x.detach() for x in exact_in]
    exact_lse = _ops.neighbour_attention.overload(*doubles, tensors[3], 0.7, "torch")[2]
    exact_grads = torch.autograd.grad((exact * weight.cpu().double()).sum(), exact_in)
    assert_close(o.cpu(), exact)
    assert_close(lse.cpu(), exact_lse)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.cpu(), theirs, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 5, 40])
def test_neighbour_sum(dtype, d):
    graph = _graph.build(randn(2, 23, 6), 20, normalized=True, sparse=True)
    x = randn(46, d, dtype=dtype)
    parts = [t.to(DEVICE) for t in (graph.crow, graph.col, graph.val)]
    given = x.to(DEVICE).requires_grad_()
    with poisoned_empty():
        out = _ops.neighbour_sum(NeighbourSum(given, *parts), "triton")
        assert dispatch.last("difflayers::neighbour_sum") == "triton"
        weight = randn(46, d, seed=1, dtype=dtype)
        (grad,) = torch.autograd.grad(out, given, weight.to(DEVICE))
        assert dispatch.last("difflayers::neighbour_sum_backward") == "triton"
    csr = (graph.crow, graph.col, graph.val.double())
    assert_close(out.cpu(), _reference.neighbour_sum(NeighbourSum(x.double(), *csr)))
    exact = _reference.neighbour_sum(NeighbourSum(weight.double(), *csr))
    assert_close(grad.cpu(), exact, "gradient")


def test_rows_without_edges_and_strided_input():
    crow, col = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2])
    val = torch.tensor([0.5, 2.0])
    x = randn(4, 3).T
    parts = [t.to(DEVICE) for t in (crow, col, val)]
    with poisoned_empty():
        out = _ops.neighbour_sum(NeighbourSum(x.to(DEVICE), *parts), "triton").cpu()
    assert bool((out[[0, 2]] == 0).all())
    assert_close(out[1], 0.5 * x[0] + 2.0 * x[2])


def test_kernels_write_nothing_beyond_their_output(monkeypatch):
    from difflayers._triton import forward

    checks = []

    def guarded_empty(shape, dtype=None, device=None):
        view, check = guarded(tuple(shape), dtype)
        checks.append(check)
        return view.to(device)

    if DEVICE != "cpu":
        pytest.skip("guard rows live in CPU memory")
    q, k, v, index = _inputs(LISTS[1])
    monkeypatch.setattr(forward.torch, "empty", guarded_empty)
    forward.launch_neighbour_attention_forward(NeighbourAttention(q, k, v, index, 0.7))
    graph_args = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0]), torch.ones(3)
    forward.launch_neighbour_sum(NeighbourSum(randn(3, 5), *graph_args))
    monkeypatch.undo()
    assert len(checks) == 4
    for check in checks:
        check()


def test_float64_says_why_not():
    call = NeighbourAttention(*_inputs(LISTS[0], torch.float64), 1.0)
    with pytest.raises(NotImplementedError, match="fp32"):
        _ops.neighbour_attention(call, "triton")


@pytest.mark.parametrize("padded", [False, True])
def test_layer_along_the_graph_runs_the_kernels(padded):
    options = {"attention_mode": "graph", "use_sparse": True, "k_neighbors": 3}
    exactly = spread(DiffusedHopfield(8, num_heads=2, backend="reference", **options)).to(DEVICE)
    memory = spread(DiffusedHopfield(8, num_heads=2, backend="triton", **options)).to(DEVICE)
    data = tuple(x.to(DEVICE) for x in data_of(memory, S=9))
    padding = torch.arange(9, device=DEVICE).expand(2, -1) >= torch.tensor([[9], [5]]).to(DEVICE)
    exact = exactly(data, padding if padded else None)
    for name in ("neighbour_sum", "neighbour_attention"):
        assert dispatch.last(f"difflayers::{name}") == "reference"
    out = memory(data, padding if padded else None)
    for name in ("neighbour_sum", "neighbour_attention"):
        assert dispatch.last(f"difflayers::{name}") == "triton"
    assert_close(out, exact.detach())


def test_operator_along_the_graph_runs_the_kernel():
    q, k, v, index = (x[0].to(DEVICE) for x in _inputs(LISTS[0]))
    out = AttentionOperator(0.7, "graph", backend="triton")(q[0], k[0], v[0], index)
    assert dispatch.last("difflayers::neighbour_attention") == "triton"
    exact = AttentionOperator(0.7, "graph", backend="reference")(q[0], k[0], v[0], index)
    assert_close(out, exact)
