"""define_op: a toy call goes through every door that a real one uses."""

import sys
import types
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shared_kernels import dispatch, ops
from shared_kernels.calls import replaced
from shared_kernels.ops import Backend, define_op
from shared_kernels.testing import contracts

TOY = types.ModuleType("toy_calls")
sys.modules["toy_calls"] = TOY


class Tilt(NamedTuple):
    """out = factor x exp(y), or factor x where there is no y."""

    x: Tensor
    y: Tensor | None
    factor: float = 2.0
    window: int | None = None

    def fake(self) -> Tensor:
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


class Power(NamedTuple):
    power: Tensor

    @classmethod
    def fake(cls, call: Tilt) -> "Power":
        return cls(call.x.new_empty(call.x.shape))


class OutAndCount(NamedTuple):
    out: Tensor
    count: Tensor
    spare: Tensor

    @classmethod
    def fake(cls, call: Tilt) -> "OutAndCount":
        return cls(call.x, call.x.new_empty(1, dtype=torch.int64), call.x.new_empty(2))


def _power(call):
    return torch.ones_like(call.x) if call.y is None else call.y.exp()


def _forward(call):
    power = _power(call).contiguous()
    return call.factor * call.x * power, Power(power)


def _backward(call, saved, d_out, needs):
    found = {"x": call.factor * d_out * saved.power}
    if "y" in needs:
        found["y"] = call.factor * d_out * call.x * saved.power
    return found


def _forward_with_out(call):
    out = call.factor * call.x * _power(call)
    return out, OutAndCount(out, torch.tensor([out.numel()]), call.x.new_zeros(2))


def _backward_with_out(call, saved, d_out, needs):
    TOY.count = int(saved.count)
    return {"x": call.factor * d_out * _power(call), "y": d_out * saved.out}


def _second(call, out, d_out, to, backend):
    """<to_x, d_out f e^y> + <to_y, d_out f x e^y>."""
    above = torch.zeros_like(d_out) if to["x"] is None else to["x"]
    to_y = torch.zeros_like(d_out) if to["y"] is None else to["y"]
    e = call.factor * _power(call)
    return {
        "d_out": above * e + to_y * e * call.x,
        "x": to_y * d_out * e,
        "y": above * d_out * e + to_y * d_out * e * call.x,
    }


TOY.forward, TOY.backward = _forward, _backward
TOY.forward_with_out, TOY.backward_with_out = _forward_with_out, _backward_with_out
TOY.reference = lambda call: call.factor * call.x * _power(call)

BACKENDS = {
    "large": Backend(
        "toy_calls:forward_with_out",
        "toy_calls:backward_with_out",
        saved=OutAndCount,
        why_not=lambda call: None if call.factor > 10 else "factor is not above 10",
    ),
    "torch": Backend("toy_calls:forward", "toy_calls:backward", saved=Power),
    "reference": Backend("toy_calls:reference"),
}
NAME = "shared_kernels_calls::tilt"
tilt = define_op(NAME, Tilt, BACKENDS, gradients=("x", "y"), second=_second, vmap="each")
CHOICES = [("auto", 2.0), ("torch", 2.0), ("cpu", 2.0), ("large", 11.0), ("auto", 11.0)]
RUNS = {("auto", 2.0): "torch", ("cpu", 2.0): "torch", ("auto", 11.0): "large"}


def inputs(requires_grad=True):
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, "requires_grad": requires_grad}
    return torch.randn(3, 2, **kind), torch.randn(3, 2, **kind)


class TestTiltContract(contracts.OpContract):
    op = tilt.overload

    def samples(self):
        x, y = inputs()
        return [(x, y), (x, y, 11.0, 3), (x, None, 3.0), (x.detach(), y, 2.0, None, "reference")]


class TestTiltBackwardContract(contracts.OpContract):
    op = tilt.backward

    def samples(self):
        x, y = inputs()
        d_out = torch.ones_like(x)
        power, count = y.exp().detach(), torch.tensor([6])
        out = (2 * x * power).detach()
        return [
            (d_out, x, y, 2.0, None, out, power, x.new_empty(0), "x,y"),
            (d_out, x, None, 2.0, None, out, power, x.new_empty(0), "x"),
            (d_out, x, y, 11.0, 7, out, count, x.new_zeros(2), "y"),
        ]


def test_the_schema_follows_from_the_fields():
    assert str(tilt.overload._schema).startswith(
        "shared_kernels_calls::tilt(Tensor x, Tensor? y, float factor=2., int? window=None, str "
        'backend="auto") -> (Tensor, Tensor, Tensor)'
    )


@pytest.mark.parametrize(("backend", "factor"), [*CHOICES, ("reference", 2.0)])
def test_values_and_derivatives_of_each_backend(backend, factor):
    x, y = inputs()
    out = tilt(Tilt(x, y, factor), backend)
    assert isinstance(out, Tensor)
    assert torch.equal(out, factor * x * y.exp())
    assert dispatch.last(NAME) == RUNS.get((backend, factor), backend)

    def call(x, y):
        return tilt(Tilt(x, y, factor), backend)

    assert torch.autograd.gradcheck(call, (x, y))
    assert torch.autograd.gradgradcheck(call, (x, y))
    assert torch.autograd.gradcheck(lambda x: call(x, None), x)
    expected = torch.func.jacrev(lambda x, y: factor * x * y.exp(), (0, 1))(x, y)
    found = torch.func.jacrev(call, (0, 1))(x, y)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.system
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile_trace_and_vmap(backend):
    x, y = inputs()

    def call(x, y):
        return tilt(Tilt(x, y, 3.0), backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(x, y).sum(), (x, y))
    found = torch.autograd.grad(compiled(x, y).sum(), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    x, y = x.detach(), y.detach()
    assert torch.equal(torch.vmap(call)(x, y), call(x, y))
    assert torch.equal(torch.vmap(call, (1, None))(x, y[:, 0]), call(x, y[:, :1]).T)
    assert torch.vmap(call)(x[:0], y[:0]).shape == (0, 2)
    assert call(x.to("meta"), y.to("meta")).shape == x.shape


def test_forward_mode_is_the_reference_s_alone():
    x, y = inputs(requires_grad=False)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: tilt(Tilt(x, y)), (x,), (x,))
    _, slope = torch.func.jvp(lambda x: tilt(Tilt(x, y), "reference"), (x,), (x,))
    assert torch.allclose(slope, 2 * x * y.exp())


def test_what_a_backend_saves_is_its_own():
    x, y = inputs()
    found = tilt.overload(x, y, 11.0)
    assert [t.shape for t in found] == [(3, 2), (1,), (2,)]  # `out` is stored once
    TOY.count = None
    found[0].sum().backward()
    assert TOY.count == 6
    found = tilt.overload(x, y, 2.0)
    assert [t.shape for t in found] == [(3, 2), (3, 2), (0,)]
    assert not found[1].requires_grad


def test_backends_are_explained_and_asked_by_name():
    x, y = inputs()
    with pytest.raises(NotImplementedError, match="factor is not above 10"):
        tilt(Tilt(x, y), "large")
    with pytest.raises(ValueError, match="'auto', 'large', 'torch', 'reference', got 'warp'"):
        tilt(Tilt(x, y), "warp")

    def function(x, y):
        return tilt(Tilt(x, y, 11.0), "reference")

    text = ops.explain_call("shared_kernels_calls", function, x, y)
    assert "large: chosen" in text
    assert "torch: can run" in text
    assert "reference: can run" in text


class Sum(NamedTuple):
    """The sum of x and that of its squares; backward does not read x."""

    x: Tensor
    save: bool

    def fake(self) -> tuple[Tensor, ...]:
        return self.x.new_empty(()), self.x.new_empty(()), self.x.new_empty((), dtype=torch.int64)

    def fake_gradients(self, saved, needs):
        return {"x": torch.empty_like(saved.slope)}


class Slope(NamedTuple):
    slope: Tensor

    @classmethod
    def fake(cls, call: Sum) -> "Slope":
        return cls(call.x.new_empty(call.x.shape if call.save else (0,)))


def _sum(call):
    outs = call.x.sum(), (call.x**2).sum(), torch.tensor(call.x.numel())
    return outs, Slope(2 * call.x if call.save else call.x.new_empty(0))


def _sum_backward(call, saved, d_out, needs):
    TOY.kept = call.x
    by_sum, by_square, _ = d_out
    found = torch.zeros_like(saved.slope) if by_sum is None else by_sum.expand_as(saved.slope)
    return {"x": found + (0 if by_square is None else by_square * saved.slope)}


TOY.sum, TOY.sum_backward = _sum, _sum_backward
sums = define_op(
    "shared_kernels_calls::sums",
    Sum,
    {"torch": Backend("toy_calls:sum", "toy_calls:sum_backward", saved=Slope)},
    n_outputs=3,
    non_differentiable=(2,),
    gradients=("x",),
    drops=("x",),
)


class TestSumsContract(contracts.OpContract):
    op = sums.overload

    def samples(self):
        x, _ = inputs()
        return [(x, True), (x.detach(), False)]


def test_several_outputs_and_a_field_that_backward_does_not_keep():
    x, _ = inputs()
    a, b, n = sums(Sum(x, ops.wants_gradient(x)))
    assert torch.equal(a, x.sum())
    assert torch.equal(b, (x**2).sum())
    assert int(n) == 6
    (grad,) = torch.autograd.grad(a + 3 * b, x)
    assert torch.allclose(grad, 1 + 6 * x)
    assert TOY.kept is None
    (grad,) = torch.autograd.grad(sums(Sum(x, True))[1], x)
    assert torch.allclose(grad, 2 * x)
    (grad,) = torch.autograd.grad(sums(Sum(x, True))[1], x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sums_backward has no derivative"):
        torch.autograd.grad(grad.sum() + x.sum(), x)


class Odd(NamedTuple):
    x: Tensor
    table: dict[str, int]


ONE_WAY = {"torch": Backend("toy_calls:forward", saved=Power)}


@pytest.mark.parametrize(
    ("Call", "backends", "gradients", "error", "match"),
    [
        (Odd, BACKENDS, (), TypeError, "Odd.table has type"),
        (Tilt, BACKENDS, ("z",), ValueError, "Tilt has no field z"),
        (Tilt, ONE_WAY, ("x",), ValueError, "no backward for torch"),
    ],
)
def test_definitions_that_are_refused(Call, backends, gradients, error, match):
    with pytest.raises(error, match=match):
        define_op("shared_kernels_calls::refused", Call, backends, gradients=gradients)


def test_other_values_in_some_fields_of_a_call():
    call = Tilt(torch.ones(2), None, factor=3.0)
    assert replaced(call, window=4, factor=1.0) == call._replace(window=4, factor=1.0)
    assert type(replaced(call)) is Tilt and replaced(call) == call and call.factor == 3.0
    with pytest.raises(ValueError, match="Tilt has no field named windw"):
        replaced(call, windw=4)


def test_other_values_in_some_fields_of_a_call_are_traced():
    def f(x):
        call = replaced(Tilt(x, x, 2.0), y=None, factor=5.0)
        return call.factor * call.x if call.y is None else call.y

    x = torch.ones(3)
    assert torch.compile(f, backend="eager", fullgraph=True)(x).equal(5 * x)
