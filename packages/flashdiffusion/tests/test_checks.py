"""Bad input gets one clear sentence."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from flashdiffusion import (
    DiffusionMap,
    FlashDiffusion,
    bgh_bandwidth,
    explain,
    kinetics,
    slow_manifold,
)
from shared_kernels import dispatch, native

FAST = "torch" if native.why_not() else "native"  # what "auto" takes for symmetric products
X = torch.randn(6, 2)
NAN = torch.full((6, 2), float("nan"))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"beta": 0.0}, ValueError, "`beta` must be positive and finite, got 0.0"),
        ({"beta": float("nan")}, ValueError, "`beta`"),
        ({"beta": "bgh"}, TypeError, "`beta` must be a number"),
        ({"alpha": 1.5}, ValueError, r"`alpha` must be in \[0, 1\], got 1.5"),
        ({"alpha": True}, TypeError, "`alpha`"),
        ({"h": torch.zeros(6)}, ValueError, "`h` must be positive"),
        ({"h": torch.ones(5)}, ValueError, "`h` must have shape"),
        ({"h": torch.ones(6), "normalize": "none"}, ValueError, "`h` must be None"),
        ({"Q": NAN}, ValueError, "`Q` must be finite"),
        ({"K": NAN}, ValueError, "`K` must be finite"),
        ({"Q": X[0]}, ValueError, "`Q` must have shape"),
        ({"K": torch.randn(6, 3)}, ValueError, "`K` must have shape"),
        ({"V": torch.randn(5)}, ValueError, "`V` must have shape"),
        ({"V": torch.randn(6).double()}, ValueError, "dtype"),
        ({"Q": torch.zeros(6, 2, dtype=torch.int64)}, TypeError, "floating"),
        ({"Q": csr_matrix(np.eye(2))}, TypeError, "toarray"),
        ({"Q": torch.eye(2).to_sparse()}, TypeError, "to_dense"),
        ({"Q": np.array([["a", "b"]])}, TypeError, "real numbers"),
        ({"score_mod": "l7"}, ValueError, "`score_mod` must be one of"),
        ({"score_mod": lambda x, y: (x * y).sum()}, ValueError, "`score_mod` must return"),
        ({"normalize": "column"}, ValueError, "`normalize` must be one of"),
        ({"K": X + 1.0, "normalize": "symmetric"}, ValueError, "where Q differs from K"),
        ({"precision": "half"}, ValueError, "`precision`"),
        ({"tile": 0}, ValueError, "`tile`"),
        ({"tile_skip_tol": -1.0}, ValueError, "`tile_skip_tol`"),
        ({"backend": "cuda"}, ValueError, "`backend`"),
        ({"backend": "Reference"}, ValueError, "`backend`"),
        ({"V": torch.randn(6).requires_grad_()}, ValueError, "detach"),
    ],
)
def test_flash_diffusion(kwargs, error, words):
    arguments = {"Q": X, "K": X, "V": torch.randn(6), **kwargs}
    with pytest.raises(error, match=words):
        FlashDiffusion(arguments.pop("Q"), arguments.pop("K"), arguments.pop("V"), **arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"beta": -1.0}, ValueError, "`beta` must be positive"),
        ({"beta": "mode"}, ValueError, "`beta` must be one of"),
        ({"alpha": -0.1}, ValueError, "`alpha`"),
        ({"n_components": 30}, ValueError, "`n_components` must be at most 29"),
        ({"n_components": 0}, ValueError, "`n_components`"),
        ({"solver": "qr"}, ValueError, "`solver`"),
        ({"tol": 0.0}, ValueError, "`tol`"),
        ({"precision": "bfloat16"}, ValueError, "`precision` must be one of .*'half'"),
        ({"precision": "half"}, NotImplementedError, "on a CPU float32 is faster"),
        ({"precision": "half", "solver": "lobpcg"}, ValueError, "`solver` must be 'auto' or 'k"),
        ({"landmarks": 31}, ValueError, "`landmarks`"),
        ({"landmarks": [0, 0, 1]}, ValueError, "`landmarks`"),
        ({"landmarks": [0, 40]}, ValueError, "`landmarks`"),
        ({"landmarks": 2, "n_components": 2}, ValueError, "`n_components` must be at most 1"),
        ({"X": np.full((30, 2), np.inf)}, ValueError, "inf"),
        ({"X": np.zeros((1, 2))}, ValueError, "minimum of 2"),
        ({"X": csr_matrix(np.eye(30))}, TypeError, "[Ss]parse"),
        ({"X": np.zeros(30)}, ValueError, "1D array"),
        ({"X": torch.eye(30).to_sparse()}, TypeError, "`X` must be dense"),
    ],
)
def test_diffusion_map(kwargs, error, words):
    arguments = {"beta": 1.0, "n_components": 2, **kwargs}
    points = arguments.pop("X", np.random.default_rng(0).standard_normal((30, 2)))
    with pytest.raises(error, match=words):
        DiffusionMap(**arguments).fit(points)


@pytest.mark.parametrize(
    "kwargs",
    [{"K": X + 1.0}, {"score_mod": "dot"}, {"precision": "float64"}, {"score_mod": "l1"}],
)
def test_a_backend_asked_for_never_falls_back(kwargs):
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run"):
        FlashDiffusion(X, kwargs.pop("K", X), torch.randn(6), backend="triton", **kwargs)


def test_explain_says_why():
    text = explain(X, score_mod="dot")
    matvec, softmax = text.split("flashdiffusion::softmax:\n")
    assert matvec.startswith(f"flashdiffusion::matvec:\n  {FAST}: chosen\n")
    assert "  triton: cannot run: " in matvec and "  reference: can run\n" in matvec
    assert "  torch: chosen\n" in softmax
    with pytest.raises(ValueError, match="`score_mod`"):
        explain(X, score_mod="l7")


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("keepdim", [False, True])
def test_scores_of_a_callable_have_their_shape_on_every_backend(keepdim, backend):
    """And each backend computes them alike, under autocast, too."""

    def score(q, k):
        return (q - k).abs().sum(-1, keepdim=keepdim)

    def run():
        return FlashDiffusion(X, X, X, score_mod=score, backend=backend)

    if keepdim:
        with pytest.raises(ValueError, match="`score_mod` must return"):
            run()
        return
    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), exact)


@pytest.mark.parametrize(
    ("call", "ops"),
    [
        ({"normalize": "none"}, ["matvec"]),
        ({"score_mod": "dot"}, ["softmax"]),
        ({"alpha": 0.5}, ["matvec"]),
        ({"normalize": "row", "K": X + 0.1}, ["softmax"]),
        ({"h": torch.logspace(-30, 30, 6, dtype=torch.float64)}, ["softmax"]),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "cpu", "reference"])
def test_dispatch_tells_the_truth(call, ops, backend):
    call = dict(call)
    K, V = call.pop("K", X), torch.randn(6)
    text = explain(FlashDiffusion, X, K, V, backend=backend, **call)
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        f"flashdiffusion::{op}:" for op in ops
    ]
    dispatch.choose("flashdiffusion::" + ops[0], "nobody", {"nobody": None})
    FlashDiffusion(X, K, V, backend=backend, **call)
    ran = {"auto": FAST if ops == ["matvec"] else "torch", "cpu": "torch"}.get(backend, backend)
    assert dispatch.last("flashdiffusion::" + ops[0]) == ran


def test_explain_makes_the_call():
    dm = DiffusionMap(beta=1.0, n_components=2)
    points = np.random.default_rng(0).standard_normal((30, 2))
    assert explain(dm.fit, points).startswith(f"flashdiffusion::matvec:\n  {FAST}: chosen")
    assert "flashdiffusion::softmax:" in explain(dm.transform, points)
    with pytest.raises(ValueError, match="`function` must multiply by a kernel"):
        explain(len, points)


def test_transform():
    points = np.random.default_rng(0).standard_normal((30, 2))
    dm = DiffusionMap(beta=1.0, n_components=2).fit(points)
    with pytest.raises(ValueError, match="features"):
        dm.transform(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="`t` must be"):
        dm.transform(t=-1)
    with pytest.raises(ValueError, match="`V` must have shape"):
        dm.markov(np.ones(29))


def test_bandwidths():
    with pytest.raises(ValueError, match="at least 2"):
        bgh_bandwidth(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="finite"):
        bgh_bandwidth(np.full((5, 2), np.nan))


MANY = np.random.default_rng(0).standard_normal((40, 3))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("landmarks", lambda m: DiffusionMap(2.0, landmarks=m, n_components=2).fit(MANY)),
        ("landmarks", lambda m: slow_manifold(MANY[:, None], landmarks=m, n_components=2)),
        ("states", lambda m: kinetics.chapman_kolmogorov(m, 1)),
        ("weights", lambda m: kinetics.free_energy(MANY, weights=m)),
        ("coordinates", lambda m: kinetics.implied_timescales(m.astype(float), [1])),
        ("lags", lambda m: kinetics.implied_timescales(MANY, m[1:4])),
    ],
)
def test_masked_indices_and_weights_are_refused(name, call):
    """What lies behind a mask would have been a landmark, a state or a weight."""
    masked = np.ma.masked_equal(np.arange(40), 3)
    with pytest.raises(ValueError, match=f"`{name}` must have no masked values, got 1 of"):
        call(masked)
