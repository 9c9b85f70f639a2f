"""The layers inside other people's training: what is kept, masks, layouts, changed settings.

The weights are large: at the default initialisation every fault here is below 1e-6.
"""

import threading

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import difflayers as d
from difflayers import _graph, _nearest, _reference
from difflayers.graph.build_graph import build_knn_graph, build_similarity_matrix
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

from .cases import MODES, data_of, randn, spread

ROUNDING32 = tolerance(torch.float32, "rounding")

KEPT = [
    {},
    {"use_sparse": True},
    {"diffusion_mode": "spectral"},
    {"diffusion_mode": "heat"},
    {"use_normalized_laplacian": False, "eta": 0.05},
    {"use_logit_diffusion": True},
    {"adaptive_eta": True},
    {"diffuse_query": True, "diffuse_value": True},
    {"attention_mode": "graph"},
    {"cache_graph": False},
]


def big(**options):
    """A layer whose parameters are large."""
    options = {"eta": 0.5, "num_heads": 2, "k_neighbors": 3, **options}
    layer = spread(d.DiffusedHopfield(8, **options))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2.0)
    return layer


def fresh(layer):
    """The same layer with nothing kept."""
    layer.invalidate()
    return layer


@pytest.fixture(params=KEPT, ids=lambda o: "-".join(o) or "plain")
def layer(request):
    return big(**request.param)


def test_a_checkpointed_layer_gives_the_same_gradients(layer):
    for seed in (0, 1):  # the first forward after every change of the patterns
        x = randn(2, 12, 8, seed=seed)
        found = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            layer.invalidate()
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            found.append((out, grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def test_a_graph_kept_in_inference_mode_serves_training(layer):
    x = randn(2, 12, 8)
    with torch.inference_mode():
        before = layer(x)
    layer(x).sum().backward()
    assert torch.equal(layer(x), before)
    with torch.inference_mode():
        made_there = randn(2, 12, 8)
        layer(made_there)
    assert_close(layer(made_there.clone()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graph_kept_under_autocast_serves_full_precision(layer, dtype):
    x = randn(2, 40, 8)
    with torch.autocast("cpu", dtype):
        layer(x)
    out = layer(x)
    assert torch.equal(out, fresh(layer)(x))


def test_what_is_kept_is_full_precision_whatever_the_patterns():
    x = randn(2, 12, 8, dtype=torch.bfloat16)
    half = big().bfloat16()
    half(x)
    graph = half._stored_graph._value
    assert graph.degrees.dtype == torch.float32
    assert torch.equal(graph.index, _graph.build(x.float(), 3, normalized=True, sparse=False).index)
    kept = d.GraphCache(d.DiffusionConfig(k_neighbors=3)).get(x[0])
    assert kept.W.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_cache_is_kept_by_the_same_rule(mode):
    cache, x = d.GraphCache(d.DiffusionConfig(k_neighbors=3, diffusion_mode=mode)), randn(12, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kept = cache.get(x)
    states = randn(12, 8, seed=1).requires_grad_()
    assert cache.get(x) is kept
    kept.op(states).sum().backward()
    other = d.GraphCache(cache.config).get(x.clone())
    assert torch.equal(kept.op(states), other.op(states))
    cache.config = d.DiffusionConfig(k_neighbors=5, diffusion_mode=mode)
    assert cache.get(x).adj_indices.shape == (12, 5)


def test_threads_that_share_a_layer_get_their_own_graphs():
    layer = big().eval()
    inputs = [randn(1, 30, 8, seed=i) for i in range(2)]
    with torch.no_grad():
        exact = [fresh(layer)(x) for x in inputs]
    wrong, start = [], threading.Barrier(2)

    def work(i):
        start.wait()
        with torch.no_grad():
            for _ in range(400):
                if not torch.equal(layer(inputs[i]), exact[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_thread_between_two_halves_of_an_entry_sees_one_of_them():
    """What a build returns is what its call uses, though another call kept its own meanwhile."""
    from difflayers._kept import TensorCache

    cache, a, b = TensorCache(), torch.ones(1), torch.ones(1)

    def slow():
        assert cache.get((b,), None, lambda: "b") == "b"
        return "a"

    assert cache.get((a,), None, slow) == "a"
    assert cache.get((a,), None, lambda: "again") == "a"
    assert cache.get((b,), None, lambda: "again") == "again"


def _masked(kind, m, dtype=torch.float32):
    values = {"-inf": -torch.inf, "finfo.min": torch.finfo(dtype).min, "-1e9": -1e9, "-1e4": -1e4}
    if kind == "bool":
        return m
    return torch.zeros(m.shape, dtype=dtype).masked_fill(m, values[kind])


MASKS = ["bool", "-inf", "finfo.min", "-1e9", "-1e4"]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("separation", ["softmax", "entmax15", "sparsemax"])
def test_logit_diffusion_puts_no_weight_on_what_is_masked(kind, separation):
    layer = big(use_logit_diffusion=True, separation=separation)
    x = randn(2, 9, 8)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    mask = _masked(kind, future)
    xi = layer.get_association_matrix(x, association_mask=mask)
    assert bool((xi[..., future] == 0).all())
    assert_close(xi.sum(-1), torch.ones_like(xi[..., 0]))
    # the formula, and a future that changes nothing
    plain = spread(d.DiffusedHopfield(8, num_heads=2, diffuse_key=False, separation=separation))
    plain.load_state_dict(layer.state_dict())
    layer = big(use_logit_diffusion=True, separation=separation, diffuse_key=False)
    w = plain.get_association_matrix(x, association_mask=mask).double()
    for i in range(2):
        L = _reference.laplacian(_reference.adjacency(x[i].double(), 3), True)
        exact = _reference.logit_diffusion(w[i], L, 0.5, ~future)
        assert_close(layer.get_association_matrix(x, association_mask=mask)[i], exact)


@pytest.mark.parametrize("options", KEPT, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("kind", MASKS)
def test_padding_of_every_kind_leaves_the_graph(options, kind):
    layer = big(**options)
    x = randn(2, 12, 8)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 7:] = True
    out = layer(x, _masked(kind, padding))
    assert_close(out[1:, :7], layer(x[1:, :7]))
    x = x.clone()
    x[1, 7:] = 100 * randn(5, 8, seed=5)
    assert_close(layer(x, _masked(kind, padding))[1:, :7], out[1:, :7])


@pytest.mark.parametrize("options", KEPT, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("together", [True, False])
def test_the_batch_may_come_second(options, together):
    first, second = big(**options), big(batch_first=False, **options)
    stored, state = randn(2, 12, 8), randn(2, 5, 8, seed=1)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 7:] = True
    turned, turned_state = stored.transpose(0, 1), state.transpose(0, 1)
    if together:
        inputs, other = (stored, stored, stored), (turned, turned, turned)
    else:
        inputs, other = (stored, state, stored), (turned, turned_state, turned)
    for mask in (None, padding):
        assert_close(second(other, mask).transpose(0, 1), first(inputs, mask))
        if together:
            assert_close(second(turned, mask).transpose(0, 1), first(inputs, mask))


def test_adaptive_eta_counts_no_state_that_is_padding_or_sees_nothing():
    layer = big(adaptive_eta=True, adaptive_temperature=3.0, separation="entmax15")
    x = randn(2, 12, 8)
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[-4:] = True  # the last four states see nothing
    out = layer((x, x.clone(), x), association_mask=mask)
    assert_close(out[:, :8], layer((x, x[:, :8].clone(), x)))


def test_settings_may_change_after_a_call():
    x = randn(2, 12, 8)
    layer = big()
    layer(x)
    for change in (
        {"k_neighbors": 5},
        {"diffusion_mode": "spectral"},
        {"diffusion_mode": "heat", "use_normalized_laplacian": False},
        {"use_sparse": True, "diffuse_value": True},
        {"attention_mode": "graph"},
    ):
        config = d.DiffusionConfig(**{"eta": 0.5, "k_neighbors": 3, **change})
        layer.config = config
        new = spread(d.DiffusedHopfield(8, num_heads=2, config=config))
        new.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), new(x))
    with pytest.raises(ValueError, match="use_logit_diffusion"):
        layer.config = d.DiffusionConfig(attention_mode="graph", use_logit_diffusion=True)
    with pytest.raises(ValueError, match="beta"):
        layer.config = d.DiffusionConfig(beta=2.0)
    with pytest.raises(TypeError, match="DiffusionConfig"):
        layer.config = {"eta": 0.1}
    assert layer.config == config


@pytest.mark.parametrize("field", list(d.DiffusionConfig.__dataclass_fields__))
def test_a_keyword_beside_config_may_not_contradict_it_though_it_is_the_default(field):
    default = getattr(d.DiffusionConfig(), field)
    other = {
        "diffusion_mode": "heat",
        "attention_mode": "graph",
        "logit_eta": 0.3,
        "steps": 5,
        "k_neighbors": 4,
    }.get(field, (not default) if isinstance(default, bool) else 0.25)
    if field == "beta":
        return
    config = d.DiffusionConfig(**{field: other})
    keyword = "diffusion_steps" if field == "steps" else field
    assert d.DiffusedHopfield(8, config=config, **{keyword: other}).config == config
    with pytest.raises(ValueError, match=f"`{keyword}` must not contradict"):
        d.DiffusedHopfield(8, config=config, **{keyword: default})


# ---------------------------------------------------------------- graphs


def _similarities(name):
    S = randn(12, 12)
    if name == "ties":
        X = randn(12, 6).sign()
        return build_similarity_matrix(X)
    if name == "equal":
        return torch.ones(12, 12)
    if name == "symmetric":
        S = S + S.T
    if name == "negative":
        S = -S.abs()
    return S.fill_diagonal_(0.0)


@pytest.mark.parametrize("name", ["ties", "equal", "symmetric", "asymmetric", "negative"])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_a_sparse_graph_is_the_dense_one(name, k):
    S = _similarities(name)
    dense, sparse = build_knn_graph(S, k), build_knn_graph(S, k, as_sparse=True)
    assert torch.equal(sparse.to_dense(), dense)
    M = torch.zeros_like(S)
    for i in range(12):
        others = [j for j in range(12) if j != i]
        for j in sorted(others, key=lambda j: -S[i, j].item())[:k]:  # noqa: B023
            M[i, j] = S[i, j]
    assert torch.equal(dense, torch.maximum(M, M.T))


@pytest.mark.parametrize("name", ["normal", "signs", "zeros", "tiny", "huge", "beyond"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_builder_makes_the_same_graph(name, dtype):
    X = randn(14, 6, dtype=dtype)
    if name == "signs":
        X = X.sign()
    elif name == "zeros":
        X[3] = X[8] = 0.0
    elif name in ("tiny", "huge"):
        factor = {"tiny": torch.finfo(dtype).tiny, "huge": torch.finfo(dtype).max / 4}[name]
        X = (X.double() / X.double().abs().max() * (4 if name == "tiny" else 1) * factor).to(dtype)
    elif name == "beyond" and dtype == torch.float32:
        X[::2] *= 1e-13
        X[1::2] *= 1e25
    dense, sparse = (d.GraphBuilder(k=3, use_sparse=s).build(X) for s in (False, True))
    assert torch.equal(dense.W, sparse.W.to_dense())
    assert torch.equal(dense.adj_indices, sparse.adj_indices)
    assert torch.equal(dense.deg, dense.W.sum(1)) and bool(dense.W.isfinite().all())
    kept = torch.zeros_like(dense.W, dtype=torch.bool).scatter(1, dense.adj_indices, True)
    assert bool((dense.W[~(kept | kept.T)] == 0).all())
    wide = X.double()
    exact = _reference.adjacency(wide / wide.abs().amax(1, keepdim=True).clamp(min=1e-320), 3)
    if name != "signs":  # where the reference orders ties otherwise
        assert_close(dense.W, exact)
    S = build_similarity_matrix(X)
    assert S.dtype == dtype and bool(S.isfinite().all())
    for use_sparse in (False, True):
        graph = _graph.build(X[None], 3, normalized=False, sparse=use_sparse)
        assert_close(graph.degrees[0], dense.deg)
        assert torch.equal(graph.index[0], dense.adj_indices)


def test_padding_does_not_choose_among_ties():
    layer, x = big(), randn(2, 24, 8).sign()
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[:, 13:] = True
    assert_close(layer(x, padding)[:, :13], layer(x[:, :13]))
    assert_close(layer(x)[1:], layer(x[1:].contiguous()))


OTHERS = [
    *({"separation": s} for s in ("softmax", "entmax15", "sparsemax")),
    *({"separation": s, "attention_mode": "graph"} for s in ("softmax", "entmax15")),
    *({"diffusion_mode": m} for m in MODES),
    {"use_sparse": True},
    {"use_logit_diffusion": True},
    {"update_steps_max": 3},
]


@pytest.mark.parametrize("options", OTHERS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_row_depends_on_no_other_item_row_or_padding(options):
    """To rounding; which patterns are neighbours, to the bit."""
    layer = big(**options)
    stored, state = randn(3, 20, 8), randn(3, 70, 8, seed=1)
    out = layer((stored, state, stored))
    for rows in (1, 2, 33):
        assert_close(layer((stored[1:2], state[1:2, :rows], stored[1:2])), out[1:2, :rows])
    padding = torch.zeros(3, 40, dtype=torch.bool)
    padding[:, 20:] = True
    longer = torch.cat((stored, 50 * randn(3, 20, 8, seed=2)), 1)
    assert_close(layer((longer, state, longer), padding), out)
    whole = _nearest.nearest(stored, stored, 3, None, True)
    alone = _nearest.nearest(stored[1:2], stored[1:2], 3, None, True)
    padded = _nearest.nearest(longer, longer, 3, ~padding, True)
    assert torch.equal(whole[1][1:2], alone[1]) and torch.equal(whole[0][1:2], alone[0])
    assert torch.equal(padded[1][:, :20], whole[1]) and torch.equal(padded[0][:, :20], whole[0])


def test_tensors_of_the_constructor_follow_the_layer_and_are_initialised():
    options = {"num_heads": 2, "scaling": torch.tensor([0.5, 2.0])}
    options |= {"update_steps_max": torch.tensor([1, 3]), "update_steps_eps": torch.ones(2) * 1e-5}
    layer = spread(d.Hopfield(8, **options))
    x = randn(2, 6, 8)
    out = layer(x)
    assert layer.state_dict().keys() == d.Hopfield(8, num_heads=2).state_dict().keys()
    assert layer.to("meta").scaling.is_meta and layer.update_steps_max.is_meta
    assert layer(x.to("meta")).is_meta
    filled = layer.to_empty(device="cpu")
    for buffer in filled.buffers():
        buffer.fill_(77)
    filled.reset_parameters()
    assert filled.scaling.tolist() == [0.5, 2.0] and filled.update_steps_max.tolist() == [1, 3]
    assert torch.equal(spread(filled)(x), out)
    half = spread(d.Hopfield(8, **options)).half()
    assert half.scaling.dtype == torch.float16 and half.update_steps_max.dtype == torch.int64
    assert bool(half(x.half()).isfinite().all())
    learned = d.Hopfield(8, scaling=torch.nn.Parameter(torch.tensor([0.7])))
    with torch.no_grad():
        learned._scaling.fill_(9.0)
    learned.reset_parameters()
    assert_close(learned.scaling.detach(), torch.tensor([0.7]))
    with pytest.raises(ValueError, match="update_steps_eps"):
        d.Hopfield(8, update_steps_eps=torch.nn.Parameter(torch.ones(1)))
    with torch.device("meta"):
        no_values = d.Hopfield(8, scaling=torch.ones(1)).to_empty(device="cpu")
    with pytest.raises(ValueError, match="`scaling` must hold values"):
        no_values.reset_parameters()


# ---------------------------------------------------------------- operators and retrieval


def _laplacian(dtype=torch.float32, N=20):
    return _reference.laplacian(_reference.adjacency(randn(N, 6, dtype=torch.float64), 3), True).to(
        dtype
    )


@pytest.mark.parametrize("eta", [1.0, 1e5, 1e8])
def test_spectral_diffusion_grows_nothing(eta):
    x, L = randn(20, 4), _laplacian()
    out = d.SpectralDiffusion(eta).precompute(L)(x)
    assert out.norm() <= x.norm() * (1 + ROUNDING32)
    wide = _laplacian(torch.float64)
    values, U = torch.linalg.eigh(wide)
    values = torch.where(values.abs() < 1e-10, 0.0, values)
    exact = U @ (torch.exp(-eta * values)[:, None] * (U.T @ x.double()))
    assert_close(d.SpectralDiffusion(eta).precompute(wide)(x.double()), exact, scale=max(1, eta))
    layer = big(diffusion_mode="spectral", eta=eta, diffusion_steps=1)
    # the layer's graph is weighed in float64: its lowest mode stays
    kept = layer._smooth(
        layer._graph_of(layer._stored_graph, x[None].repeat(1, 1, 2), None), randn(1, 20, 8), eta
    )
    assert bool(kept.isfinite().all()) and kept.norm() > 0.1


def test_spectral_gradient_of_a_laplacian_with_equal_eigenvalues():
    A = torch.ones(5, 5, dtype=torch.float64) - torch.eye(5, dtype=torch.float64)
    L = _reference.laplacian(A, True).requires_grad_()
    x = randn(5, 2, dtype=torch.float64)

    def run(L):
        return d.SpectralDiffusion(0.7).precompute((L + L.T) / 2)(x)

    assert torch.autograd.gradcheck(run, (L,)) and torch.autograd.gradgradcheck(run, (L,))
    assert_close(run(L), d.SpectralDiffusion(0.7).precompute(L.detach())(x))


@pytest.mark.parametrize("eta", [0.01, 1.0, 30.0, 3e3])
def test_heat_is_spectral_and_its_coefficients_are_kept(eta):
    from difflayers import diffusion

    L, x = _laplacian(torch.float64), randn(20, 4, dtype=torch.float64)
    heat = d.apply_diffusion(x, L, eta, "heat", steps=2)
    assert_close(heat, d.apply_diffusion(x, L, 2 * eta, "spectral"))
    before = diffusion.heat_coefficients.cache_info().hits
    d.apply_diffusion(x, L, eta, "heat", steps=2)
    assert diffusion.heat_coefficients.cache_info().hits == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0])
def test_retrieval_settles_where_rounding_ends_it(dtype, beta):
    memory = (16 * (randn(200, 16, seed=1).abs() * 5).round()).to(dtype)
    query = memory[:20] + 16 * randn(20, 16, seed=2, dtype=dtype)
    found = d.retrieve(memory, query, beta=beta)
    again = d.retrieve(memory, found.patterns, beta=beta, steps=1)
    noise = 4 * torch.finfo(dtype).eps * memory.double().norm(dim=-1).max()
    assert bool((again.residual <= noise).all()) and bool((found.steps < 10_000).all())


@pytest.mark.parametrize("steps", [0, 1, None])
@pytest.mark.parametrize("memory_batch", [None, 1, 3])
@pytest.mark.parametrize("query_batch", [None, 1, 3])
def test_shapes_of_a_retrieval(steps, memory_batch, query_batch):
    memory = randn(*(() if memory_batch is None else (memory_batch,)), 7, 4)
    query = randn(*(() if query_batch is None else (query_batch,)), 5, 4, seed=1)
    batches = [b for b in (memory_batch, query_batch) if b is not None]
    shape = (max(batches), 5) if batches else (5,)
    found = d.retrieve(memory, query, steps=steps, beta=3.0)
    assert found.patterns.shape == (*shape, 4)
    assert found.steps.shape == found.residual.shape == shape
    if len(shape) == 2:
        for i in range(shape[0]):
            one = d.retrieve(
                memory if memory.dim() == 2 else memory[i % len(memory)],
                query if query.dim() == 2 else query[i % len(query)],
                steps=steps,
                beta=3.0,
            )
            assert_close(found.patterns[i], one.patterns)
            assert torch.equal(found.steps[i], one.steps)


def test_numbers_of_numpy_are_numbers():
    config = d.DiffusionConfig(
        eta=np.float32(0.25), steps=np.int64(2), k_neighbors=np.int32(3), use_sparse=np.bool_(True)
    )
    assert d.DiffusionConfig.from_json(config.to_json()) == config
    options = {"num_heads": np.int64(2), "scaling": np.float32(0.5), "batch_first": np.bool_(True)}
    options |= {"update_steps_max": np.int64(1), "update_steps_eps": np.float64(1e-4)}
    options |= {"dropout": np.float32(0.0), "hidden_size": np.int16(4)}
    for cls in (d.Hopfield, d.DiffusedHopfield, d.HopfieldPooling, d.HopfieldLayer):
        layer = spread(cls(np.int64(8), **options))
        plain = spread(cls(8, num_heads=2, scaling=0.5, update_steps_max=1, hidden_size=4))
        assert torch.equal(layer(randn(2, 5, 8)), plain(randn(2, 5, 8)))
    d.HopfieldPooling(8, quantity=np.int64(2))
    d.HopfieldEncoderLayer(np.int64(8), np.int64(2), 16)
    d.GraphBuilder(np.int64(3)).build(randn(9, 4))
    d.retrieve(randn(5, 4), randn(2, 4), beta=np.float32(2.0), steps=np.int64(2))
    assert data_of(layer.hopfield)[0].shape == (2, 6, 8)
