"""The kernels, under the interpreter or on a GPU: the CPU leg's cases, edges, bounds of memory."""

import pytest
import torch

from diffmax import _torch_linear, diffmax_bisect
from shared_kernels import configs, device, dispatch
from shared_kernels.testing import (
    assert_close,
    compare,
    guarded,
    others_thorough,
    pairwise,
    parametrize,
    poisoned_empty,
)
from shared_kernels.testing.tolerances import tolerance

from . import test_large_scores, test_linear_loss
from .cases import CASES, bound, inputs, reference

FLOAT32 = tolerance(torch.float32)

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
DEVICE = "cpu" if device.interpreting() else "cuda"


def on_device(function, case):
    """`function` of CPU tensors, run by Triton where it runs."""
    call = bound(function, case, backend="triton")

    def moved(**tensors):
        with poisoned_empty():
            out = call(**{k: t.to(DEVICE) for k, t in tensors.items()}).cpu()
        assert dispatch.last("diffmax::bisect") == "triton"
        return out

    return moved


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@parametrize(CASES)
def test_cases(case, dtype):
    given_inputs = inputs(case, dtype)
    compare(
        on_device(diffmax_bisect, case),
        bound(reference, case),
        given_inputs,
        differentiable=tuple(given_inputs),
        dtype=dtype,
    )
    assert dispatch.last("diffmax::bisect_backward") == "triton"


def both(X, alpha, **keywords):
    """Values and gradients from Triton in fp32 and from the solver in fp64."""
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        x = X.to(dtype).to(DEVICE if backend == "triton" else "cpu").requires_grad_()
        a = alpha.to(x).requires_grad_()
        y = diffmax_bisect(x, a, backend=backend, **keywords)
        weight = torch.linspace(-1, 1, y.shape[-1], dtype=torch.float64).to(y)
        results.append([t.cpu() for t in (y, *torch.autograd.grad((y * weight).sum(), (x, a)))])
    return zip(*results, strict=True)


@pytest.mark.parametrize("alpha", [0.3, 0.85, 1 - 1e-3, 1 - 1e-6])
def test_alpha_on_the_device(alpha):
    for X in (torch.randn(2, 70), torch.randn(2, 70) * 0.01):
        y, dx, d_alpha = both(X, torch.tensor(alpha))
        assert_close(*y, scale=0.2)
        assert_close(*dx, "gradient", scale=0.02)
        assert_close(*d_alpha, "gradient", scale=0.05)


@pytest.mark.parametrize("alpha", [torch.tensor([[0.3], [0.97]]), torch.tensor(0.5)])
def test_streamed_rows(alpha):
    X = torch.randn(2, 16384 + 77)
    X[0, 5000:] = -torch.inf
    for ours, exact in both(X, alpha):
        assert_close(ours, exact, "gradient", scale=0.05)


def test_streamed_rows_with_a_number():
    X = torch.randn(2, 16385)
    exact = diffmax_bisect(X.double(), 0.9, backend="torch")
    for dtype in (torch.float32, torch.bfloat16):
        ours = diffmax_bisect(X.to(DEVICE, dtype), 0.9, backend="triton").cpu()
        assert_close(ours, exact, scale=0.5)


@pytest.mark.parametrize("alpha", [0.5, 0.85, 0.99, 2 / 3])
@pytest.mark.parametrize("N", [9, 16500])
def test_edges(N, alpha):
    X = torch.randn(6, N)
    X[0], X[1, 2], X[2, 2] = -torch.inf, torch.nan, torch.inf
    X[3, 4:] = -torch.inf
    X[4, 0], X[4, 1] = 3e38, -3e38
    expected = diffmax_bisect(X, alpha, backend="torch")
    X = X.to(DEVICE).requires_grad_()
    Y = diffmax_bisect(X, alpha, backend="triton")
    assert_close(Y.cpu(), expected)
    assert bool(Y[1].isnan().all()) and bool(Y[2].isnan().all())
    (dX,) = torch.autograd.grad((Y * torch.randn(6, N).to(DEVICE)).sum(), X)
    assert bool((dX[0] == 0).all()) and bool((dX[3, 4:] == 0).all())
    assert bool(dX[3:].isfinite().all())


def test_nothing_outside_the_output_is_written(monkeypatch):
    made = []

    def empty(shape, dtype=None, device=None):
        view, check = guarded(tuple(shape), dtype, device)
        made.append(check)
        return view

    for N in (13, 16400):
        X = torch.randn(3, N, device=DEVICE, requires_grad=True)
        alpha = torch.full((3, 1), 0.7, device=DEVICE, requires_grad=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            diffmax_bisect(X, alpha, backend="triton").square().sum().backward()
    assert len(made) >= 6
    for check in made:
        check()


def test_every_config_gives_the_same_answer():
    from shared_kernels.triton import configs as tables

    X = torch.randn(5, 40, device=DEVICE)
    exact = diffmax_bisect(X.double().cpu(), 0.85)
    for _, _, config in tables.ROWS_FORWARD.entries():
        with configs.forcing(tables.ROWS_FORWARD, config):
            assert_close(diffmax_bisect(X, 0.85, backend="triton").cpu(), exact, scale=0.1)


def test_raw_weights():
    raw = diffmax_bisect(torch.randn(3, 90).to(DEVICE), 0.4, ensure_sum_one=False, backend="triton")
    assert (raw.double().sum(-1) - 1).abs().max() < FLOAT32 / 2


def test_strides_and_empty():
    X = torch.randn(6, 4, 10, device=DEVICE)
    for view in (X.transpose(0, 2), X[::2], X[:, 1:3, ::3], X[:1].expand(3, 4, 10)):
        for dim in range(3):
            ours = diffmax_bisect(view, 0.6, dim, backend="triton")
            assert_close(ours, diffmax_bisect(view, 0.6, dim, backend="reference"))
    for shape in ((0, 4), (4, 0)):
        assert diffmax_bisect(torch.empty(shape, device=DEVICE), backend="triton").shape == shape


@pytest.mark.parametrize("alpha", [0.05, 0.5, 2 / 3, 0.85, 0.999, 1 - 1e-6])
def test_double_precision(alpha):
    """fp64 all the way: a scalar argument of a kernel, or a constant, in fp32 would show."""
    for X in (torch.randn(3, 70), torch.randn(2, 70) * 0.01, torch.randn(2, 4096 + 33)):
        X, results = X.double(), []
        for backend in ("triton", "torch"):
            x = X.to(DEVICE if backend == "triton" else "cpu").requires_grad_()
            a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
            y = diffmax_bisect(x, a, backend=backend)
            weight = torch.linspace(-1, 1, y.shape[-1], dtype=torch.float64).to(y)
            grads = torch.autograd.grad((y * weight).sum(), (x, a))
            results.append([t.cpu() for t in (y, *grads)])
        assert dispatch.last("diffmax::bisect_backward") == "torch"
        for ours, exact in zip(*results, strict=True):
            assert_close(ours, exact, scale=0.01)
    raw = diffmax_bisect(X.to(DEVICE), alpha, ensure_sum_one=False, backend="triton")
    assert_close(raw.sum(-1).cpu(), torch.ones(2, dtype=torch.float64), scale=1e-3)


WAYS = [("lists", torch.float32), ("at once", torch.float64)]
WAYS += [("lists", torch.float64), ("at once", torch.float32)]


@pytest.mark.parametrize(
    ("case", "path", "dtype"),
    [  # each case goes one way, and every way each night
        pytest.param(case, *way, marks=() if i % len(WAYS) == j else pytest.mark.thorough)
        for i, case in enumerate(test_linear_loss.CASES)
        for j, way in enumerate(WAYS)
    ],
    ids=str,
)
def test_the_loss_over_a_vocabulary_is_searched_and_solved_here(case, path, dtype):
    if path == "at once" and case.get("V", 300) > 300:
        pytest.skip("whole rows have nothing that depends on the vocabulary's size")
    exact, gradients = test_linear_loss.run(case, "reference")
    with poisoned_empty():
        loss, found = test_linear_loss.run(case, "triton", path, dtype, device=DEVICE)
    assert_close(loss.cpu(), exact)
    for name, exact_gradient in gradients.items():
        assert_close(found[name].cpu(), exact_gradient, "gradient")


@pairwise(
    case=test_large_scores.CASES, smoothing=[0.125, 0.0], weights=["one class", "several classes"]
)
def test_the_loss_of_a_vocabulary_is_that_of_the_differences(case, smoothing, weights, monkeypatch):
    monkeypatch.setattr(_torch_linear, "_MIN_CLASSES", 1)
    test_large_scores.assert_loss_of_a_vocabulary("triton", case, smoothing, weights, DEVICE)


@pytest.mark.parametrize(
    "variant", others_thorough([{}, {"soft": 3, "softcap": 20.0, "at_once": True}]), ids=str
)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(variant):
    test_linear_loss.rows_have_the_bits_that_they_have_alone(variant, "triton", DEVICE, 4100, 12)


def test_the_search_in_half_precision():
    """Products of bf16 summed in fp32, the largest logit included: a target alone costs 0."""
    case = test_linear_loss.CASES[0]
    exact, gradients = test_linear_loss.run(case, "reference", dtype=torch.bfloat16)
    loss, found = test_linear_loss.run(case, "triton", "lists", torch.bfloat16, device=DEVICE)
    assert_close(loss.cpu(), exact)
    for name, exact_gradient in gradients.items():
        assert_close(found[name].cpu(), exact_gradient, "gradient")
