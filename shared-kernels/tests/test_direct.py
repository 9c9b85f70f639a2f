"""Which calls go around PyTorch's dispatcher, and that they say and do the same as the others."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shared_kernels import direct, dispatch, ops
from shared_kernels.direct import Signatures, is_plain


class Scaled(NamedTuple):
    x: Tensor
    by: float
    shift: Tensor | None = None
    sizes: list[int] | None = None

    def fake(self):
        return torch.empty_like(self.x)


class Kept(NamedTuple):
    twice: Tensor

    @classmethod
    def fake(cls, call):
        return cls(torch.empty_like(call.x))


def _forward(call):
    return call.x * call.by, Kept(2 * call.x)


def _backward(call, saved, d_out, needs):
    return {"x": d_out * call.by + 0 * saved.twice}


def _second(call, out, d_out, to, backend):
    return {"d_out": to["x"] * call.by}


scaled = ops.define_op(
    "shared_kernels_test::directly_scaled",
    Scaled,
    {"torch": ops.Backend(_forward, _backward, Kept)},
    gradients=("x",),
    second=_second,
    vmap="each",
)
SIGNATURES = Signatures(scaled.overload._schema)


def plain(x, by=2.0, backend="auto"):
    return is_plain(SIGNATURES, (x, by, None, None, backend))


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    "x", [torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.ones(2, 0).T]
)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_eager_calls_of_dense_tensors_are_plain(x, mode):
    with mode():
        assert plain(x)
        assert plain(torch.ones(3))


MODES = {
    "dispatch mode": Passes,
    "function mode": Functions,
    "fake tensors": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu"),
    "forward mode": forward_ad.dual_level,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "below autograd": torch._C._AutoDispatchBelowAutograd,
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_that_changes_what_a_call_means_sees_it(name):
    x = torch.ones(3)
    assert plain(x)
    with MODES[name]():
        assert not plain(x)
    assert plain(x)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_transforms_see_every_call(transform):
    seen = []

    def f(x):
        seen.append(plain(torch.ones(3)) or plain(x))
        return x.sum()

    transform(f)(torch.ones(2, 3))
    assert seen == [False]


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(3, device="meta"),
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64).conj().imag,
        torch.ones(3).as_subclass(Own),
        FakeTensorMode().from_tensor(torch.ones(3)),
        "text",
        None,
    ],
    ids=["meta", "sparse", "negative bit", "subclass", "fake", "no tensor", "none"],
)
def test_other_tensors_go_to_the_dispatcher(x):
    assert not plain(x)


def test_arguments_that_the_dispatcher_converts_go_there():
    x = torch.ones(3)
    assert not plain(x, 2)
    assert not is_plain(SIGNATURES, (x, 2.0, None, (1, 2), "auto"))
    assert is_plain(SIGNATURES, (x, 2.0, None, [1, 2], "auto"))
    assert scaled(Scaled(x, 2)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError):
        scaled(Scaled("text", 2.0))


@pytest.mark.parametrize("way", ["call", "overload"])
def test_both_ways_give_the_same_derivatives(way):
    def f(x):
        return scaled(Scaled(x, 3.0)) if way == "call" else scaled.overload(x, 3.0)[0]

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = f(x)
    assert dispatch.last("shared_kernels_test::directly_scaled") == "torch"
    assert type(y.grad_fn).__name__ == "BackwardOf_shared_kernels_test_directly_scaledBackward"
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(dx, torch.full_like(x, 3.0))
    assert torch.autograd.gradgradcheck(lambda x: f(x) ** 2, x)
    assert not f(x.detach()).requires_grad


@pytest.mark.parametrize("backend", ["triton", "nowhere"])
def test_both_ways_refuse_a_backend_in_the_same_words(backend):
    said = []
    for run in (scaled.run, scaled.overload):
        with pytest.raises((ValueError, NotImplementedError)) as error:
            run(torch.ones(3), 2.0, None, None, backend)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_the_profiler_names_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        scaled(Scaled(torch.ones(3), 2.0))
    names = {event.key for event in seen.key_averages()}
    assert "shared_kernels_test::directly_scaled" in names


@pytest.mark.parametrize(
    "args",
    [
        (),
        (1.0, None, "auto", True, [1, 2]),
        (torch.ones(2), 2.0),
        (torch.ones(2), 2.0, torch.ones(2, requires_grad=True)),
        (torch.nn.Parameter(torch.ones(2)), None),
        ([torch.ones(2), torch.ones(2, requires_grad=True)], 1),
        (torch.ones(2, requires_grad=True) * 2.0,),
        (torch.ones(2, requires_grad=True).detach(),),
    ],
)
def test_what_old_versions_of_torch_count_as_a_wish_for_a_gradient(args):
    """torch 2.7 has no function for it in C++: the one in Python answers the same."""
    assert direct._any_requires_grad(*args) is direct.any_requires_grad(*args)
