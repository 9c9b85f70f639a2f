"""Lazy attention: the CPU path against the reference, and what the published kernel gets wrong."""

from __future__ import annotations

import functools

import pytest
import torch

from adasplash import LazyAttention, _ops, lazy_attention_triton
from adasplash._call import Lazy
from shared_kernels import native
from shared_kernels.testing import (
    assert_close,
    compare,
    contracts,
    measure_memory,
    parametrize,
    poisoned_empty,
)

from .cases import BACKENDS
from .lazy_cases import BY_NAME, HIDING, LAZY, assert_hidden, hiding_inputs, inputs

TAUS = (-1.0, -0.3, 0.0, 0.5)


def check(case, tau, dtype, backend="torch"):
    tensors, options = inputs(case, tau)
    compare(
        lambda **x: lazy_attention_triton(**x, **options, backend=backend),
        lambda **x: lazy_attention_triton(**x, **options, backend="reference"),
        tensors,
        differentiable=list(tensors),
        dtype=dtype,
    )


@parametrize(LAZY)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(case, tau, backend, dtype):
    check(case, tau, dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types(backend, dtype):
    check(BY_NAME["grouped"], 0.5, dtype, backend)


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_bias_of_minus_infinity_hides(hiding, tau, backend, dtype):
    tensors, options = hiding_inputs(hiding, tau)
    distance = torch.arange(37)[:, None] - torch.arange(37)
    finite = tensors["bias"].nan_to_num(neginf=0.0)
    seen = tensors["bias"][:, distance.clamp(min=0)].isfinite()  # what a mask must say

    def run(backend, **x):
        return lazy_attention_triton(**x, **options, backend=backend)

    def with_a_mask(bias, **x):
        # the biases of hidden pairs are part of the graph, and of no score
        return lazy_attention_triton(
            bias=torch.where(bias.isfinite(), bias, finite.to(bias)),
            **x,
            **options,
            mask=seen,
            backend="reference",
        )

    ours = functools.partial(run, backend)
    compare(ours, with_a_mask, tensors, differentiable=list(tensors), dtype=dtype)
    assert_hidden(hiding, {name: x.to(dtype) for name, x in tensors.items()}, ours)


@pytest.mark.parametrize("scale", [0.25, -0.25])
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_product_of_minus_infinity_hides(backend, scale):
    tensors, options = inputs(BY_NAME["plain"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    tensors["q"] = tensors["q"].abs() * 1e25
    tensors["k"] *= 1e-25
    tensors["k"][:, :, 9] = -1e25 if scale > 0 else 1e25
    run = functools.partial(lazy_attention_triton, **options, scale=scale, backend=backend)
    out = run(**tensors)
    tensors["v"][:, :, 9] += 1
    assert out.isfinite().all()
    assert torch.equal(run(**tensors), out)


@pytest.mark.parametrize("tau", [-1.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_hides_no_nan(tau, backend):
    tensors, options = hiding_inputs("all distances", tau)
    tensors = {name: x.float() for name, x in tensors.items()}
    tensors["k"][1, 0, 20, 3] = torch.nan
    out = lazy_attention_triton(**tensors, **options, backend=backend)
    right = lazy_attention_triton(**tensors, **options, backend="reference")
    assert torch.equal(out.isnan(), right.isnan()) and right[1, 1, 20:].isnan().all()
    assert not out[:, 1, :20].any() and not out[0, 1].any()


@pytest.mark.parametrize("tau", [-1.0, 0.5])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles(tau, backend, dtype):
    check(BY_NAME["grouped"].replaced("long", N=300, B=1, window_size=70), tau, dtype, backend)
    wide = {"N": 90, "D": 130, "D_v": 70, "window_size": 300, "mask": True}
    check(BY_NAME["plain"].replaced("wide", **wide), tau, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_row_is_zero_at_the_start(backend):
    tensors, options = inputs(BY_NAME["plain"], -1.0)
    tensors = {name: x.float() for name, x in tensors.items()}
    out = lazy_attention_triton(**tensors, **options, backend=backend)
    assert bool((out[:, :, 0] == 0).all()) and bool((out[:, :, 5] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_future_leaks_above_zero(backend):
    tensors, options = inputs(BY_NAME["plain"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    before = lazy_attention_triton(**tensors, **options, backend=backend)
    tensors["k"][:, :, 20:] += 3
    tensors["v"][:, :, 20:] -= 5
    after = lazy_attention_triton(**tensors, **options, backend=backend)
    assert torch.equal(after[:, :, :20], before[:, :, :20])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_spoils_the_rows_that_see_it_and_no_others(backend):
    tensors, options = inputs(BY_NAME["plain"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    clean = lazy_attention_triton(**tensors, **options, backend=backend)
    tensors["k"][0, 1, 20, 3] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = lazy_attention_triton(**leaves, **options, backend=backend)
    assert out[0, 1, 20:].isnan().all()
    assert torch.equal(out[0, 1, :20], clean[0, 1, :20]) and torch.equal(out[1], clean[1])
    (dq,) = torch.autograd.grad(out.sum(), [leaves["q"]])
    assert dq[0, 1, 20:].isnan().all() and dq[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_zero_and_does_not_matter(backend):
    tensors, options = inputs(BY_NAME["varlen"], 0.5)
    tensors = {name: x.float() for name, x in tensors.items()}
    options["backend"] = backend
    clean = lazy_attention_triton(**tensors, **options)
    for b, n in enumerate(options["varlen"].tolist()):
        for name in "qkv":
            tensors[name][b, :, n:] = torch.nan
    with poisoned_empty():
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        out = lazy_attention_triton(**leaves, **options)
        grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert torch.equal(out, clean)
    for b, n in enumerate(options["varlen"].tolist()):
        assert bool((out[b, :, n:] == 0).all())
        for grad in grads[:3]:
            assert bool((grad[b, :, n:] == 0).all())
    assert all(bool(grad.isfinite().all()) for grad in grads)


def attend(q, k, v, backend):
    bias, tau = torch.zeros(q.shape[1], 9), torch.zeros(q.shape[1])
    return lazy_attention_triton(q, k, v, bias, tau, 8, backend=backend)


class TestTorchLazyAttention(contracts.AttentionContract):
    attend = staticmethod(functools.partial(attend, backend="torch"))
    always_causal = True
    cross = False
    N_memory = 4096


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
class TestNativeLazyAttention(TestTorchLazyAttention):
    attend = staticmethod(functools.partial(attend, backend="native"))


@pytest.mark.system
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear_with_every_gradient(backend):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 8192, 8).unbind())
    bias = torch.zeros(1, 513, requires_grad=True)
    tau = torch.full((1,), -1.0, requires_grad=True)
    used = measure_memory(
        lambda: lazy_attention_triton(q, k, v, bias, tau, backend=backend).sum().backward()
    )
    assert used.peak < 60 * 2**20, used  # one score matrix: 256 MB


class TestLazyOp(contracts.OpContract):
    op = staticmethod(_ops.lazy.overload)

    def samples(self):
        for name in ("grouped", "varlen"):
            t, o = inputs(BY_NAME[name], 0.5)
            t = {key: x.float().requires_grad_() for key, x in t.items()}
            yield Lazy(**t, **o, scale=0.25).check()


BAD = [
    ({"bias": torch.zeros(2, 5)}, "`bias` must have shape"),
    ({"tau": torch.zeros(3)}, "`tau` must have shape"),
    ({"window_size": -1}, "`window_size` must be at least 0"),
    ({"k": torch.zeros(2, 2, 3, 16, dtype=torch.float64)}, "must have"),
    ({"varlen": torch.tensor([3, 99])}, "`varlen` must be in"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_input(bad, message):
    tensors, options = inputs(BY_NAME["plain"], 0.0)
    with pytest.raises(ValueError, match=message):
        lazy_attention_triton(**{**tensors, **options, **bad})


def test_module_is_its_formula():
    torch.manual_seed(0)
    block = LazyAttention(24, 3, window_size=5).double()
    torch.nn.init.normal_(block.attention_biases)
    torch.nn.init.constant_(block.tau, -0.4)
    x = torch.randn(2, 11, 24, dtype=torch.float64)

    def heads(project):
        return project(x).view(2, 11, 3, 8).transpose(1, 2)

    def rope(y):
        angle = torch.arange(11).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
        turn = torch.polar(torch.ones(11, 4, dtype=torch.float64), angle)
        z = torch.complex(y[..., :4], y[..., 4:]) * turn
        return torch.cat([z.real, z.imag], -1)

    out = lazy_attention_triton(
        rope(heads(block.q_proj)),
        rope(heads(block.k_proj)),
        heads(block.v_proj),
        block.attention_biases,
        block.tau,
        5,
        backend="reference",
    )
    assert_close(block(x), block.o_proj(out.transpose(1, 2).reshape(2, 11, 24)))


def test_module_names_and_gradients():
    block = LazyAttention(dim=32, num_heads=4, window_size=8)
    names = ["attention_biases", "tau", *(f"{n}_proj.weight" for n in "qkvo")]
    assert sorted(block.state_dict()) == sorted(names)
    block(torch.randn(2, 20, 32)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in block.parameters())
    mask = torch.ones(20, 20, dtype=torch.bool)
    x = torch.randn(2, 20, 32)
    assert torch.equal(block(x, mask), block(x))
    mask[:, 3] = False
    assert not torch.equal(block(x, mask), block(x))
    with pytest.raises(ValueError, match="`dim` must be an even multiple"):
        LazyAttention(30, 6)
