"""The packages verify each other: one quantity, computed by two that share no formula.

Every identity holds in values and in gradients. The left side is the package's own public function,
the right side another package's or plain PyTorch. The largest deviation that was seen of each, over
all shapes and parameters drawn, is docs/identities.md: `hatch run identities` writes that page.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash import LazyAttention, adasplash, entmax_decode, lazy_attention_triton, triton_entmax
from difflayers import DiffusedHopfield, GraphBuilder, Hopfield, apply_diffusion
from difflayers.functional import retrieve
from diffmax import diffmax_bisect
from dsalt.kernels import dsalt_attention
from dsalt.modules import DSALTAttention
from flashdiffusion import DiffusionMap, FlashDiffusion, knn_bandwidth
from shared_kernels import pairwise, qexp
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

DTYPES = (torch.float32, torch.float64)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# What is shown on the page, in its order: key → statement.
IDENTITIES = {
    "diffmax": "diffmax(x, α) = triton_entmax(x, 2 − α)",
    "solver": "diffmax(x, α) = shared_kernels.qexp.entmax(x, 2 − α)",
    "attention": "adasplash(q, k, v, α) = diffmax(q kᵀ/√D, 2 − α) v",
    "rows": "adasplash(q, k, v, α) = triton_entmax(q kᵀ/√D, α) v",
    "softmax": "adasplash(q, k, v, 1) = SDPA(q, k, v)",
    "decode": "entmax_decode(last q, cache) = last row of adasplash(q, k, v)",
    "windows": "dsalt_attention(w ≥ N, no landmarks) = SDPA(causal)",
    "all landmarks": "dsalt_attention(w = 0, all tokens landmarks) = SDPA(causal)",
    "window entmax": "dsalt_attention(w, normalizer=entmax) = adasplash(window=w + 1, causal)",
    "lazy": "lazy_attention_triton(τ = 0, bias = 0) = SDPA(causal)",
    "lazy layer": "LazyAttention(τ = 0, bias = 0) = DSALTAttention(w ≥ N, k_lmk = 0)",
    "diffusion": "FlashDiffusion(α = 0, dot score, row) = SDPA",
    "hopfield": "one Hopfield update = SDPA with scale β",
    "hopfield entmax": "one update with separation=diffmax(α) = adasplash(2 − α, scale=β)",
    "graph": "DiffusedHopfield's neighbours = flashdiffusion's nearest neighbours",
    "heat": "(I − L)ᵗ on the full kernel graph = t steps of FlashDiffusion(symmetric)",
    "eta": "DiffusedHopfield(η = 0) = Hopfield",
    "map": "eigenvectors of DiffusionMap = eigenvectors of FlashDiffusion's operator",
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "identities.md"
PAGE_HEAD = """# What holds between the packages

The packages check each other: each line is one quantity, computed by two of them or by one of
them and PyTorch (SDPA is its `scaled_dot_product_attention`). The tests draw shapes, scales and
parameters at random and compare values and, where both sides have them, gradients of a random
projection; the page shows the largest deviation seen, relative to the larger of 1 and the largest
entry. The lines about entmax share the threshold solver of shared-kernels, whose own tests hold it
against bisection. This page is written by `hatch run identities`.

| identity | float32: values | gradients | float64: values | gradients |
|---|---|---|---|---|
"""
seen: dict[tuple[str, torch.dtype, str], float] = defaultdict(float)


@pytest.fixture(scope="module", autouse=True)
def page():
    """Write the page when asked to, from what this run has seen."""
    yield
    if not os.environ.get("WRITE_IDENTITIES"):
        return
    kinds = [(dtype, kind) for dtype in DTYPES for kind in ("forward", "gradient")]
    rows = []
    for key, statement in IDENTITIES.items():
        cells = [seen.get((key, *column)) for column in kinds]
        rows.append(
            " | ".join(
                [statement, *("–" if x is None else f"{x:.0e}" if x else "0" for x in cells)]
            )
        )
    PAGE.write_text(PAGE_HEAD + "".join(f"| {row} |\n" for row in rows), encoding="utf-8")


def close(key, a, b, kind="forward", scale=1.0):
    """Assert, and remember how far apart the two were."""
    assert_close(a, b, kind=kind, scale=scale)
    size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    apart = (a - b).abs().max().item() / size if b.numel() else 0.0
    seen[key, a.dtype, kind] = max(seen[key, a.dtype, kind], apart)


def leaves(*shapes, dtype=torch.float64, scale=1.0):
    """Random tensors that want a gradient."""
    return [(scale * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def same(key, one, other, inputs, scale=1.0):
    """Two functions of `inputs` agree in value and in the gradient of a random projection."""
    a, b = one(*inputs), other(*inputs)
    close(key, a, b, scale=scale)
    weight = torch.randn_like(b)
    for x, y in zip(
        torch.autograd.grad((a * weight).sum(), inputs),
        torch.autograd.grad((b * weight).sum(), inputs),
        strict=True,
    ):
        close(key, x, y, "gradient", scale)


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


def matrices(layer):
    """The four projections of an attention layer: q, k, v, out."""
    return [
        getattr(layer, name).weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
        if hasattr(layer, name)
    ]


# What hypothesis draws.
some = settings(max_examples=40)
dtypes = st.sampled_from(DTYPES)
alphas = st.floats(0.05, 0.95)
sizes = st.integers(1, 70)
scales = st.sampled_from([0.1, 1.0, 3.0])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def attention_inputs(draw, square=False):
    """q, k, v that want gradients, of one dtype, with grouped heads or not."""
    torch.manual_seed(draw(seeds))
    B, H_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    N_k, D, D_v = (
        draw(sizes),
        draw(st.sampled_from([4, 16, 40])),
        draw(st.sampled_from([4, 16, 40])),
    )
    N_q = N_k if square else draw(sizes)
    shapes = (B, H_kv * group, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D if square else D_v)
    return leaves(*shapes, dtype=draw(dtypes), scale=draw(scales))


def per_head(k, q):
    """Keys or values, repeated for each head of the queries."""
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def test_the_page_shows_every_identity():
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(PAGE_HEAD)
    shown = [line[2:].split(" | ")[0] for line in page[len(PAGE_HEAD) :].splitlines()]
    assert shown == list(IDENTITIES.values())
    # each line holds figures, and none is beyond what the tests allow
    for line in page[len(PAGE_HEAD) :].splitlines():
        cells = [cell.strip(" |") for cell in line.split(" | ")[1:]]
        assert cells[0] != "–" and cells[2] != "–"
        for cell, (dtype, kind) in zip(
            cells, [(t, k) for t in DTYPES for k in ("forward", "gradient")], strict=True
        ):
            assert cell == "–" or float(cell) <= 2 * tolerance(dtype, kind)


# -------------------------------------------------------------------------------- rows of weights


@some
@given(
    alpha=alphas,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    dtype=dtypes,
    seed=seeds,
    scale=scales,
)
def test_diffmax_is_entmax_of_two_minus_alpha(alpha, shape, dtype, seed, scale):
    torch.manual_seed(seed)
    (x,) = leaves(shape, dtype=dtype, scale=scale)
    a = torch.full((shape[0], 1), alpha, dtype=dtype, requires_grad=True)
    same("diffmax", lambda x, a: diffmax_bisect(x, a), lambda x, a: triton_entmax(x, 2 - a), (x, a))
    same("solver", lambda x: diffmax_bisect(x, alpha), lambda x: qexp.entmax(x, 2 - alpha), (x,))


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


@some
@given(qkv=attention_inputs(), alpha=alphas, causal=st.booleans())
def test_adasplash_is_normalised_scores_times_values(qkv, alpha, causal):
    def attention(q, k, v):
        return adasplash(q, k, v, 2 - alpha, is_causal=causal)

    def dense(weights):
        return lambda q, k, v: weights(scores_of(q, per_head(k, q), causal)) @ per_head(v, q)

    same("attention", attention, dense(lambda x: diffmax_bisect(x, alpha)), qkv)
    same("rows", attention, dense(lambda x: triton_entmax(x, 2 - alpha)), qkv)


@some
@given(qkv=attention_inputs(square=True))
def test_softmax_attention_by_four_packages(qkv):
    q, k, v = qkv
    (B, H, N, _), dtype = q.shape, q.dtype
    bias, tau = torch.zeros(H, 9, dtype=dtype), torch.zeros(H, dtype=dtype)
    windows, no_landmark = everything(B, H, N)
    every = torch.arange(N).expand(B, H, N)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, per_head(k, q), per_head(v, q), is_causal=True)

    same("softmax", lambda q, k, v: adasplash(q, k, v, 1.0, is_causal=True), torchs, qkv)
    same("windows", lambda q, k, v: dsalt_attention(q, k, v, windows, no_landmark), torchs, qkv)
    same("all landmarks", lambda q, k, v: dsalt_attention(q, k, v, 0 * windows, every), torchs, qkv)
    same(
        "lazy",
        lambda q, k, v: lazy_attention_triton(q, k, v, bias, tau, window_size=8),
        torchs,
        qkv,
    )


@some
@given(qkv=attention_inputs(square=True), alpha=alphas)
def test_decoding_is_the_last_row(qkv, alpha):
    q, k, v = qkv
    B, N = q.shape[0], q.shape[2]
    same(
        "decode",
        lambda q, k, v: entmax_decode(q[:, :, -1:], k, v, torch.full((B,), N), 2 - alpha),
        lambda q, k, v: adasplash(q, k, v, 2 - alpha, is_causal=True)[:, :, -1:],
        qkv,
    )


@some
@given(qkv=attention_inputs(square=True), window=st.integers(0, 80), alpha=alphas)
def test_dsalt_with_entmax_is_adasplash_under_the_same_window(qkv, window, alpha):
    (B, H, N, _) = qkv[0].shape
    windows, landmarks = torch.full((B, H, N), window), everything(B, H, N)[1]
    same(
        "window entmax",
        lambda q, k, v: dsalt_attention(
            q, k, v, windows, landmarks, normalizer=lambda x, dim: qexp.entmax(x, 2 - alpha, dim)
        ),
        # dsalt's window counts the keys behind the token, adasplash's the token too
        lambda q, k, v: adasplash(q, k, v, 2 - alpha, is_causal=True, window=window + 1),
        qkv,
    )


@some
@given(dtype=dtypes, B=st.integers(1, 2), N=sizes, heads=st.sampled_from([1, 2, 4]), seed=seeds)
def test_two_layers_with_rotary_positions_agree(dtype, B, N, heads, seed):
    """Two layers of two packages, the one's weights in the other: projections, rotation, scale."""
    torch.manual_seed(seed)
    lazy = LazyAttention(32, heads, window_size=16).to(dtype)
    dsalt = DSALTAttention(32, heads, n_min=N, n_max=N + 1, k_lmk=0).to(dtype).eval()
    with torch.no_grad():
        lazy.attention_biases.zero_()
        lazy.tau.zero_()
        for ours, theirs in zip(matrices(lazy), matrices(dsalt), strict=True):
            ours.copy_(theirs)
    (x,) = leaves((B, N, 32), dtype=dtype)
    same("lazy layer", lazy, lambda x: dsalt(x)[0], (x,))


@some
@given(dtype=dtypes, N_q=sizes, N_k=sizes, D_v=st.integers(1, 9), seed=seeds)
def test_diffusion_without_density_is_attention(dtype, N_q, N_k, D_v, seed):
    torch.manual_seed(seed)
    Q, K, V = (x.detach() for x in leaves((N_q, 16), (N_k, 16), (N_k, D_v), dtype=dtype))
    out = FlashDiffusion(Q, K, V, beta=0.25, alpha=0.0, score_mod="dot", normalize="row")
    close("diffusion", out, F.scaled_dot_product_attention(Q, K, V, scale=0.25))


# --------------------------------------------------------------------------------------- memories


@some
@given(dtype=dtypes, S=sizes, L=sizes, alpha=alphas, beta=st.floats(0.1, 3.0), seed=seeds)
def test_one_hopfield_update_is_attention_over_the_memory(dtype, S, L, alpha, beta, seed):
    torch.manual_seed(seed)
    inputs = leaves((S, 16), (L, 16), dtype=dtype)

    def update(separation):
        return lambda memory, query: (
            retrieve(memory, query, beta=beta, steps=1, separation=separation).patterns
        )

    def attend(memory, query):
        q, k = query[None, None], memory[None, None]
        return adasplash(q, k, k, 2 - alpha, scale=beta)[0, 0]

    sparse = update(lambda scores, dim: diffmax_bisect(scores, alpha, dim))
    same("hopfield entmax", sparse, attend, inputs)
    same(
        "hopfield",
        update("softmax"),
        lambda memory, query: F.scaled_dot_product_attention(query, memory, memory, scale=beta),
        inputs,
    )


@some
@given(dtype=dtypes, S=st.integers(3, 40), L=sizes, seed=seeds)
def test_no_diffusion_is_no_diffusion(dtype, S, L, seed):
    torch.manual_seed(seed)
    options = {"input_size": 16, "num_heads": 2}
    plain, diffused = Hopfield(**options).to(dtype), DiffusedHopfield(eta=0.0, **options).to(dtype)
    diffused.load_state_dict(plain.state_dict())
    inputs = leaves((2, S, 16), (2, L, 16), dtype=dtype)
    same("eta", lambda k, q: diffused((k, q, k)), lambda k, q: plain((k, q, k)), inputs)


# ------------------------------------------------------------------------------------------ graphs


@some
@given(dtype=dtypes, N=st.integers(8, 60), k=st.integers(1, 6), seed=seeds)
def test_the_graph_of_a_memory_is_flashdiffusions(dtype, N, k, seed):
    """On unit vectors the largest cosine is the smallest distance."""
    torch.manual_seed(seed)
    points = F.normalize(torch.randn(N, 4, dtype=dtype), dim=-1)
    distances, nearest = pairwise.knn(points, k, exclude_self=True)
    edges = torch.zeros(N, N, dtype=torch.bool).scatter_(1, nearest, True)
    cosine = GraphBuilder(points).cosine_similarity().knn(k=k, sparse=False)
    W = cosine.normalized_laplacian().build().W
    positive = points @ points.T > 0  # difflayers keeps no edge of similarity 0 or less
    assert torch.equal(W > 0, (edges | edges.T) & positive)
    radius = torch.as_tensor(knn_bandwidth(points.numpy(), k), dtype=dtype)
    close("graph", distances[:, -1].sqrt().to(dtype), radius)


@some
@given(dtype=dtypes, N=st.integers(5, 50), steps=st.integers(1, 4), seed=seeds)
def test_diffusion_on_the_full_graph_is_a_power_of_the_operator(dtype, N, steps, seed):
    torch.manual_seed(seed)
    points, signal = torch.randn(N, 3, dtype=dtype), torch.randn(N, 2, dtype=dtype)
    unit = torch.eye(N, dtype=dtype)
    operator = FlashDiffusion(points, points, unit, beta=0.5, alpha=0.0)
    walked = signal
    for _ in range(steps):
        walked = FlashDiffusion(points, points, walked, beta=0.5, alpha=0.0)
    laplacian = unit - operator
    spread = apply_diffusion(signal, laplacian, eta=1.0, mode="iterative", steps=steps)
    close("heat", spread, walked)


@each_dtype
def test_the_map_s_eigenvectors_are_the_operator_s(dtype):
    points = torch.randn(120, 3, dtype=dtype)
    dm = DiffusionMap(beta=0.3, alpha=1.0, n_components=4, tol=1e-7).fit(points.numpy())
    vectors = torch.as_tensor(dm.eigenvectors_, dtype=dtype)
    values = torch.as_tensor(dm.eigenvalues_, dtype=dtype)
    moved = FlashDiffusion(points, points, vectors, beta=0.3, alpha=1.0, normalize="row")
    close("map", moved, values * vectors)
