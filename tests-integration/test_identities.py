"""The packages verify each other: one quantity, computed by two that share no formula.

Every identity holds in values and in gradients. The left side is the package's own public function,
the right side another package's or plain PyTorch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adasplash import adasplash, lazy_attention_triton, triton_entmax
from difflayers.functional import retrieve
from diffmax import diffmax_bisect
from dsalt.kernels import dsalt_attention
from flashdiffusion import FlashDiffusion
from shared_kernels import pairwise, qexp
from shared_kernels.testing import assert_close

DTYPES = (torch.float32, torch.float64)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_alpha = pytest.mark.parametrize("alpha", [0.1, 0.5, 0.77])


def leaves(*shapes, dtype=torch.float64, scale=1.0):
    """Random tensors that want a gradient."""
    return [(scale * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def same(one, other, inputs, scale=1.0):
    """Two functions of `inputs` agree in value and in the gradient of a random projection."""
    a, b = one(*inputs), other(*inputs)
    assert_close(a, b, scale=scale)
    weight = torch.randn_like(b)
    for x, y in zip(
        torch.autograd.grad((a * weight).sum(), inputs),
        torch.autograd.grad((b * weight).sum(), inputs),
        strict=True,
    ):
        assert_close(x, y, kind="gradient", scale=scale)


def scores_of(q, k, causal=False):
    """q kᵀ / √D, −inf where causality hides a key."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def everything(B, H, N):
    """Windows that reach every token, and no landmark."""
    return torch.full((B, H, N), N), torch.full((B, H, 1), -1)


# -------------------------------------------------------------------------------- rows of weights


@each_dtype
@each_alpha
@pytest.mark.parametrize("N", [1, 2, 37, 300])
def test_diffmax_is_entmax_of_two_minus_alpha(alpha, N, dtype):
    x, a = leaves((5, N), (5, 1), dtype=dtype, scale=3.0)
    a = (0 * a + alpha).detach().requires_grad_()
    same(lambda x, a: diffmax_bisect(x, a), lambda x, a: triton_entmax(x, 2 - a), (x, a))
    same(lambda x: diffmax_bisect(x, alpha), lambda x: qexp.entmax(x, 2 - alpha), (x,))


@each_dtype
def test_diffmax_tends_to_softmax_and_to_sparsemax(dtype):
    (x,) = leaves((6, 40), dtype=dtype, scale=2.0)
    nearly = 1e-6
    near_softmax, near_sparse = diffmax_bisect(x, 1 - nearly), diffmax_bisect(x, nearly)
    # the distance to the limit is of the order of alpha's
    assert (near_softmax - x.softmax(-1)).abs().max() < 100 * nearly
    assert (near_sparse - qexp.sparsemax(x)).abs().max() < 100 * nearly


NORMALIZERS = {
    "diffmax": lambda x, alpha: diffmax_bisect(x, alpha),
    "adasplash": lambda x, alpha: triton_entmax(x, 2 - alpha),
    "shared": lambda x, alpha: qexp.entmax(x, 2 - alpha),
}


@each_dtype
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_what_a_mask_hides_weighs_exactly_nothing(name, alpha, dtype):
    """Also in rows that keep one entry, whose threshold is the lowest that there is."""
    x = 3 * torch.randn(400, 6, dtype=dtype)
    hidden = torch.rand(400, 6) < 0.5
    hidden[:, 0] = False
    x = x.masked_fill(hidden, -torch.inf).requires_grad_()
    weights = NORMALIZERS[name](x, alpha)
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(x)).sum(), x)
    assert (weights[hidden] == 0).all() and (gradient[hidden] == 0).all()
    assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))


# -------------------------------------------------------------------------------------- attention


@each_dtype
@each_alpha
@pytest.mark.parametrize("causal", [False, True])
def test_adasplash_is_diffmax_of_the_scores(alpha, causal, dtype):
    qkv = leaves((2, 3, 33, 16), (2, 3, 33, 16), (2, 3, 33, 8), dtype=dtype, scale=1.5)
    same(
        lambda q, k, v: adasplash(q, k, v, 2 - alpha, is_causal=causal),
        lambda q, k, v: diffmax_bisect(scores_of(q, k, causal), alpha) @ v,
        qkv,
    )


@each_dtype
def test_softmax_attention_four_times(dtype):
    """adasplash(α=1) = dsalt(w ≥ N, no landmark) = lazy(τ=0, no bias) = PyTorch's."""
    B, H, N, D = 2, 3, 41, 16
    qkv = leaves((B, H, N, D), (B, H, N, D), (B, H, N, D), dtype=dtype)
    bias, tau = torch.zeros(H, 9, dtype=dtype), torch.zeros(H, dtype=dtype)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    same(lambda q, k, v: adasplash(q, k, v, 1.0, is_causal=True), torchs, qkv)
    same(lambda q, k, v: dsalt_attention(q, k, v, *everything(B, H, N)), torchs, qkv)
    same(lambda q, k, v: lazy_attention_triton(q, k, v, bias, tau, window_size=8), torchs, qkv)


@each_dtype
@pytest.mark.parametrize("window", [0, 1, 7, 100])
def test_dsalt_with_entmax_is_adasplash_under_the_same_window(window, dtype):
    B, H, N, D = 2, 2, 50, 16
    qkv = leaves((B, H, N, D), (B, H, N, D), (B, H, N, D), dtype=dtype, scale=1.5)
    windows, landmarks = torch.full((B, H, N), window), everything(B, H, N)[1]
    same(
        lambda q, k, v: dsalt_attention(
            q, k, v, windows, landmarks, normalizer=lambda x, dim: qexp.entmax(x, 1.5, dim)
        ),
        # dsalt's window counts the keys behind the token, adasplash's the token too
        lambda q, k, v: adasplash(q, k, v, 1.5, is_causal=True, window=window + 1),
        qkv,
    )


@each_dtype
def test_diffusion_without_density_is_attention(dtype):
    Q, K, V = leaves((60, 16), (47, 16), (47, 5), dtype=dtype)
    out = FlashDiffusion(
        Q.detach(), K.detach(), V.detach(), beta=0.25, alpha=0.0, score_mod="dot", normalize="row"
    )
    assert_close(out, F.scaled_dot_product_attention(Q, K, V, scale=0.25).detach())


# --------------------------------------------------------------------------------------- memories


@each_dtype
@each_alpha
def test_one_hopfield_update_is_attention_over_the_memory(alpha, dtype):
    memory, query = leaves((40, 16), (7, 16), dtype=dtype)
    beta = 0.7

    def update(memory, query):
        found = retrieve(
            memory,
            query,
            beta=beta,
            steps=1,
            separation=lambda scores, dim: diffmax_bisect(scores, alpha, dim),
        )
        return found.patterns

    def attend(memory, query):
        q, k = query[None, None], memory[None, None]
        return adasplash(q, k, k, 2 - alpha, scale=beta)[0, 0]

    same(update, attend, (memory, query))


@each_dtype
def test_nearest_neighbours_are_those_with_the_largest_kernel(dtype):
    """shared_kernels' exact kNN against flashdiffusion's kernel, column by column."""
    points = torch.randn(80, 3, dtype=dtype)
    _, nearest = pairwise.knn(points, 5, exclude_self=True)
    unit = torch.eye(80, dtype=dtype)
    kernel = FlashDiffusion(points, points, unit, beta=1.0, normalize="none").fill_diagonal_(0)
    assert torch.equal(nearest.sort(-1).values, kernel.topk(5).indices.sort(-1).values)
