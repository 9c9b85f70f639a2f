"""Every public function on drawn shapes, strides, dtypes and values, extreme ones included.

Each draw is computed twice: by the fast path in its own dtype and by the dense float64 reference
(or by plain float64 PyTorch). What must hold: no crash; no value that is not finite where the exact
answer is, and the other way round; errors within the house's tolerances; inputs left alone.
`hatch run fuzz` runs this with 100 000 draws and, if nothing failed, writes docs/fuzz.md.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adasplash import (
    adasplash,
    entmax_decode,
    lazy_attention_triton,
    triton_entmax,
    triton_entmax15,
    triton_sparsemax,
)
from difflayers import Hopfield, apply_diffusion, energy, retrieve
from diffmax import diffmax_bisect, diffmax_loss, sparsity_stats
from dsalt.kernels import dsalt_attention, hybrid_energy, select_landmarks
from flashdiffusion import FlashDiffusion
from flashdiffusion._reference import flash_diffusion as dense_diffusion
from shared_kernels import pairwise
from shared_kernels.testing import assert_close

TOTAL = int(os.environ.get("FUZZ_CASES", "400"))
PAGE = Path(__file__).resolve().parent.parent / "docs" / "fuzz.md"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
counts: dict[str, int] = {}
FUNCTIONS: dict[str, object] = {}


def fuzzed(draw_case):
    """Register a function of `draw` that returns (ours, exact): callables without arguments."""
    FUNCTIONS[draw_case.__name__] = draw_case
    return draw_case


# --------------------------------------------------------------------------------------- strategies

floats = st.sampled_from(DTYPES)
single = st.sampled_from(DTYPES[:2])
sizes = st.one_of(st.integers(0, 3), st.integers(0, 90))
some = st.one_of(st.integers(1, 3), st.integers(1, 90))


@st.composite
def tensors(draw, shape, dtype, scale=(1e-3, 0.1, 1.0, 5.0), special=()):
    """A tensor of the shape with any strides, spread and a few special entries."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, dtype=torch.float64) * draw(st.sampled_from(scale))
    if draw(st.booleans()):  # ties
        x = x.round()
    if special and x.numel() and draw(st.booleans()):
        where = torch.randint(x.numel(), (draw(st.integers(1, 4)),))
        x.view(-1)[where] = draw(st.sampled_from(special))
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "every other", "expanded"]))
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "every other" and x.dim():
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded" and x.dim() and x.shape[0]:
        x = x[:1].expand_as(x)
    return x


ODD = (-torch.inf, torch.inf, torch.nan, 0.0)
HUGE = (1e-3, 1.0, 30.0, 1e4)


def doubled(*inputs):
    return [x.detach().double() for x in inputs]


# --------------------------------------------------------------------------------------- rows


def rows(draw):
    shape = tuple(draw(st.lists(sizes.filter(lambda n: n < 40), min_size=1, max_size=3)))
    x = draw(tensors(shape, draw(floats), HUGE, (*ODD, 6e4, -6e4)))
    return x, draw(st.integers(-len(shape), len(shape) - 1))


@fuzzed
def diffmax_weights(draw):
    (x, dim), alpha = rows(draw), draw(st.floats(0.02, 0.98))
    return (
        lambda: diffmax_bisect(x, alpha, dim),
        lambda: diffmax_bisect(x.double(), alpha, dim, backend="reference"),
        (x,),
    )


@fuzzed
def entmax_weights(draw):
    (x, dim), alpha = rows(draw), draw(st.floats(1.0, 2.0))
    return (
        lambda: triton_entmax(x, alpha, dim=dim),
        lambda: triton_entmax(x.double(), alpha, dim=dim, backend="reference"),
        (x,),
    )


@fuzzed
def named_entmax_weights(draw):
    x, dim = rows(draw)
    function, alpha = draw(st.sampled_from([(triton_entmax15, 1.5), (triton_sparsemax, 2.0)]))
    return (
        lambda: function(x, dim=dim),
        lambda: triton_entmax(x.double(), alpha, dim=dim, backend="reference"),
        (x,),
    )


@fuzzed
def loss(draw):
    B, N = draw(some), draw(st.integers(1, 30))
    x, alpha = draw(tensors((B, N), draw(single))), draw(st.floats(0.05, 0.95))
    target = torch.randint(N, (B,))
    return (
        lambda: diffmax_loss(x, target, alpha),
        lambda: diffmax_loss(x.double(), target, alpha),
        (x,),
    )


@fuzzed
def stats(draw):
    x = draw(tensors((draw(sizes), draw(some)), torch.float32))
    weights = diffmax_bisect(x, 0.5)
    live = max(len(x), 1)

    def ours():
        found = sparsity_stats(weights)
        assert all(isinstance(value, float) for value in found.values())
        return torch.tensor([found["sparsity"] if len(x) else 0.0, found["max_prob"]])

    def exact():
        zeros = (weights == 0).double().mean() if len(x) else torch.tensor(0.0)
        return torch.stack([zeros.double(), weights.double().amax(-1).sum() / live])

    return ours, exact, (x,)


# ------------------------------------------------------------------------------------ attention


def qkv(draw, square=False):
    B, H_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    N_k, D = draw(sizes), draw(st.sampled_from([1, 2, 8, 33]))
    N_q = N_k if square else draw(sizes)
    dtype = draw(single)
    shapes = (B, H_kv * group, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D)
    return [draw(tensors(shape, dtype)) for shape in shapes]


@fuzzed
def attention(draw):
    q, k, v = qkv(draw)
    options = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["mask"] = torch.rand(q.shape[2], k.shape[2]) < draw(st.sampled_from([0.1, 0.7]))
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 40))
    if draw(st.booleans()):
        options["varlen"] = torch.randint(0, k.shape[2] + 1, (q.shape[0],))
        if q.shape[2] != k.shape[2]:
            del options["varlen"]
    alpha = draw(st.floats(1.0, 2.0))
    return (
        lambda: adasplash(q, k, v, alpha, **options),
        lambda: adasplash(*doubled(q, k, v), alpha, **options, backend="reference"),
        (q, k, v),
    )


@fuzzed
def attention_gradients(draw):
    q, k, v = qkv(draw)
    alpha, causal = draw(st.floats(1.05, 1.95)), draw(st.booleans())

    def both(q, k, v, **options):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = adasplash(*leaves, alpha, is_causal=causal, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return torch.cat([g.flatten() for g in torch.autograd.grad((out * weight).sum(), leaves)])

    return (
        lambda: both(q, k, v),
        lambda: both(*doubled(q, k, v), backend="reference"),
        (q, k, v),
    )


@fuzzed
def decoding(draw):
    q, k, v = qkv(draw)
    q = q[:, :, :1]
    if not q.shape[2] or not k.shape[2]:
        return None
    lengths = torch.randint(1, k.shape[2] + 1, (q.shape[0],))
    alpha = draw(st.floats(1.0, 2.0))
    return (
        lambda: entmax_decode(q, k, v, lengths, alpha),
        lambda: entmax_decode(*doubled(q, k, v), lengths, alpha, backend="reference"),
        (q, k, v),
    )


@fuzzed
def lazy(draw):
    q, k, v = qkv(draw, square=True)
    window = draw(st.integers(1, 30))
    bias = draw(tensors((q.shape[1], window + 1), q.dtype))
    tau = draw(tensors((q.shape[1],), q.dtype, scale=(0.5, 2.0)))
    return (
        lambda: lazy_attention_triton(q, k, v, bias, tau, window),
        lambda: lazy_attention_triton(*doubled(q, k, v, bias, tau), window, backend="reference"),
        (q, k, v, bias, tau),
    )


@fuzzed
def windows_and_landmarks(draw):
    q, k, v = qkv(draw, square=True)
    B, H, N, _ = q.shape
    hard = draw(st.booleans())
    windows = torch.randint(0, 50, (B, H, N)) if hard else 50 * torch.rand(B, H, N)
    landmarks = torch.randint(-1, max(N, 1), (B, H, draw(st.integers(0, 6))))
    return (
        lambda: dsalt_attention(q, k, v, windows, landmarks),
        lambda: dsalt_attention(*doubled(q, k, v), windows, landmarks, backend="reference"),
        (q, k, v),
    )


@fuzzed
def landmarks(draw):
    """Their choice: only earlier blocks, no duplicate, −1 in empty slots."""
    B, H, N, K = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(some),
        draw(st.integers(1, 9)),
    )
    block = draw(st.sampled_from([1, 4, 32]))
    x = draw(tensors((B, N, 8), draw(single)))
    scores = hybrid_energy(
        x, torch.randn(H, 8, 4, dtype=x.dtype), torch.full((H,), 0.5), causal=True
    )

    def ours():
        lists = select_landmarks(scores, K, landmark_block=block)
        for c in range(lists.shape[2]):
            chosen = lists[:, :, c]
            assert bool(((chosen >= -1) & (chosen < max(c * block, 1))).all())
            assert int((chosen >= 0).sum(-1).max()) <= c * block
            for row in chosen.flatten(0, 1):
                held = row[row >= 0]
                assert len(held.unique()) == len(held) == min(K, c * block)
        return scores

    return ours, lambda: scores.double(), (x,)


# --------------------------------------------------------------------------------- points, memories


@fuzzed
def diffusion(draw):
    dtype = draw(single)
    n, m, d = draw(some), draw(some), draw(st.integers(1, 5))
    Q, K = draw(tensors((n, d), dtype)), draw(tensors((m, d), dtype))
    V = draw(tensors((m, draw(st.integers(1, 4))), dtype))
    options = {"beta": draw(st.sampled_from([0.01, 0.5, 5.0])), "normalize": "row"}
    options["score_mod"] = draw(st.sampled_from(["sqeuclidean", "dot", "l1"]))
    alpha = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return (
        lambda: FlashDiffusion(Q, K, V, alpha=alpha, **options),
        lambda: dense_diffusion(*doubled(Q, K, V), alpha=alpha, **options),
        (Q, K, V),
    )


@fuzzed
def neighbours(draw):
    X = draw(tensors((draw(st.integers(2, 90)), draw(st.integers(1, 6))), draw(single)))
    k = draw(st.integers(1, len(X) - 1))
    exact = torch.cdist(X.double(), X.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = exact.square().fill_diagonal_(torch.inf).sort(-1).values[:, :k]
    return lambda: pairwise.knn(X, k, exclude_self=True)[0], lambda: exact, (X,)


@fuzzed
def retrieval(draw):
    dtype, d = draw(single), draw(st.integers(1, 9))
    memory, query = draw(tensors((draw(some), d), dtype)), draw(tensors((draw(sizes), d), dtype))
    beta = draw(st.sampled_from([0.1, 1.0, 4.0]))
    separation = draw(st.sampled_from(["softmax", "entmax15", "sparsemax"]))

    def update(memory, query):
        return retrieve(memory, query, beta=beta, steps=1, separation=separation).patterns

    alpha = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}[separation]

    def exact():
        m, q = doubled(memory, query)
        return triton_entmax(beta * q @ m.T, alpha, backend="reference") @ m

    return lambda: update(memory, query), exact, (memory, query)


@fuzzed
def hopfield_energy(draw):
    dtype, d = draw(single), draw(st.integers(1, 9))
    memory, query = draw(tensors((draw(some), d), dtype)), draw(tensors((draw(sizes), d), dtype))
    beta = draw(st.sampled_from([0.1, 1.0, 10.0]))

    def exact():
        m, q = doubled(memory, query)
        return -torch.logsumexp(beta * q @ m.T, -1) / beta + q.square().sum(-1) / 2

    return lambda: energy(memory, query, beta), exact, (memory, query)


@fuzzed
def hopfield_layer(draw):
    dtype, B, L = draw(single), draw(st.integers(1, 3)), draw(some)
    stored, state = draw(tensors((B, draw(some), 8), dtype)), draw(tensors((B, L, 8), dtype))
    layer = Hopfield(
        input_size=8, num_heads=2, separation=draw(st.sampled_from(["softmax", "sparsemax"]))
    )

    def run(layer, stored, state):
        return layer((stored, state, stored)).detach()

    exact = run(layer.double(), *doubled(stored, state))
    layer = layer.to(dtype)
    return lambda: run(layer, stored, state), lambda: exact, (stored, state)


@fuzzed
def graph_diffusion(draw):
    dtype, N = draw(single), draw(st.integers(1, 30))
    x = draw(tensors((N, 3), dtype))
    W = torch.rand(N, N, dtype=torch.float64)
    W = (W + W.T).fill_diagonal_(0)
    L = torch.eye(N) - W / W.sum(-1, keepdim=True).clamp(min=1e-12)
    steps = draw(st.integers(1, 4))

    def exact():
        out = x.double()
        for _ in range(steps):
            out = out - 0.5 * L @ out
        return out

    return (
        lambda: apply_diffusion(x, L.to(dtype), 0.5, mode="iterative", steps=steps),
        exact,
        (x,),
    )


# -------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_crash_no_wrong_answer_no_silent_nan(name):
    @settings(
        max_examples=max(1, TOTAL // len(FUNCTIONS)),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def run(data):
        case = FUNCTIONS[name](data.draw)
        if case is None:
            return
        ours, exact, inputs = case
        kept = [x.clone() for x in inputs]
        out = ours()
        assert all(
            torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(inputs, kept, strict=True)
        )
        kind = "gradient" if "gradients" in name else "forward"
        assert_close(out, exact().to(torch.float64), kind)
        counts[name] = counts.get(name, 0) + 1

    run()


def test_other_dtypes_are_refused_by_name():
    x = torch.ones(2, 3, dtype=torch.int64)
    for call in (
        lambda: diffmax_bisect(x),
        lambda: triton_entmax(x),
        lambda: adasplash(x[None, None], x[None, None], x[None, None]),
    ):
        with pytest.raises(TypeError, match="`[a-zX]+` must be"):
            call()


@pytest.fixture(scope="module", autouse=True)
def page():
    """Write what came of a long run: one in which no function failed has all the counts."""
    start = time.perf_counter()
    yield
    if not os.environ.get("WRITE_FUZZ") or set(counts) != set(FUNCTIONS):
        return
    lines = [f"| {name.replace('_', ' ')} | {n} |\n" for name, n in counts.items()]
    minutes = (time.perf_counter() - start) / 60
    PAGE.write_text(
        f"""# What a long fuzz found

`hatch run fuzz`, {time.strftime("%Y-%m-%d")}, torch {torch.__version__}, {minutes:.0f} minutes:
{sum(counts.values())} of {TOTAL} draws left something to compare. In none was there a crash, an
input changed, a value that is not finite where the exact answer is, or the other way round, or an
error beyond the tolerances of the tests.

| function | cases |
|---|---|
{"".join(lines)}""",
        encoding="utf-8",
    )


def test_softmax_is_the_limit_on_odd_values_too():
    x = torch.tensor([[1.0, -torch.inf, 3.0], [-torch.inf] * 3, [torch.nan, 1.0, 2.0]])
    weights = triton_entmax(x, 1.0)
    assert_close(weights[0], F.softmax(x[0], -1))
    assert (weights[1] == 0).all() and weights[2].isnan().all()
