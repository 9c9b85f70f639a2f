"""FlashDiffusion's tiled path against the dense specification."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdiffusion import FlashDiffusion, _reference
from shared_kernels.testing import assert_close, assert_no_worse, measure_memory, parametrize

from .cases import CASES, FLOAT32, ROUNDING, inputs, power_score


@parametrize(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_dense_operator(case, dtype):
    Q, K, V, kwargs = inputs(case, dtype)
    out = FlashDiffusion(Q, K, V, **kwargs, tile=32, backend="cpu")
    exact = _reference.flash_diffusion(Q.double(), K.double(), V.double(), **kwargs)
    assert out.dtype == dtype and out.shape == exact.shape
    assert_close(out, exact)


@parametrize([c for c in CASES if c.name in ("symmetric", "row-of-two-sets", "dot-rows")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(case, dtype):
    Q, K, V, kwargs = inputs(case, dtype)
    out = FlashDiffusion(Q, K, V, **kwargs, tile=32)
    exact = _reference.flash_diffusion(Q.double(), K.double(), V.double(), **kwargs)
    eager = _reference.flash_diffusion(Q, K, V, **kwargs)
    assert out.dtype == dtype
    assert_no_worse(out, eager=eager, exact=exact)


@parametrize(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_can_be_asked_for(case, dtype):
    Q, K, V, kwargs = inputs(case, dtype)
    out = FlashDiffusion(Q, K, V, **kwargs, backend="reference")
    assert out.dtype == dtype
    if dtype != torch.bfloat16:
        h = kwargs["h"]
        plain = {**kwargs, "h": None if h is None else h.to(dtype)}
        assert torch.equal(out, _reference.flash_diffusion(Q, K, V, **plain))
    assert_close(out, FlashDiffusion(Q, K, V, **kwargs, backend="cpu"))


def test_the_reference_of_numpy_arrays_empty_sets_and_other_precisions():
    X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    out = FlashDiffusion(X, X, X[:, 0], backend="reference", precision="float64")
    assert isinstance(out, np.ndarray) and out.dtype == np.float32 and out.shape == (50,)
    double = X.astype(np.float64)
    exact = FlashDiffusion(double, double, double[:, 0], backend="reference")
    assert np.array_equal(out, exact.astype(np.float32))
    for normalize in ("row", "none"):
        empty = FlashDiffusion(X, X[:0], X[:0], normalize=normalize, backend="reference")
        assert np.array_equal(empty, np.zeros_like(X))
        none = FlashDiffusion(X[:0], X, X, normalize=normalize, backend="reference")
        assert none.shape == (0, 3)


def test_numpy_in_numpy_out():
    X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    for V in (X, X[:, 0]):
        out = FlashDiffusion(X, X, V)
        assert isinstance(out, np.ndarray) and out.dtype == np.float32 and out.shape == V.shape
        assert_close(torch.from_numpy(out), FlashDiffusion(*map(torch.from_numpy, (X, X, V))))
    # what numpy offers: another byte order, reversed strides, integers
    exact = FlashDiffusion(X.astype(np.float64), X.astype(np.float64), X[:, 0].astype(np.float64))
    big = X.astype(">f8")
    np.testing.assert_allclose(FlashDiffusion(big, big, big[:, 0]), exact, rtol=ROUNDING)
    flipped = FlashDiffusion(big[::-1], big[::-1], big[::-1, 0])
    np.testing.assert_allclose(flipped[::-1], exact, rtol=ROUNDING)
    assert FlashDiffusion([[0], [1]], [[0], [1]], [1, 0]).dtype == np.float64


def test_auto_compares_by_value():
    X = torch.randn(40, 2)
    V = torch.randn(40)
    assert torch.equal(FlashDiffusion(X, X.clone(), V), FlashDiffusion(X, X, V))
    symmetric = FlashDiffusion(X, X, V, normalize="symmetric")
    assert torch.equal(FlashDiffusion(X, X, V), symmetric)
    moved = X.clone()
    moved[0, 0] += 1e-3
    assert torch.equal(FlashDiffusion(X, moved, V), FlashDiffusion(X, moved, V, normalize="row"))


def test_alpha_zero_on_dot_scores_is_attention():
    q, k, v = torch.randn(70, 16), torch.randn(90, 16), torch.randn(90, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    out = FlashDiffusion(q, k, v, beta=16**-0.5, alpha=0.0, score_mod="dot", normalize="row")
    assert_close(out, exact)
    out = FlashDiffusion(q, q, v[:70], 16**-0.5, 0.0, score_mod="dot", normalize="row")
    exact = torch.nn.functional.scaled_dot_product_attention(q[None], q[None], v[None, :70])[0]
    assert_close(out, exact)


def test_a_far_query_takes_its_nearest_key():
    K = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    Q = torch.tensor([[200.0, 0.0], [0.1, 0.0]])  # exp(-200^2) is 0 in every format
    for alpha in (0.0, 0.5, 1.0):
        out = FlashDiffusion(Q, K, torch.eye(3), beta=1.0, alpha=alpha)
        assert bool(out.isfinite().all())
        assert_close(out[0], torch.tensor([0.0, 1.0, 0.0]))
        assert_close(out.sum(1), torch.ones(2))


def test_doob_function_of_any_scale_and_range():
    X = torch.randn(60, 2)
    V = torch.randn(60, 3)
    h = torch.rand(60) + 0.1
    assert_close(FlashDiffusion(X, X, V, h=h), FlashDiffusion(X, X, V, h=h * 1e-30))
    wide = torch.logspace(-37, 37, 60)
    exact = _reference.flash_diffusion(X.double(), X.double(), V.double(), h=wide.double())
    assert_close(FlashDiffusion(X, X, V, h=wide), exact)


@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_translation_changes_nothing(shift):
    X = torch.randn(200, 3, dtype=torch.float64)
    V = torch.randn(200, 2, dtype=torch.float64)
    assert_close(FlashDiffusion(X + shift, X + shift, V), FlashDiffusion(X, X, V))
    # in float32 the points themselves are rounded: compare with the exact map of the rounded ones
    Y = (X + shift).float()
    assert_close(FlashDiffusion(Y, Y, V.float()), FlashDiffusion(Y.double(), Y.double(), V))


def test_auto_precision_saves_what_float32_exponents_lose():
    # beta |x|^2 = 4e4: float32 exponents are wrong in the third decimal
    X = torch.randn(300, 3) * 10.0 + 50.0
    X[1::2] = X[::2] + 0.02 * torch.randn(150, 3)
    V = torch.randn(300)
    exact = FlashDiffusion(X.double(), X.double(), V.double(), beta=100.0)
    assert_close(FlashDiffusion(X, X, V, beta=100.0), exact)
    # products of float32 rows lose them; the native backend subtracts coordinates
    rough = FlashDiffusion(X, X, V, beta=100.0, precision="float32", backend="torch")
    assert (rough - exact).abs().max() > 1e-3


@pytest.mark.parametrize("normalize", ["none", "symmetric", "row"])
def test_skipped_tiles_keep_the_stated_bound(normalize):
    X = torch.randn(600, 2) * 20.0
    V = torch.randn(600, 2)
    exact = _reference.flash_diffusion(
        X.double(), X.double(), V.double(), 1.0, 0.5, normalize=normalize
    )
    for tol in (1e-2, 1e-12):
        out = FlashDiffusion(X, X, V, normalize=normalize, tile=32, tile_skip_tol=tol)
        bound = tol * float(V.abs().sum(0).max()) * (1 if normalize == "none" else 4)
        assert (out - exact).abs().max() < bound + FLOAT32
    from flashdiffusion._problem import Problem
    from flashdiffusion._tiles import SKIP, Tiles

    assert (Tiles(Problem(X, None, 1.0), 32, 1e-12).plan() == SKIP).mean() > 0.4


def test_entries_below_the_clamp_are_zero_where_nothing_divides():
    Q, K = torch.zeros(3, 1), torch.full((4, 1), 100.0)
    assert torch.equal(FlashDiffusion(Q, K, torch.ones(4), normalize="none"), torch.zeros(3))


def test_two_threads_give_the_same_answer_and_same_bits_twice():
    X = torch.randn(700, 3)
    V = torch.randn(700, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [FlashDiffusion(X, X, V, normalize=n, tile=64) for n in ("none", "row")]
        torch.set_num_threads(2)
        two = [FlashDiffusion(X, X, V, normalize=n, tile=64) for n in ("none", "row")]
        again = [FlashDiffusion(X, X, V, normalize=n, tile=64) for n in ("none", "row")]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, two, again, strict=True):
        assert_close(a, b)
        assert torch.equal(b, c)


@pytest.mark.system
def test_a_process_that_ends_still_works():
    """Python starts no thread any more when it calls what ``atexit`` was given."""
    lines = (
        "import atexit, torch",
        "from flashdiffusion import FlashDiffusion",
        "torch.set_num_threads(2)",
        "points = torch.randn(3000, 3)",
        "product = lambda: FlashDiffusion(points, points, points, beta=1.0, backend='torch')",
        "exact = product()",
        "atexit.register(lambda: print(torch.equal(product(), exact)))",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "True", found.stderr


@pytest.mark.parametrize("r", [1, 5])
def test_two_threads_take_neighbouring_tiles_at_once(r):
    from flashdiffusion._problem import Problem
    from flashdiffusion._tiles import SKIP
    from flashdiffusion._torch import TorchProducts

    before = torch.get_num_threads()
    X, V = torch.randn(700, 3).mul_(2.0), torch.randn(700, r)
    try:
        torch.set_num_threads(2)
        kernel = TorchProducts(Problem(X, None, 4.0), 32, 1e-9, None)
        panels, plan = kernel.panels(), kernel.tiles.plan()
        out = kernel.matvec(V)
        torch.set_num_threads(1)
        one = kernel.matvec(V)
        assert {width for _, _, width, _ in kernel.panels()} == {1}
    finally:
        torch.set_num_threads(before)
    # each pair that is not skipped is in one panel, the diagonal in one of its own
    covered = [(i, j) for i, start, width, _ in panels for j in range(start, start + width)]
    wanted = [(i, j) for i in range(len(plan)) for j in range(i, len(plan)) if plan[i, j] != SKIP]
    assert sorted(covered) == wanted and len(panels) < len(wanted) < len(plan) ** 2 / 2
    assert all(width == 1 for i, j, width, _ in panels if i == j)
    assert_close(out, torch.exp(-4.0 * torch.cdist(X.double(), X.double()) ** 2) @ V.double())
    assert_close(out, one)


def test_long_float32_sums_are_flushed_into_float64(monkeypatch):
    from flashdiffusion import _torch

    X, V = torch.randn(300, 2), torch.randn(300, 3)
    whole = FlashDiffusion(X, X, V, tile=16)
    monkeypatch.setattr(_torch, "FLUSH_EVERY", 7)
    assert_close(FlashDiffusion(X, X, V, tile=16), whole)


OPTIONS = {
    "symmetric": {},
    "row": {"normalize": "row"},
    "none": {"normalize": "none"},
    "doob": {"h": torch.ones(16384)},
    "dot": {"score_mod": "dot"},
    "cosine": {"score_mod": "cosine", "normalize": "row"},
    "mixed": {"precision": "mixed"},
    "skip": {"tile_skip_tol": 1e-6},
}


@pytest.mark.system
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_changes_the_memory_class(option):
    N = 16384
    kwargs = OPTIONS[option]
    K = torch.randn(N, 2)
    # operators that need not be square get few queries, to save time
    Q = K if option in ("symmetric", "dot", "skip", "mixed") else torch.randn(2000, 2)
    V = torch.ones(N)
    memory = measure_memory(lambda: FlashDiffusion(Q, K, V, beta=0.1, **kwargs))
    assert memory.peak < len(Q) * N * 4 / 4


def test_inputs_are_left_alone():
    X, V, h = torch.randn(50, 6)[:, ::2], torch.randn(50, 2), torch.rand(50) + 0.1
    kept = [t.clone() for t in (X, V, h)]
    for normalize in ("symmetric", "row"):
        FlashDiffusion(X, X, V, h=h, normalize=normalize, tile=16)
    FlashDiffusion(X, X, V, score_mod=power_score)
    for a, b in zip(kept, (X, V, h), strict=True):
        assert torch.equal(a, b)


def test_empty_sets():
    X = torch.zeros(0, 3)
    K, V = torch.randn(4, 3), torch.randn(4, 2)
    for normalize in ("auto", "none"):
        assert FlashDiffusion(X, K, V, normalize=normalize).shape == (0, 2)
        assert torch.equal(
            FlashDiffusion(K, X, V[:0], normalize=normalize), torch.zeros(4, 2)
        )  # no key: zeros
    assert FlashDiffusion(X, X, V[:0]).shape == (0, 2)
    assert FlashDiffusion(K, K, V[:, :0]).shape == (4, 0)


@settings(max_examples=20)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 5),
    st.floats(0.0, 1.0),
    st.floats(1e-3, 1e3),
    st.integers(1, 90),
)
def test_rows_are_weighted_means(N, M, d, alpha, beta, tile):
    g = torch.Generator().manual_seed(N * 1000 + M)
    Q, K = torch.randn(N, d, generator=g), torch.randn(M, d, generator=g)
    V = torch.stack((torch.ones(M), torch.linspace(-1.0, 2.0, M)), 1)
    out = FlashDiffusion(Q, K, V, beta, alpha, tile=tile)
    assert_close(out[:, 0], torch.ones(N))
    assert out[:, 1].min() > -1.0 - 5 * FLOAT32 and out[:, 1].max() < 2.0 + 5 * FLOAT32


def test_denormals_cost_nothing_and_the_setting_is_put_back(monkeypatch):
    from flashdiffusion import _torch

    def flushed():
        return float(torch.tensor(1e-40) * 1.0) == 0.0

    X, V = torch.randn(300, 2) * 6.0, torch.randn(300, 3)
    calls = [
        {"normalize": n, "tile": 32, "score_mod": s}
        for n in ("none", "row", "symmetric")
        for s in (None, "l1")
    ]
    fast = [FlashDiffusion(X, X, V, **call) for call in calls]
    assert not flushed()
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(FlashDiffusion(X, X, V, **calls[0]), fast[0])
        assert flushed() or not torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(False)
    # a processor that cannot
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: False)
    for call, out in zip(calls, fast, strict=True):
        assert_close(FlashDiffusion(X, X, V, **call), out)
    with _torch._no_denormals(torch.device("cpu")) as cut:
        cut_away = cut(torch.tensor([-85.0, -86.0, -200.0]))
    assert cut_away.tolist() == [-85.0, float("-inf"), float("-inf")]


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("sigma", [False, True])
def test_the_plan_of_tile_pairs_holds_for_every_entry(spread, sigma):
    from flashdiffusion._problem import Problem
    from flashdiffusion._tiles import CLAMP_NEEDED_BELOW, PLAIN, SKIP, Tiles

    X = torch.randn(400, 3, dtype=torch.float64) * spread
    scales = (torch.rand(400, dtype=torch.float64) + 0.5,) * 2 if sigma else None
    skip = 1e-9
    tiles = Tiles(Problem(X, None, 1.0, sigma=scales, precision="float64"), 32, skip)
    limit = CLAMP_NEEDED_BELOW[torch.float64]
    kinds, scratch = set(), tiles.scratch()
    for (i, j), kind in np.ndenumerate(tiles.plan()):
        exponents = tiles.exponents(i, j, scratch)
        kinds.add(int(kind))
        if kind == SKIP:
            assert exponents.exp2().max() < skip
        if kind == PLAIN:
            assert exponents.min() > limit
    assert (SKIP in kinds) == (spread == 30.0)


def test_a_ball_proves_what_a_box_does_not():
    from flashdiffusion._problem import Problem
    from flashdiffusion._tiles import PLAIN, Tiles

    # corners of the boxes are 12 apart, points at most 7.8
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    x = x * (3.9 / x.norm(dim=1, keepdim=True))
    assert (Tiles(Problem(x, None, 1.0), 256, None).plan() == PLAIN).all()
