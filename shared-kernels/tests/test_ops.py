"""define_op: a toy op goes through every door that a real one uses."""

import sys
import types

import pytest
import torch
from torch.autograd import forward_ad

from shared_kernels import dispatch, ops
from shared_kernels.testing import contracts

IMPLEMENTATIONS = types.ModuleType("toy_implementations")
IMPLEMENTATIONS.cpu = lambda x, factor: x * factor
IMPLEMENTATIONS.picky = lambda x, factor: x * factor
sys.modules["toy_implementations"] = IMPLEMENTATIONS


def _setup(ctx, inputs, output):
    ctx.factor = inputs[1]


scale = ops.register_op(
    "shared_kernels_test::scale",
    "(Tensor x, float factor=2.0, str backend='auto') -> Tensor",
    implementations={
        "triton": "toy_implementations:missing",
        "picky": "toy_implementations:picky",
        "cpu": "toy_implementations:cpu",
    },
    why_not={"picky": lambda x, factor: None if factor > 10 else "factor is not above 10"},
    fake=lambda x, factor=2.0, backend="auto": torch.empty_like(x),
    setup_context=_setup,
    backward=lambda ctx, grad: (grad * ctx.factor, None, None),
    autocast=torch.float32,
)


class TestScaleContract(contracts.OpContract):
    op = scale

    def samples(self):
        return [
            (torch.randn(3, requires_grad=True), 3.0),
            (torch.randn(2, 4, dtype=torch.float64), 2.5),
        ]


def test_backend_is_chosen_and_remembered():
    x = torch.ones(2)
    assert scale(x).tolist() == [2.0, 2.0]
    assert dispatch.last("shared_kernels_test::scale") == "cpu"
    scale(x, 11.0)
    assert dispatch.last("shared_kernels_test::scale") == "picky"
    with pytest.raises(NotImplementedError, match="factor is not above 10"):
        scale(x, 3.0, "picky")
    assert "picky: cannot run: factor is not above 10" in ops.explain(
        "shared_kernels_test::scale", x, 3.0
    )


def test_gradient_and_autocast():
    x = torch.ones(2, requires_grad=True)
    scale(x, 3.0).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scale(x.detach().bfloat16(), 3.0).dtype == torch.float32
        a, none = ops.autocast_lower(x, None)
        assert a.dtype == torch.bfloat16 and none is None
        assert ops.autocast_lower(x.double())[0].dtype == torch.float64
    assert ops.autocast_lower(x)[0].dtype == torch.float32


def test_forward_mode_is_refused_and_not_answered_with_zeros():
    x = torch.ones(2)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use reverse mode"):
        torch.func.jvp(scale, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        scale(forward_ad.make_dual(x, x))
    scale(x)


double = ops.register_op(
    "shared_kernels_test::double",
    "(Tensor x, str backend='auto') -> Tensor",
    implementations={"cpu": "toy_implementations:twice"},
    fake=lambda x, backend="auto": torch.empty_like(x),
)
square = ops.register_op(
    "shared_kernels_test::square",
    "(Tensor x, str backend='auto') -> Tensor",
    implementations={"cpu": "toy_implementations:square"},
    fake=lambda x, backend="auto": torch.empty_like(x),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    backward=lambda ctx, grad: (grad * double(ctx.saved_tensors[0]), None),
    vmap=lambda info, dims, x, backend="auto": (square(x, backend), dims[0]),
)
IMPLEMENTATIONS.twice = lambda x: 2 * x
IMPLEMENTATIONS.square = lambda x: x * x

SECOND = {
    "create_graph": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].sum(), x
    ),
    "gradgradcheck": lambda f, x: torch.autograd.gradgradcheck(f, x),
    "hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x),
    "hessian vectorized": lambda f, x: torch.autograd.functional.hessian(
        lambda x: f(x).sum(), x, vectorize=True
    ),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum()
    )(x),
    "hessian of torch.func": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_that_is_not_there_is_refused_by_name(way):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    wanted = "double has no (derivative|forward-mode)"
    if way == "hessian of torch.func":
        wanted = "square has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=wanted):
        SECOND[way](square, x)


def test_an_op_without_a_derivative_hands_out_its_result():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no derivative.*create_graph.*reference"):
        double(x).sum().backward()
    assert not double(x.detach()).requires_grad
    assert torch.autograd.grad(square(x).sum(), x)[0].tolist() == [2.0] * 3


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x).sum(0),
    "per sample": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x[:, None])[:, 0],
    "grad of a requires_grad tensor": lambda f, x: torch.func.grad(lambda x: f(x).sum())(
        x.clone().requires_grad_()
    ),
    "is_grads_batched": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True).sum(
        0
    ),
    "compiled": lambda f, x: torch.compile(
        torch.func.grad(lambda x: f(x).sum()), fullgraph=True, backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("f", [square, lambda x: scale(x, 3.0)], ids=["square", "scale"])
def test_transforms_of_torch_func(f, transform):
    x = torch.arange(1.0, 4.0)
    expected = 2 * x if f is square else torch.full((3,), 3.0)
    assert torch.equal(TRANSFORMS[transform](f, x), expected)


def test_no_grad_inside_and_outside_of_a_transform():
    x = torch.arange(1.0, 4.0, requires_grad=True)

    def constant(x):
        with torch.no_grad():
            return square(x)

    assert torch.func.grad(lambda x: (x + constant(x)).sum())(x).tolist() == [1.0] * 3
    assert not torch.func.vjp(constant, x)[0].requires_grad
    with torch.no_grad():
        found = torch.func.grad(lambda x: square(x).sum())(x)
    assert found.tolist() == [2.0, 4.0, 6.0] and not found.requires_grad
    assert torch.func.grad(lambda x: square(x).sum())(x).requires_grad


def test_a_schema_without_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        ops.register_op(
            "shared_kernels_test::bad", "(Tensor x) -> Tensor", implementations={}, fake=None
        )


def test_nothing_inside_an_op_is_autocast():
    IMPLEMENTATIONS.product = lambda x: x @ x.mT
    product = ops.register_op(
        "shared_kernels_test::product",
        "(Tensor x, str backend='auto') -> Tensor",
        implementations={"cpu": "toy_implementations:product"},
        fake=lambda x, backend="auto": x.new_empty(x.shape[0], x.shape[0]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 3)).dtype == torch.float32


def test_a_key_by_name_beside_the_kernel_for_every_device():
    made = ops.register_op(
        "shared_kernels_test::named",
        "(Tensor x, str backend='auto') -> Tensor",
        implementations={"cpu": "toy_implementations:double"},
        fake=lambda x, backend="auto": torch.empty_like(x),
        keys=("PrivateUse1",),
    )
    IMPLEMENTATIONS.double = lambda x: x + x
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("shared_kernels_test::named", "PrivateUse1")
    assert not has("shared_kernels_test::scale", "PrivateUse1")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    assert torch.equal(made.redispatch(keys, torch.ones(3)), torch.full((3,), 2.0))
