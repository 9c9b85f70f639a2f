"""Scores of any size: thresholds keep their digits beside 1e8 in fp32, kept apart from it."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash import PagedCache, _paged_torch, adasplash, entmax_decode, lazy_attention_triton
from shared_kernels.testing import assert_close, pairwise

from .cases import BACKENDS, PER_HEAD

FLOATS = (torch.float32, torch.float64)
SIZES = (1.0, 1e4, 1e8, 1e16)
OPTIONS = ("plain", "sink", "sink above", "sink below", "bias", "bias and sink", "hidden", "causal")


def scores_near(size, dtype, H, N):
    """q and k whose products are `size` and a few steps more, exactly; and a step."""
    digit = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size))
    step = max(2.0**-4, 4 * digit)
    base = torch.full((1, H, N), math.floor(size / step) * step + 0.0, dtype=torch.float64)
    steps = torch.randint(0, 6, (1, H, N)) * step
    q = torch.ones(1, H, 5, 2, dtype=torch.float64)
    return q, torch.stack((base, steps.double()), -1), step


def case(option, size, dtype, alpha, N):
    torch.manual_seed(0)
    H = 2
    q, k, step = scores_near(size, dtype, H, N)
    given = {"q": q, "k": k, "v": torch.randn(1, H, N, 3, dtype=torch.float64)}
    options = {"scale": 1.0, "alpha": alpha}
    if alpha == PER_HEAD:
        options.pop("alpha")
        given["alpha"] = torch.tensor([1.5, 1.7], dtype=torch.float64)
    top = k.sum(-1).amax(-1).view(H)
    if "sink" in option:
        given["s_aux"] = top + step * {"sink above": 1, "sink below": -2}.get(option, 0)
    if "bias" in option:
        given["bias"] = -step * torch.randint(0, 3, (1, H, 5, N)).double()
    if option == "hidden":
        options["mask"] = torch.rand(1, 1, 5, N) < 0.5
        options["mask"][..., 1, :] = False
    if option == "causal":
        options["is_causal"] = True
    return given, options


def gradients(given, options, backend, dtype, create_graph=False):
    """The inputs, the gradient from above, the output, and its gradients.

    Weights sum to 1, so that in the gradient of q what multiplies the large coordinate of k cancels
    but for its rounding: it is given divided by that coordinate.
    """
    x = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
    o = adasplash(**x, **options, backend=backend)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=dtype, device=o.device).view_as(o)
    d_out.requires_grad_(create_graph)
    found = torch.autograd.grad(o, x.values(), d_out, create_graph=create_graph)
    first = dict(zip(x, found, strict=True))
    first["q"] = first["q"] / given["k"].amax((0, 1, 2)).clamp(min=1).to(dtype)
    return x, d_out, o, first


def derivatives(given, options, backend, dtype):
    """The output, its gradients, and second derivatives that do not multiply large keys."""
    x, d_out, o, first = gradients(given, options, backend, dtype, create_graph=True)
    asked = sum(
        (
            first[name] * torch.linspace(-1, 1, first[name].numel(), dtype=dtype).view_as(x[name])
        ).sum()
        for name in ("v", "s_aux", "bias")
        if name in x
    )
    of = {name: t for name, t in {**x, "d_out": d_out}.items() if name != "q"}
    found = torch.autograd.grad(asked, of.values(), materialize_grads=True)
    return o, first, dict(zip(of, found, strict=True))


@pairwise(
    backend=BACKENDS,
    dtype=FLOATS,
    size=SIZES,
    option=OPTIONS,
    alpha=(1.0, 1.02, 1.25, 1.5, 1.7, 2.0, PER_HEAD),
    N=[9, 300],
)
def test_attention(backend, dtype, size, option, alpha, N):
    given, options = case(option, size, dtype, alpha, N)
    out = derivatives(given, options, backend, dtype)
    exact = derivatives(given, options, "reference", torch.float64)
    assert_close(out[0], exact[0])
    for ours, theirs in zip(out[1:], exact[1:], strict=True):
        for name, gradient in ours.items():
            assert_close(gradient, theirs[name], "gradient")


def lazy_case(size, dtype, N, equal):
    """q, k, v, bias and tau; with ``equal`` keys all scores of a row are the same."""
    torch.manual_seed(0)
    q, k, _ = scores_near(size, dtype, 2, N)
    q, k = q[:, :, :1].expand(-1, -1, N, -1), k[:, :, :1].expand_as(k) if equal else k
    v, bias = torch.randn(1, 2, N, 3).double(), torch.zeros(2, 4).double()
    return q, k, v, bias, torch.tensor([-0.3, 0.2]).double()


def lazy_gradients(given, backend, dtype, scale=1.0):
    """The output and the gradients of everything, that of q as in :func:`gradients`."""
    x = [t.to(dtype).requires_grad_() for t in given]
    o = lazy_attention_triton(*x, window_size=3, scale=scale, backend=backend)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=dtype, device=o.device).view_as(o)
    dq, *others = torch.autograd.grad(o, x, d_out)
    return o, dq / given[1].amax((0, 1, 2)).clamp(min=1).to(dtype), *others


@pytest.mark.parametrize("size", (*SIZES, 1e6))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [(5, True, 1.0), (5, False, 1.0), (90, False, -0.5)])
def test_lazy(backend, dtype, size, case):
    N, equal, scale = case
    given = lazy_case(size, dtype, N, equal)
    out, *ours = lazy_gradients(given, backend, dtype, scale)
    exact, *theirs = lazy_gradients(given, "reference", torch.float64, scale)
    assert_close(out, exact)
    for gradient, right in zip(ours, theirs, strict=True):
        assert_close(gradient, right, "gradient")


def decoded(backend, sink, size, where="cpu", alpha=1.5):
    """The output of decoding 300 keys, and what the reference says."""
    torch.manual_seed(0)
    q, k, step = scores_near(size, torch.float32, 2, 300)
    q, k, v = (x.to(where) for x in (q[:, :, :1], k, torch.randn(1, 2, 300, 3).double()))
    cache = PagedCache(40, 2, 2, 3, page_size=16, device=where)
    cache.add(k.float(), v.float())
    options = {"scale": 1.0}
    if sink is not None:
        options["s_aux"] = k.sum(-1).amax(-1).view(2) + step * sink
    out = entmax_decode(q.float(), cache, alpha=alpha, **options, backend=backend)
    return out, adasplash(q, k, v, alpha, **options, backend="reference")


@pairwise(backend=BACKENDS, sink=[None, 0, 1, -2], size=SIZES, alpha=[1.5, 1.1, 1.7, 2.0])
def test_decoding(backend, sink, size, alpha, monkeypatch):
    monkeypatch.setattr(_paged_torch, "_SHORT", 1)
    assert_close(*decoded(backend, sink, size, alpha=alpha))


SMALLEST = ("sink", "causal and grouped", "window and mask", "lengths and slopes")


def smallest_case(option, dtype, N, alpha=1.5):
    """Rows of the smallest number of ``dtype``: alone, beside others, beside -inf, and hidden."""
    torch.manual_seed(0)
    H, least = 2, torch.finfo(dtype).min
    bias = torch.zeros(1, 1, N, N, dtype=dtype)
    rows = bias[0, 0, -10:]
    rows[0] = least
    rows[1, 1:] = least
    rows[2] = -torch.inf
    rows[3:5] = least
    rows[3, ::3] = rows[4, : N // 2] = -torch.inf
    rows[5] = least
    rows[5, ::5] = -least / 2
    rows[6, ::2] = max(least / 2, -1e29)
    rows[6, 1::2] = max(least, -2e29)
    H_kv = 1 if "grouped" in option else H
    shapes = {"q": (1, H, N, 4), "k": (1, H_kv, N, 4), "v": (1, H_kv, N, 4)}
    # whole quarters: beside the smallest number of fp16, products have all of their digits in fp32
    given = {name: (4 * torch.randn(n)).round() / 4 for name, n in shapes.items()}
    given = {name: t.to(dtype) for name, t in given.items()} | {"bias": bias}
    options = {"alpha": alpha, "is_causal": "causal" in option}
    if alpha == PER_HEAD:
        options.pop("alpha")
        given["alpha"] = torch.tensor([1.0, 1.75], dtype=dtype)
    if "window" in option:
        options["window"] = N // 3
    if "mask" in option:
        options["mask"] = torch.rand(1, 1, N, N) < 0.3
        options["mask"][..., -9:-6, 0] = False
    if "lengths" in option:
        options["varlen"] = torch.tensor([N - 1])
    if "slopes" in option:
        options["alibi_slopes"] = torch.tensor([0.25, 0.0625])
    if "sink" in option:
        given["s_aux"] = torch.tensor([least, 0.0], dtype=dtype)
    return given, options


def all_derivatives(given, options, backend, dtype, where="cpu"):
    """The output, and the gradients of all that is given, by name."""
    x = {name: t.to(where, dtype).requires_grad_() for name, t in given.items()}
    options = {k: t.to(where) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
    o = adasplash(**x, **options, backend=backend)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).to(given["q"].dtype)
    found = torch.autograd.grad(o, x.values(), d_out.to(o).view_as(o))
    return o, dict(zip(x, found, strict=True))


def assert_right(found, exact):
    """A row of -inf gives zeros, one of the smallest number does not; all is the reference's."""
    (out, ours), (right, theirs) = found, exact
    assert_close(out, right.to(out))
    assert not out[..., -8, :].any() and not ours["bias"][..., -8, :].any()
    assert out[..., -10, :].any() and out[..., -6, :].any()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name].to(gradient), "gradient")


@pairwise(
    dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float64],
    alpha=[1.5, 2.0, 1.3, 1.0, PER_HEAD],
    option=SMALLEST,
    backend=BACKENDS,
)
def test_the_smallest_number_of_a_type_hides_less_than_minus_infinity(
    dtype, alpha, option, backend
):
    """A row of nothing else weighs all that it sees alike, and one of -inf nothing."""
    given, options = smallest_case(option, dtype, 150, alpha)
    exact = all_derivatives(given, options, "reference", torch.float64)
    assert_right(all_derivatives(given, options, backend, dtype), exact)


def lazy_smallest_case(dtype, N):
    """Biases of the smallest number of ``dtype``: for every distance, and for the near ones."""
    torch.manual_seed(0)
    bias, least = torch.zeros(2, N, dtype=torch.float64), torch.finfo(dtype).min
    bias[0], bias[1, :5] = least, least
    q, k, v = ((4 * torch.randn(1, H, N, 4)).round() / 4 for H in (2, 1, 1))
    return [t.to(dtype) for t in (q, k, v, bias, torch.tensor([-0.5, 0.25]))]


def lazy_derivatives(given, backend, dtype, scale, where="cpu"):
    """The output, and the gradients of all that is given."""
    x = [t.to(where, dtype).requires_grad_() for t in given]
    o = lazy_attention_triton(*x, window_size=len(given[3][0]) - 1, scale=scale, backend=backend)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).to(given[0].dtype)
    return o, *torch.autograd.grad(o, x, d_out.to(o).view_as(o))


def assert_lazy_right(found, exact):
    assert_close(found[0], exact[0].to(found[0]))
    for gradient, right in zip(found[1:], exact[1:], strict=True):
        assert_close(gradient, right.to(gradient), "gradient")


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_number_of_a_type_hides_no_key_of_lazy_attention(backend, dtype, scale):
    given = lazy_smallest_case(dtype, 90)
    exact = lazy_derivatives(given, "reference", torch.float64, scale)
    assert_lazy_right(lazy_derivatives(given, backend, dtype, scale), exact)
