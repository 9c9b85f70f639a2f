"""The registered ops: opcheck, compile, vmap, autocast, determinism."""

import subprocess
import sys

import pytest
import torch

from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect
from shared_kernels import dispatch, native
from shared_kernels.testing import assert_close, contracts

from .cases import backward, on_each_backend

A = torch.tensor(0.7, dtype=torch.float64)
ROWS = torch.tensor([[0.3], [0.5], [0.9]])


class TestBisect(contracts.OpContract):
    op = torch.ops.diffmax.bisect.default

    def samples(self):
        X = torch.randn(2, 3, 8)
        return [
            (X, A, -1, 50, True),
            (X.clone().requires_grad_(), ROWS.clone().requires_grad_(), 2, 9, False),
            (X.transpose(0, 2).bfloat16(), torch.tensor(0.5), 1, 50, True),
            (X.clone().requires_grad_(), ROWS, 2, 9, False),
            (X.transpose(0, 2).double(), A.clone().requires_grad_(), 1, 50, True),
        ]


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.thorough
class TestBisectOfPyTorch(TestBisect):
    """The other one that CPU tensors can run on: "auto" takes it without a library."""

    @pytest.fixture(autouse=True)
    def _without_library(self, monkeypatch):
        monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")


@pytest.mark.thorough
class TestBisectBackward(contracts.OpContract):
    op = torch.ops.diffmax.bisect_backward.default

    def samples(self):
        X, G = torch.randn(2, 2, 3, 8)
        grad = torch.Tensor.requires_grad_
        for alpha, dim, needs in ((ROWS, -1, "X,alpha"), (A, 0, "alpha"), (A, 2, "X")):
            call = (alpha, dim, 50, True)
            Y = torch.ops.diffmax.bisect(X, *call)
            yield G, None, *call, Y, needs
            call = (grad(alpha.clone()), dim, 50, True)
            yield grad(G.clone()), None, *call, grad(Y.clone()), needs


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.thorough
class TestBackwardOfPyTorch(TestBisectBackward):
    @pytest.fixture(autouse=True)
    def _without_library(self, monkeypatch):
        monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")


def test_the_op_by_its_name():
    X = torch.randn(3, 5)
    Y = torch.ops.diffmax.bisect(X, A)
    assert torch.equal(Y, diffmax_bisect(X, A))
    dX, d_alpha = backward(X, Y, A)
    assert dX.shape == X.shape and d_alpha.shape == () and d_alpha.dtype == A.dtype


@pytest.mark.system
def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    layer = DiffmaxBisectModule(0.8, alpha_map=HillMap(), num_heads=2)

    def loss(X):
        return layer(X.sin()).square().sum() + diffmax_bisect(X, 0.5, 1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for shape in ((3, 2, 4, 5), (1, 2, 7, 9), (2, 2, 3, 11)):
        results = []
        for function in (loss, compiled):
            X = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
            layer.zero_grad()
            value = function(X)
            value.backward()
            results.append((value.detach(), X.grad, layer.log_beta.grad.clone()))
        for ours, eager in zip(*results, strict=True):
            assert_close(eager, ours, "gradient")


@pytest.mark.system
def test_a_compiled_program_runs_with_and_without_the_native_library(monkeypatch):
    """Inductor's cache may bring a program back where the other backend runs."""
    monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")
    for _ in range(2):
        torch._dynamo.reset()
        X = torch.randn(3, 11).requires_grad_()
        Y = torch.compile(lambda X: diffmax_bisect(X, 0.45), fullgraph=True)(X)
        assert_close(torch.autograd.grad(Y.square().sum(), X)[0].sum(-1), torch.zeros(3))
        monkeypatch.delenv("SHARED_KERNELS_NATIVE", raising=False)


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0), (None, 0), (2, 1)])
def test_vmap(in_dims):
    dims = {0: (4, 3, 5), 1: (3, 4, 5), 2: (3, 5, 4), None: (3, 5)}
    X = torch.randn(dims[in_dims[0]])
    alpha = {
        None: torch.tensor([[0.2], [0.5], [0.8]]),
        0: torch.rand(4, 3, 1) * 0.9 + 0.05,
        1: torch.rand(3, 4, 1) * 0.9 + 0.05,
    }[in_dims[1]]
    ours = torch.vmap(lambda x, a: diffmax_bisect(x, a, -1), in_dims)(X, alpha)
    for i in range(4):
        x = X if in_dims[0] is None else X.select(in_dims[0], i)
        a = alpha if in_dims[1] is None else alpha.select(in_dims[1], i)
        assert_close(ours[i], diffmax_bisect(x, a, -1))
    numbers = torch.vmap(lambda x: diffmax_bisect(x, 0.4, 0), 1)(torch.randn(6, 4))
    assert_close(numbers.sum(-1), torch.ones(4))


def test_vmap_of_the_backward_op():
    Y, G = diffmax_bisect(torch.randn(4, 3, 5), 0.6), torch.randn(4, 3, 5)
    for alpha, in_dim in ((A, None), (torch.rand(4) * 0.5 + 0.2, 0)):
        dX, d_alpha = torch.vmap(backward, (0, 0, in_dim))(G, Y, alpha)
        for i in range(4):
            a = alpha if in_dim is None else alpha[i]
            one, d_one = backward(G[i], Y[i], a)
            assert_close(dX[i], one)
            assert_close(d_alpha[i].to(Y.dtype), d_one)  # computed in Y's fp32, whatever alpha is


def test_jacobian_by_vmap():
    X = torch.randn(5, requires_grad=True)
    Y = diffmax_bisect(X, 0.6)
    rows = torch.vmap(lambda g: torch.autograd.grad(Y, X, g, retain_graph=True)[0])(torch.eye(5))
    slow = torch.autograd.functional.jacobian(lambda x: diffmax_bisect(x, 0.6), X.detach())
    assert_close(rows, slow, "gradient")


def test_autocast_gives_fp32_and_leaves_fp64():
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        X = torch.randn(3, 9, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            Y = diffmax_bisect(X, 0.8)
        assert Y.dtype == expected
        Y.square().sum().backward()
        assert X.grad.dtype == dtype
        assert diffmax_bisect(X, 0.8).dtype == dtype


def test_traces_with_its_check():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 9), DiffmaxBisectModule()), torch.randn(3, 8)
    assert_close(torch.jit.trace(model, x)(x), model(x))


@on_each_backend
def test_explicit_backend_stays_for_the_backward(backend):
    for name in (backend, "cpu"):
        X = torch.randn(3, 9, requires_grad=True)
        diffmax_bisect(X, 0.8, backend=name).square().sum().backward()
        ran = "torch" if name == "cpu" else backend
        assert dispatch.last("diffmax::bisect") == ran
        assert dispatch.last("diffmax::bisect_backward") == ran


@on_each_backend
def test_the_reference_is_recorded_and_has_derivatives_of_any_order(backend):
    X = torch.randn(9, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("reference", backend):
        loss = diffmax_bisect(X, 0.8, backend=name).square().sum()
        assert dispatch.last("diffmax::bisect") == name
        (dX,) = torch.autograd.grad(loss, X, create_graph=True)
        (second,) = torch.autograd.grad(dX.square().sum(), X, create_graph=True)
        found.append((dX, second, *torch.autograd.grad(second.square().sum(), X)))
    for exact, ours in zip(*found, strict=True):
        assert_close(ours, exact, "gradient")


@on_each_backend
def test_two_runs_same_bits(backend):
    X, alpha = torch.randn(50, 600, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    runs = []
    for _ in range(2):
        Y = diffmax_bisect(X, alpha, backend=backend)
        runs.append((Y, *torch.autograd.grad(Y.square().sum(), (X, alpha))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_ops_on_meta_tensors():
    assert diffmax_bisect(torch.empty(3, 4, device="meta"), 0.5, 0).shape == (3, 4)


NPU = """
import sys
import torch
from diffmax import diffmax_bisect
assert "torch_npu" not in sys.modules
key = torch._C.DispatchKey.PrivateUse1
found = [
    torch._C._dispatch_has_kernel_for_dispatch_key(f"diffmax::{name}", "PrivateUse1")
    for name in ("bisect", "bisect_backward")
]
X, alpha = torch.randn(3, 9), torch.tensor(0.6)
if found == [True, True]:  # what an NPU's tensors would run
    keys = torch._C.DispatchKeySet(key)
    Y = torch.ops.diffmax.bisect.default.redispatch(keys, X, alpha, -1, 50, True)
    assert torch.equal(Y, diffmax_bisect(X, alpha))
    inputs = (X, None, alpha, -1, 50, True, Y, "X")
    dX, _ = torch.ops.diffmax.bisect_backward.default.redispatch(keys, *inputs)
    assert torch.equal(dX, torch.ops.diffmax.bisect_backward(*inputs)[0])
print(found)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("is_there", [False, True])
def test_the_npu_key_exists_only_with_torch_npu(is_there, tmp_path, monkeypatch):
    if is_there:
        (tmp_path / "torch_npu.py").write_text("raise ImportError('never imported by diffmax')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run = subprocess.run([sys.executable, "-c", NPU], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([is_there, is_there])
