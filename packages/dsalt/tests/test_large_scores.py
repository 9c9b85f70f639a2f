"""Scores of any size: sums of weights keep their digits beside 1e8 in fp32, kept apart from it."""

from __future__ import annotations

import math

import torch

from dsalt.kernels import dsalt_attention
from shared_kernels.testing import assert_close, pairwise

from .cases import NATIVE

SIZES = (1.0, 1e4, 1e8, 1e16)
OPTIONS = ("soft", "hard", "gates", "gates between", "lists", "packed", "last queries", "scaled")
BACKENDS = ("torch", NATIVE, "normalizer")  # the latter: softmax as one
H, N = 2, 70


def case(option, size, dtype):
    """Inputs whose scores are `size` and a few steps more, exactly, and the other arguments."""
    torch.manual_seed(0)
    digit = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size))
    step = max(2.0**-4, 4 * digit)
    base = torch.full((1, H, N), math.floor(size / step) * step, dtype=torch.float64)
    if dtype == torch.bfloat16:  # which holds the powers of 2
        step = max(2.0**-4, 4 * torch.finfo(torch.float32).eps * 2.0 ** math.floor(math.log2(size)))
        base = torch.full_like(base, 2.0 ** math.floor(math.log2(size)))
    n_q = 30 if option == "last queries" else N
    given = {
        "Q": torch.ones(1, H, n_q, 2, dtype=torch.float64),
        "K": torch.stack((base, torch.randint(0, 6, (1, H, N)) * step), -1),
        "V": torch.randn(1, H, N, 2, dtype=torch.float64),
        "window_sizes": 8 + 8 * torch.rand(1, H, n_q, dtype=torch.float64),
    }
    block = 8 if option == "lists" else None
    lists = (-(-N // 8), 5) if block else (5,)
    options = {
        "landmark_idx": torch.randint(-1, N, (1, H, *lists), dtype=torch.int32),
        "landmark_block": block,
        "scale": 1.0,
    }
    if option == "hard":
        options["window_sizes"] = given.pop("window_sizes").round().to(torch.int64)
    if option == "gates":
        given["landmark_bias"] = -step * torch.randint(0, 3, (1, H, *lists)).double()
    if option == "gates between":  # no score of that size holds one
        given["landmark_bias"] = 1 - 3 * torch.rand(1, H, *lists).double()
    if option == "packed":
        options["cu_seqlens"] = torch.tensor([0, 33, N], dtype=torch.int32)
    if option == "scaled":  # the scores are rounded, in the kernels their differences are not
        options["scale"] = -1.0
    return given, options


def gradients(given, options, backend, dtype):
    """The output and the gradients, that of Q divided by the keys' large coordinate.

    Weights sum to 1, so that what multiplies this coordinate cancels but for its rounding.
    """
    x = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
    how = {"normalizer": torch.softmax} if backend == "normalizer" else {"backend": backend}
    o = dsalt_attention(**x, **options, **how)
    d_out = torch.linspace(-1, 1, o.numel(), dtype=dtype, device=o.device).view_as(o)
    found = dict(zip(x, torch.autograd.grad(o, x.values(), d_out), strict=True))
    found["Q"] = found["Q"] / given["K"].amax((0, 1, 2)).clamp(min=1).to(dtype)
    return o, found


def check(option, size, dtype, backend, where="cpu"):
    given, options = case(option, size, dtype)
    # the reference gets what the type holds
    given = {name: x.to(dtype).double().to(where) for name, x in given.items()}
    options = {k: x.to(where) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    out, ours = gradients(given, options, backend, dtype)
    exact, theirs = gradients(given, options, "reference", torch.float64)
    assert_close(out, exact)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], "gradient")


@pairwise(
    backend=BACKENDS,
    dtype=(torch.float32, torch.float64),
    size=SIZES,
    option=OPTIONS,
)
def test_attention(backend, dtype, size, option):
    check(option, size, dtype, backend)


@pairwise(
    backend=BACKENDS,
    dtype=(torch.float32, torch.float64),
    gate=(-math.inf, -200.0, -80.0, 0.0, 80.0),
    size=(1.0, 30.0),
    whole=[False, True],
)
def test_gates_of_any_size(backend, dtype, gate, size, whole):
    """Beside windows that end at a key, too, where the edge has no derivative: that of `w` is 0."""
    torch.manual_seed(0)
    windows = 12 * torch.rand(1, H, N, dtype=torch.float64)
    given = {name: torch.randn(1, H, N, 8, dtype=torch.float64) for name in "QKV"}
    given |= {"Q": size * given["Q"], "window_sizes": windows.round() if whole else windows}
    given["landmark_bias"] = gate + torch.randn(1, H, 5, dtype=torch.float64)
    given = {name: x.to(dtype).double() for name, x in given.items()}
    options = {"landmark_idx": torch.randint(0, N, (1, H, 5), dtype=torch.int32)}
    out, ours = gradients(given, options, backend, dtype)
    exact, theirs = gradients(given, options, "reference", torch.float64)
    assert_close(out, exact)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], "gradient")
