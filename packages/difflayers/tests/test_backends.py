"""Backends, graphs, operators, cache, dynamics, retrieval and energy, against the reference."""

import math

import pytest
import torch

import difflayers as d
from difflayers import (
    AttentionOperator,
    DiffusedHopfield,
    DiffusionConfig,
    _graph,
    _nearest,
    _reference,
    diffusion,
    explain,
)
from difflayers.diffusion import HeatDiffusion, RestartDiffusion
from difflayers.graph.build_graph import build_knn_graph, build_similarity_matrix
from difflayers.graph.laplacian import compute_laplacian, compute_normalized_laplacian
from shared_kernels import device, dispatch
from shared_kernels.testing import assert_close, measure_memory, parametrize
from shared_kernels.testing.tolerances import tolerance

from .cases import GRAPHS, MODES, data_of, padding_of, randn, spread

FLOAT32 = tolerance(torch.float32)


def _exact(case, X, normalized):
    """[(valid, Laplacian)] per item."""
    padding = padding_of(case)
    out = []
    for i in range(case.B):
        n = case.N if padding is None else int((~padding[i]).sum())
        A = _reference.adjacency(X[i, :n].double(), case.k)
        out.append((n, _reference.laplacian(A, normalized)))
    return out


@parametrize(GRAPHS)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_batched_graphs_are_the_items_graphs(case, normalized, sparse):
    X = randn(case.B, case.N, case.d)
    padding = padding_of(case)
    valid = None if padding is None else ~padding
    graph = _graph.build(X, case.k, valid, normalized=normalized, sparse=sparse)
    x = randn(case.B, case.N, 6, seed=1)
    out = graph.laplacian(x)
    for i, (n, L) in enumerate(_exact(case, X, normalized)):
        assert_close(out[i, :n], L @ x[i, :n].double())
        assert bool((out[i, n:] == 0).all())


@parametrize(GRAPHS)
@pytest.mark.parametrize("mode", MODES)
def test_smoothing_is_the_reference_s(case, mode):
    X = randn(case.B, case.N, case.d)
    padding = padding_of(case)
    graph = _graph.build(
        X,
        case.k,
        None if padding is None else ~padding,
        normalized=False,
        sparse=mode not in ("spectral", "simple"),
        spectral=mode == "spectral",
        bounded=mode == "heat",
    )
    x = randn(case.B, case.N, 6, seed=1)
    out = diffusion.apply(graph, x, mode, 0.05, 3)
    per_item = diffusion.apply(graph, x, mode, torch.full((case.B, 1, 1), 0.05), 3)
    assert_close(per_item, out)
    for i, (n, L) in enumerate(_exact(case, X, False)):
        assert_close(out[i, :n], _reference.diffuse(x[i, :n].double(), L, mode, 0.05, 3))
        assert_close(out[i, n:], x[i, n:])


def test_one_graph_for_many_items():
    X, x = randn(1, 12, 4), randn(3, 12, 5, seed=1)
    for sparse in (True, False):
        graph = _graph.build(X, 3, normalized=True, sparse=sparse)
        out = graph.laplacian(x)
        for i in range(3):
            assert_close(out[i : i + 1], graph.laplacian(x[i : i + 1]))


SPARSE = {
    "sum": ({"use_sparse": True}, ("neighbour_sum",)),
    "attention": ({"attention_mode": "graph"}, ("neighbour_attention",)),
    "both": (
        {"attention_mode": "graph", "use_sparse": True},
        ("neighbour_sum", "neighbour_attention"),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPARSE)
def test_layers_run_on_the_backend_that_is_asked_for(name, dtype):
    options, ops = SPARSE[name]
    outputs = {}
    for backend in ("auto", "torch", "cpu", "reference"):
        layer = DiffusedHopfield(8, num_heads=2, backend=backend, **options)
        layer = spread(layer).to(dtype)
        data = [x.requires_grad_() for x in data_of(layer, S=9, dtype=dtype)]
        padding = torch.arange(9).expand(2, -1) >= torch.tensor([[9], [5]])
        out = layer(tuple(data), padding)
        ran = "reference" if backend == "reference" else "torch"
        assert [dispatch.last(f"difflayers::{op}") for op in ops] == [ran] * len(ops)
        outputs[backend] = out, *torch.autograd.grad(out.float().square().sum(), data)
        text = explain(layer, tuple(data), padding)
        assert all(f"difflayers::{op}:" in text for op in ops) and "reference: can run" in text
    for backend in ("torch", "cpu", "reference"):
        for ours, exact in zip(outputs[backend], outputs["auto"], strict=True):
            assert_close(ours, exact, "gradient")


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu", "reference"])
def test_operators_run_on_the_backend_that_is_asked_for(backend):
    Q, K, index = randn(4, 8), randn(6, 8, seed=1), torch.tensor([[0, 1], [2, 2], [3, 5], [4, 0]])
    out = AttentionOperator(0.7, "graph", backend=backend)(Q, K, K, index)
    ran = "reference" if backend == "reference" else "torch"
    assert dispatch.last("difflayers::neighbour_attention") == ran
    weights = torch.softmax(0.7 * (Q[:, None] * K[index]).sum(-1), -1)
    assert_close(out, (weights[..., None] * K[index]).sum(1))
    dense = AttentionOperator(0.7, backend=backend)(Q, K, K)
    assert_close(dense, torch.softmax(0.7 * Q @ K.T, -1) @ K)


def test_a_backend_that_cannot_run_is_an_error_that_says_why():
    for make in (AttentionOperator, lambda **kw: DiffusedHopfield(8, **kw)):
        with pytest.raises(ValueError, match="`backend` must be one of"):
            make(backend="cuda")
        with pytest.raises(NotImplementedError, match="use_sparse=True"):
            make(backend="triton")
    if not (device.interpreting() or torch.cuda.is_available()):
        layer = DiffusedHopfield(8, use_sparse=True, backend="triton")
        with pytest.raises(NotImplementedError, match="cannot run difflayers::neighbour_sum"):
            layer(randn(1, 9, 8))
    layer = DiffusedHopfield(8, attention_mode="graph", separation="sparsemax", backend="triton")
    with pytest.raises(NotImplementedError, match="softmax"):
        layer(randn(1, 9, 8))
    dense = DiffusionConfig()
    layer = DiffusedHopfield(8, use_sparse=True, backend="triton")
    with pytest.raises(NotImplementedError, match="use_sparse=True"):
        layer.config = dense


def test_neighbours_over_tiles_are_the_same(monkeypatch):
    X = randn(2, 33, 5)
    valid = torch.ones(2, 33, dtype=torch.bool)
    valid[1, 20:] = False
    whole = _nearest.nearest(X, X, 4, valid, True)
    monkeypatch.setattr(_nearest, "_TILE", 100)
    tiles = _nearest.nearest(X, X, 4, valid, True)
    assert_close(tiles[0][0], whole[0][0])
    assert torch.equal(tiles[1], whole[1])


def test_sparse_graph_of_many_patterns_holds_no_square(monkeypatch):
    monkeypatch.setattr(_nearest, "_TILE", 1 << 18)
    X = randn(1, 2000, 16)

    def run():
        graph = _graph.build(X, 8, normalized=True, sparse=True)
        return diffusion.apply(graph, X, "factored", 0.2, 3)

    assert measure_memory(run).peak < 2000 * 2000 * 4 / 2
    out = run()
    dense = _graph.build(X, 8, normalized=True, sparse=False)
    assert_close(out, diffusion.apply(dense, X, "factored", 0.2, 3))


@pytest.mark.slow
def test_fifty_thousand_patterns_in_300_megabytes():
    X, state = randn(1, 50_000, 64), randn(1, 64, 64, seed=1)
    memory = d.DiffusedHopfield(64, num_heads=4, use_sparse=True, k_neighbors=10)

    def run():
        with torch.no_grad():
            return memory((X, state, X))

    # a single N x N buffer would be 10 GB
    assert measure_memory(run).peak < 300e6
    graph = memory._stored_graph._value
    for i in (0, 49_999):
        cosine = torch.nn.functional.cosine_similarity(X[0, i], X[0])
        cosine[i] = -torch.inf
        assert set(cosine.topk(10).indices.tolist()) == set(graph.index[0, i].tolist())


# ---------------------------------------------------------------- public graph functions


@pytest.mark.parametrize("sparse", [True, False])
def test_knn_graph_and_laplacians(sparse):
    X = randn(20, 5)
    S = build_similarity_matrix(X)
    A = build_knn_graph(S, 4, as_sparse=sparse)
    exact = _reference.adjacency(X.double(), 4)
    assert A.is_sparse == sparse
    assert_close(A.to_dense(), exact)
    for make, normalized in ((compute_laplacian, False), (compute_normalized_laplacian, True)):
        L = make(A)
        assert L.is_sparse == sparse
        assert_close(L.to_dense(), _reference.laplacian(exact, normalized))
        assert_close(d.LaplacianBuilder(normalized).build(A).to_dense(), L.to_dense())


def test_isolated_nodes_have_a_zero_row():
    A = torch.zeros(3, 3)
    A[0, 1] = A[1, 0] = 0.5
    for layout in (A, A.to_sparse()):
        L = compute_normalized_laplacian(layout).to_dense()
        assert_close(L, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        assert bool((L[2] == 0).all())


@pytest.mark.parametrize("sparse", [True, False])
def test_builder_forms_agree(sparse):
    X = randn(30, 6)
    fluent = d.GraphBuilder(X).cosine_similarity().knn(k=4, sparse=sparse).laplacian().build()
    reusable = d.GraphBuilder(k=4, use_sparse=sparse).build(X)
    old = d.GraphBuilder(4, sparse).build(X)
    for graph in (fluent, reusable, old):
        assert_close(graph.W.to_dense(), _reference.adjacency(X.double(), 4))
        assert_close(graph.deg, graph.W.to_dense().sum(-1))
    assert torch.equal(fluent.adj_indices, reusable.adj_indices)
    assert reusable.L is None and fluent.L is not None


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 5)])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_apply_diffusion(mode, shape, layout):
    L = _reference.laplacian(_reference.adjacency(randn(12, 5).double(), 3), True)
    x = randn(*shape, dtype=torch.float64)
    steps = 1 if mode == "spectral" else 4
    exact = _reference.diffuse(x.flatten(1), L, mode, 0.3, steps).view(shape)
    given = L.to_sparse() if layout == "sparse" else L
    assert_close(d.apply_diffusion(x, given, 0.3, mode, steps), exact)
    half = d.apply_diffusion(x.bfloat16(), given.float(), 0.3, mode, steps)
    assert half.dtype == torch.bfloat16
    assert_close(half, exact, scale=0.5)


def test_simple_and_spectral_ignore_steps():
    L = _reference.laplacian(_reference.adjacency(randn(9, 4).double(), 3), True)
    x = randn(9, 4, dtype=torch.float64)
    for cls in (d.SimpleDiffusion, d.SpectralDiffusion):
        a, b = cls(0.2).precompute(L), cls(0.2, steps=7).precompute(L)
        assert torch.equal(a(x), b(x))
    assert d.IterativeDiffusion(0.2).steps == 3


def test_factored_diffusion_is_the_raw_formula_and_differentiable():
    W = _reference.adjacency(randn(9, 4).double(), 3).requires_grad_()
    x = randn(9, 2, 4, dtype=torch.float64).requires_grad_()
    deg = W.sum(-1)
    out = d.FactoredDiffusion(W, deg, 0.3)(x)
    exact = (1 - 0.3 * deg).view(9, 1, 1) * x + 0.3 * torch.einsum("ij,jbd->ibd", W, x)
    assert_close(out, exact)
    assert_close(d.FactoredDiffusion(W.to_sparse(), deg, 0.3)(x), exact)
    grads = torch.autograd.grad(out.square().sum(), (W, x))
    for ours, theirs in zip(grads, torch.autograd.grad(exact.square().sum(), (W, x)), strict=True):
        assert_close(ours, theirs, "gradient")


def test_heat_kernel_with_a_long_time_and_a_large_spectrum():
    A = _reference.adjacency(5 + randn(30, 4).double(), 20)
    L = _reference.laplacian(A, False)
    x = randn(30, 3, dtype=torch.float64)
    out = HeatDiffusion(2.0, steps=3).precompute(L)(x)
    assert_close(out, _reference.diffuse(x, L, "heat", 2.0, 3))
    assert_close(RestartDiffusion(0.5, 4, 1.0).precompute(L)(x), x)


# ---------------------------------------------------------------- cache


def test_cache_hits_the_same_memory_and_misses_every_change():
    X = randn(20, 5)
    cache = d.GraphCache(d.DiffusionConfig(k_neighbors=3))
    first = cache.get(X)
    assert cache.get(X) is first and cache.get(X.view(20, 5)) is not None
    X.copy_(X.flip(0))
    second = cache.get(X)
    assert second is not first
    assert_close(second.W, _reference.adjacency(X.double(), 3))
    X[3, 2] += 1e-3
    assert cache.get(X) is not second
    third = cache.get(X)
    cache.invalidate()
    assert cache.get(X) is not third
    assert cache.get(X.clone()) is not cache.get(X)


def test_cache_lets_go_of_the_patterns():
    import weakref

    X = randn(20, 5)
    cache = d.GraphCache(d.DiffusionConfig(k_neighbors=3))
    cache.get(X)
    ref = weakref.ref(X)
    del X
    assert ref() is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [True, False])
def test_cached_operator_is_the_configured_one(mode, sparse):
    X = randn(15, 5, dtype=torch.float64)
    cfg = d.DiffusionConfig(k_neighbors=3, diffusion_mode=mode, eta=0.3, steps=2, use_sparse=sparse)
    graph = d.GraphCache(cfg).get(X.requires_grad_())
    assert not graph.W.requires_grad and graph.W.is_sparse == sparse
    L = _reference.laplacian(_reference.adjacency(X.detach(), 3), True)
    steps = 1 if mode in ("simple", "spectral") else 2
    assert_close(graph.op(X), _reference.diffuse(X.detach(), L, mode, 0.3, steps))


# ---------------------------------------------------------------- dynamics, retrieval, energy


def test_engine_does_what_it_says():
    X, Q = randn(12, 5), randn(12, 5, seed=1)
    for options in ({}, {"diffuse_query": True}, {"diffuse_key": False}):
        cfg = d.DiffusionConfig(eta=0.2, steps=2, k_neighbors=3, beta=2.0, **options)
        op = d.GraphCache(cfg).get(X).op
        q, k = Q, X
        for _ in range(2):
            k = op(k) if cfg.diffuse_key else k
            q = op(q) if cfg.diffuse_query else q
            q = torch.softmax(2.0 * q @ k.T, -1) @ X
        tracker = d.EnergyTracker(True)
        ours = d.DynamicsEngine(op, d.AttentionOperator(2.0), cfg).run(Q, X, X, tracker=tracker)
        assert_close(ours[0], q)
        assert_close(ours[1], k)
        assert_close(torch.tensor(tracker.energies[-1]), d.energy(k, q, 2.0).mean())


def test_engine_along_the_graph_and_early_stop():
    X = randn(12, 5)
    cfg = d.DiffusionConfig(steps=50, k_neighbors=3, attention_mode="graph", energy_stop_tol=1e-3)
    graph = d.GraphCache(cfg).get(X)
    tracker = d.EnergyTracker(True)
    engine = d.DynamicsEngine(graph.op, d.AttentionOperator(1.0, "graph"), cfg)
    engine.run(X, X, X, tracker=tracker, adj_indices=graph.adj_indices)
    assert 2 <= len(tracker.energies) < 50
    silent = d.EnergyTracker(enabled=False)
    engine.run(X, X, X, tracker=silent, adj_indices=graph.adj_indices)
    assert silent.energies == []


@pytest.mark.parametrize("separation", ["softmax", "entmax15", "sparsemax"])
def test_updates_never_raise_the_energy(separation):
    M, Q = randn(30, 6), randn(8, 6, seed=1)
    for beta in (0.3, 2.0):
        before = d.energy(M, Q, beta, separation)
        for steps in range(1, 6):
            now = d.energy(
                M, d.retrieve(M, Q, beta, steps, 0.0, separation).patterns, beta, separation
            )
            assert bool((now <= before + FLOAT32 / 2).all())
            before = now


@pytest.mark.parametrize("separation", ["softmax", "entmax15", "sparsemax"])
def test_energy_s_gradient_is_the_update(separation):
    M = randn(10, 4, dtype=torch.float64)
    Q = randn(3, 4, seed=1, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(d.energy(M, Q, 1.5, separation).sum(), Q)
    update = d.retrieve(M, Q, 1.5, 1, 0.0, separation).patterns
    assert_close(grad, Q - update, "gradient")
    assert bool((d.energy(M, Q, 1.5, separation, constants=True) >= 0).all())


def test_energy_formula():
    M, Q = randn(10, 4, dtype=torch.float64), randn(3, 4, seed=1, dtype=torch.float64)
    exact = -torch.logsumexp(2.0 * Q @ M.T, -1) / 2.0 + Q.square().sum(-1) / 2
    assert_close(d.energy(M, Q, 2.0), exact)
    more = math.log(10.0) / 2.0 + M.square().sum(-1).max() / 2
    assert_close(d.energy(M, Q, 2.0, constants=True), exact + more)


def test_diffusing_keys_raises_the_energy_and_lowers_dirichlet():
    X = randn(40, 6)
    cfg = d.DiffusionConfig(eta=0.4, steps=3, k_neighbors=5, use_normalized_laplacian=False)
    cfg = d.DiffusionConfig(**{**cfg.to_dict(), "eta": 0.1})
    graph = d.GraphCache(cfg).get(X)
    K = graph.op(X)
    assert d.energy(K, X, 4.0).mean() > d.energy(X, X, 4.0).mean()
    assert torch.trace(K.T @ graph.L @ K) < torch.trace(X.T @ graph.L @ X)


def test_sparse_separation_retrieves_exactly():
    M = torch.nn.functional.normalize(randn(50, 16), dim=-1)
    Q = M[:10] + 0.05 * randn(10, 16, seed=1)
    found = d.retrieve(M, Q, beta=16.0, separation="sparsemax")
    assert torch.equal(found.patterns, M[:10])
    assert bool((found.residual <= FLOAT32 / 2).all()) and bool((found.steps >= 2).all())
    soft = d.retrieve(M, Q, beta=16.0)
    assert (soft.patterns - M[:10]).abs().max() > 1e-3


def test_retrieval_stops_per_query():
    M = torch.nn.functional.normalize(randn(20, 8), dim=-1)
    Q = torch.stack((M[0], M[1] + 0.4 * randn(8, seed=2)))
    found = d.retrieve(M[None], Q[None], beta=8.0, steps=30)
    assert found.patterns.shape == (1, 2, 8)
    alone = d.retrieve(M, Q[1:], beta=8.0, steps=30)
    assert_close(found.patterns[0, 1:], alone.patterns)
    assert int(found.steps[0, 1]) == int(alone.steps[0])


# ---------------------------------------------------------------- data sets


def test_bit_patterns_and_latches():
    from difflayers.auxiliary.data import BitPatternSet, LatchSequenceSet, LookupTableDataset

    bags = BitPatternSet(20, 7, 3, num_signals_per_bag=2, num_bits=6)
    hits = (bags.bags[:, :, None] == bags.signals[None, None]).all(-1).any(-1).sum(1)
    assert torch.equal(hits, torch.where(bags.targets == 1, 2, 0))
    assert bool((bags.bags.sum(-1) > 0).all()) and len(bags.signals.unique(dim=0)) == 3
    assert bags[0]["data"].shape == (7, 6) and len(bags) == 20
    again = BitPatternSet(20, 7, 3, num_signals_per_bag=2, num_bits=6)
    assert torch.equal(again.bags, bags.bags)
    latch = LatchSequenceSet(30, 9)
    for item in (latch[i] for i in range(30)):
        assert item["data"][0].argmax() == item["target"]
        assert bool((item["data"][1:, :2] == 0).all())
    table = LookupTableDataset(randn(4, 2), randn(4, 3))
    assert len(table) == 4 and table[1][1].shape == (3,)
