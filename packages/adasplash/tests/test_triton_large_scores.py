"""Scores of any size in the kernels: what ``test_large_scores.py`` asks of the other backends."""

from __future__ import annotations

import pytest
import torch

from shared_kernels.testing import assert_close, others_thorough, pairwise

from .cases import PER_HEAD
from .kernels import WHERE, nothing_unwritten, pytestmark  # noqa: F401
from .test_large_scores import (
    OPTIONS,
    SIZES,
    SMALLEST,
    all_derivatives,
    assert_lazy_right,
    assert_right,
    case,
    decoded,
    gradients,
    lazy_case,
    lazy_derivatives,
    lazy_gradients,
    lazy_smallest_case,
    smallest_case,
)

DTYPES = (torch.float32, torch.bfloat16)
# What leaves an absolute threshold no digit in fp32; under --thorough the other sizes, too.
LARGE_FIRST = others_thorough(sorted(SIZES, key=lambda size: size != 1e8))


def rounded(k, dtype):
    """Keys whose large coordinates ``dtype`` holds: bf16 does so for powers of 2."""
    if dtype == torch.bfloat16:
        k = torch.stack((2.0 ** k[..., 0].log2().floor(), k[..., 1]), -1)
    return k


@pairwise(
    dtype=DTYPES,
    size=LARGE_FIRST,
    option=(*OPTIONS, "scaled"),
    alpha=(1.02, 1.25, 1.5, 1.7, 2.0, PER_HEAD),
    N=[9, 70],
)
def test_attention(dtype, size, option, alpha, N):
    given, options = case(option, size, torch.float32, alpha, N)
    if option == "scaled":  # the scores are rounded, their differences are not
        options["scale"] = -0.7
    given["k"] = rounded(given["k"], dtype)
    given = {name: x.to(dtype).double().to(WHERE) for name, x in given.items()}
    options = {k: x.to(WHERE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    *_, out, ours = gradients(given, options, "triton", dtype)
    *_, exact, theirs = gradients(given, options, "reference", torch.float64)
    assert_close(out, exact)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], "gradient")


@pytest.mark.parametrize("size", LARGE_FIRST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_lazy(dtype, size, scale):
    q, k, *others = lazy_case(size, torch.float32, 70, equal=False)
    given = [x.to(dtype).double().to(WHERE) for x in (q, rounded(k, dtype), *others)]
    out, *ours = lazy_gradients(given, "triton", dtype, scale)
    exact, *theirs = lazy_gradients(given, "reference", torch.float64, scale)
    assert_close(out, exact)
    for gradient, right in zip(ours, theirs, strict=True):
        assert_close(gradient, right, "gradient")


@pytest.mark.parametrize("size", LARGE_FIRST)
@pytest.mark.parametrize("sink", [None, 0, 1, -2])
def test_decoding(sink, size):
    assert_close(*decoded("triton", sink, size, WHERE))


HALF_TYPES_TOO = (torch.float32, torch.float16, torch.bfloat16)


@pairwise(dtype=HALF_TYPES_TOO, alpha=(1.5, 2.0, 1.3, PER_HEAD), option=SMALLEST)
def test_the_smallest_number_of_a_type_hides_less_than_minus_infinity(dtype, alpha, option):
    N = 70 if "causal" in option else 20  # several tiles once
    given, options = smallest_case(option, dtype, N, alpha)
    given["bias"][..., -4, ::2] = torch.finfo(dtype).min / 2
    given["bias"][..., -4, 1::2] = torch.finfo(dtype).min
    exact = all_derivatives(given, options, "reference", torch.float64, WHERE)
    assert_right(all_derivatives(given, options, "triton", dtype, WHERE), exact)


@pytest.mark.parametrize("dtype", HALF_TYPES_TOO)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_smallest_number_of_a_type_hides_no_key_of_lazy_attention(dtype, scale):
    given = lazy_smallest_case(dtype, 20)
    exact = lazy_derivatives(given, "reference", torch.float64, scale, WHERE)
    assert_lazy_right(lazy_derivatives(given, "triton", dtype, scale, WHERE), exact)
