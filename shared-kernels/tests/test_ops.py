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


scale = ops.define_op(
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


def test_a_schema_without_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        ops.define_op(
            "shared_kernels_test::bad", "(Tensor x) -> Tensor", implementations={}, fake=None
        )


def test_nothing_inside_an_op_is_autocast():
    IMPLEMENTATIONS.product = lambda x: x @ x.mT
    product = ops.define_op(
        "shared_kernels_test::product",
        "(Tensor x, str backend='auto') -> Tensor",
        implementations={"cpu": "toy_implementations:product"},
        fake=lambda x, backend="auto": x.new_empty(x.shape[0], x.shape[0]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 3)).dtype == torch.float32


def test_a_key_by_name_beside_the_kernel_for_every_device():
    made = ops.define_op(
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
