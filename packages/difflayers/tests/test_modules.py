"""The layers: masks, separations, padding, cache, transformer layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import difflayers as d
from difflayers import _reference
from shared_kernels import qexp
from shared_kernels.testing import (
    assert_close,
    assert_no_worse,
    measure_memory,
    others_thorough,
    parametrize,
)

from .cases import MEMORIES, MODES, data_of, randn, spread

INPUTS = ("stored_pattern", "state_pattern", "pattern_projection")


@parametrize(MEMORIES)
def test_output_is_the_readout_of_the_associations(case):
    """SDPA path, weights path and reference agree; the associations sum to 1."""
    memory = spread(d.Hopfield(8, num_heads=2, **case.options)).double()
    data = data_of(memory, dtype=torch.float64)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[:, 0] = True
    out = memory(data, association_mask=~keep)
    xi = memory.get_association_matrix(data, association_mask=~keep)
    v = memory.get_projected_pattern_matrix(data, association_mask=~keep)
    assert_close(xi.sum(-1), torch.ones_like(xi[..., 0]))
    assert bool((xi[..., :6][:, :, ~keep] == 0).all())
    heads = (xi @ v).transpose(1, 2).flatten(2)
    core = memory.association_core
    exact = heads if core.out_proj is None else core.out_proj(heads)
    assert_close(out if memory.batch_first else out.transpose(0, 1), exact)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("separation", ["softmax", "entmax15", "sparsemax"])
def test_static_retrieval_is_the_formula(steps, separation):
    off = {f"normalize_{n}{t}": False for n in INPUTS for t in ("", "_affine")}
    static = {
        f"{n}_as_static": True for n in ("stored_pattern", "state_pattern", "pattern_projection")
    }
    memory = d.Hopfield(
        scaling=2.0,
        update_steps_max=steps,
        disable_out_projection=True,
        separation=separation,
        **static,
        **off,
    )
    k, q, v = randn(3, 7, 5), randn(3, 4, 5, seed=1), randn(3, 7, 6, seed=2)
    normalizer = {
        "softmax": torch.softmax,
        "entmax15": lambda x, dim: qexp.entmax(x, 1.5, dim),
        "sparsemax": qexp.sparsemax,
    }[separation]
    exact = _reference.associate(q.double(), k.double(), v.double(), 2.0, steps, None, normalizer)
    assert_close(memory((k, q, v)), exact)


def test_any_callable_separates():
    seen = []

    def power(scores, dim):
        seen.append(scores.shape)
        return torch.softmax(2 * scores, dim)

    data = data_of(d.Hopfield(8))
    ours = spread(d.Hopfield(8, scaling=0.5, separation=power))
    plain = spread(d.Hopfield(8, scaling=1.0))
    assert_close(ours(data), plain(data))
    assert seen


def test_scaling_in_every_form_is_per_head():
    data = data_of(d.Hopfield(8))
    one = spread(d.Hopfield(8, num_heads=2, scaling=1.0))
    for same in (1, torch.tensor(1.0), torch.ones(2), nn.Parameter(torch.ones(2))):
        other = d.Hopfield(8, num_heads=2, scaling=same)
        other.load_state_dict(
            {
                **one.state_dict(),
                **{k: v for k, v in other.state_dict().items() if k not in one.state_dict()},
            }
        )
        assert_close(other(data), one(data))
    split = d.Hopfield(8, num_heads=2, scaling=torch.tensor([0.0, 1.0]))
    split.load_state_dict(one.state_dict())
    xi = split.get_association_matrix(data)
    assert_close(xi[:, 0], torch.full_like(xi[:, 0], 1 / 6))
    assert_close(xi[:, 1], one.get_association_matrix(data)[:, 1])


def test_learned_scaling_has_a_gradient():
    beta = nn.Parameter(torch.ones(2))
    memory = spread(d.Hopfield(8, num_heads=2, scaling=beta))
    memory(data_of(memory)).square().sum().backward()
    assert bool((memory._scaling.grad != 0).all())


def test_static_heads_do_not_mix_batch_items():
    memory = spread(
        d.Hopfield(
            8,
            num_heads=2,
            stored_pattern_as_static=True,
            normalize_stored_pattern=False,
            normalize_stored_pattern_affine=False,
        )
    )
    stored, state, projection = randn(3, 6, 4), randn(3, 2, 8), randn(3, 6, 8)
    out = memory((stored, state, projection))
    for i in range(3):
        alone = memory((stored[i : i + 1], state[i : i + 1], projection[i : i + 1]))
        assert_close(out[i : i + 1], alone)


@pytest.mark.parametrize("options", [{}, {"separation": "sparsemax"}, {"update_steps_max": 2}])
@pytest.mark.parametrize("kind", ["bool", "uint8", "additive"])
def test_masks_of_every_kind(kind, options):
    memory = spread(d.Hopfield(8, num_heads=2, **options))
    data = data_of(memory)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 2:] = True
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 0] = True

    def convert(m):
        if kind == "additive":
            return torch.zeros(m.shape).masked_fill(m, -torch.inf)
        return m.to(torch.uint8) if kind == "uint8" else m

    out = memory(data, convert(padding), convert(mask))
    short = memory(
        tuple(x[:1, : (4 if i == 1 else 2)] for i, x in enumerate(data)), None, mask[:, :2]
    )
    assert_close(out[:1], short)
    per_head = mask.expand(4, 4, 6)
    assert_close(memory(data, padding, convert(per_head)), out)


@pytest.mark.parametrize("options", [{}, {"separation": "entmax15"}, {"update_steps_max": None}])
def test_a_state_with_nothing_to_associate_retrieves_zero(options):
    memory = spread(d.Hopfield(8, num_heads=2, disable_out_projection=True, **options))
    data = tuple(x.requires_grad_() for x in data_of(memory))
    padding = torch.tensor([[True] * 6, [False] * 6])
    out = memory(data, padding)
    assert bool((out[0] == 0).all()) and bool((out[1] != 0).any())
    out.sum().backward()
    for x in data:
        assert bool((x.grad[0] == 0).all()) and bool(x.grad.isfinite().all())


def test_bias_pattern_is_one_more_stored_pattern():
    memory = spread(d.Hopfield(8, num_heads=2, concat_bias_pattern=True, add_zero_association=True))
    plain = d.Hopfield(8, num_heads=2)
    keys = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in memory.state_dict().items() if k in keys})
    data = data_of(memory)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    xi = memory.get_association_matrix(data, padding)
    assert xi.shape == (2, 2, 4, 8) and bool((xi[..., 6:] > 0).all())
    rest = xi[..., :6] / xi[..., :6].sum(-1, keepdim=True)
    assert_close(rest, plain.get_association_matrix(data, padding))


def test_updates_per_head_and_until_convergence():
    data = data_of(d.Hopfield(8))
    many = spread(d.Hopfield(8, num_heads=2, scaling=0.6, update_steps_max=60))
    until = spread(
        d.Hopfield(8, num_heads=2, scaling=0.6, update_steps_max=None, update_steps_eps=1e-6)
    )
    assert_close(until(data), many(data), scale=10)  # both stop near the fixed point
    mixed = spread(d.Hopfield(8, num_heads=2, scaling=0.6, update_steps_max=torch.tensor([0, 3])))
    xi = mixed.get_association_matrix(data)
    for head, steps in ((0, 0), (1, 3)):
        alone = spread(d.Hopfield(8, num_heads=2, scaling=0.6, update_steps_max=steps))
        assert_close(xi[:, head], alone.get_association_matrix(data)[:, head])


def test_expanded_patterns_are_worked_on_once_and_right():
    memory = spread(d.Hopfield(8, num_heads=2))
    stored, state, projection = data_of(memory)
    one = stored[:1].expand(2, -1, -1)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 3:] = True
    same = state[:1].expand(2, -1, -1)
    for tuple_ in (
        (one, state, projection),
        (one, state, one),
        (stored, same, projection),
        (one, same, one),
    ):
        full = tuple(x.contiguous() for x in tuple_)
        for mask in (None, padding):
            assert_close(memory(tuple_, mask), memory(full, mask))
            assert memory.get_projected_pattern_matrix(tuple_, mask).shape[0] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["Hopfield", "HopfieldPooling", "HopfieldLayer", "DiffusedHopfield"]
)
def test_every_dtype(name, dtype):
    module = spread(getattr(d, name)(8, num_heads=2, update_steps_max=1)).to(dtype)
    exact_module, x = copy.deepcopy(module).double(), randn(2, 9, 8, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    assert_close(out, exact_module(x.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_err_no_more_than_plain_torch(dtype):
    module = spread(d.Hopfield(8, num_heads=2, update_steps_max=1)).to(dtype)
    x = randn(2, 9, 8, dtype=dtype)

    def by_hand(module, x):
        norms = module.norm_state_pattern, module.norm_stored_pattern
        heads = module.association_core.heads
        q, k, v = heads(norms[0](x), norms[1](x), module.norm_pattern_projection(x))
        for values in (k, v):
            q = torch.softmax(module.scaling * q @ k.mT, -1) @ values
        return module.association_core.output(q)

    exact = by_hand(copy.deepcopy(module).double(), x.double())
    assert_no_worse(module(x), eager=by_hand(module, x), exact=exact)


def test_autocast():
    memory = spread(d.DiffusedHopfield(8, num_heads=2, separation="sparsemax"))
    data = data_of(memory)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory(data)
    assert (out - memory(data)).abs().max() < 0.1 * out.abs().max()


OPTIONS = {
    "plain": {},
    "updates": {"update_steps_max": 2},
    "until": {"update_steps_max": None, "update_steps_eps": 1e-2},
    "sparsemax": {"separation": "sparsemax"},
    "value size": {"pattern_size": 2},
    "diffused": {"k_neighbors": 3, "use_sparse": True, "diffuse_value": True},
    "logit": {"use_logit_diffusion": True, "use_sparse": True},
    "adaptive": {"adaptive_eta": True, "use_sparse": True},
    "graph": {"attention_mode": "graph"},
}


@pytest.mark.system
@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_changes_the_memory_class(name):
    N = 3072
    cls = d.DiffusedHopfield if name in ("diffused", "logit", "adaptive", "graph") else d.Hopfield
    memory = cls(4, hidden_size=3, **OPTIONS[name])
    x = randn(1, N, 4)
    training = name not in ("until", "logit")

    def run():
        with torch.set_grad_enabled(training):
            out = memory(x)
            if training:
                out.sum().backward()

    # one fp32 N x N buffer is 36 MB; 16 MB tiles and their backward stay below three of them
    assert measure_memory(run).peak < 3 * N * N * 4


# ---------------------------------------------------------------- DiffusedHopfield


@pytest.mark.parametrize("mode", MODES)
def test_diffused_hopfield_is_its_formula(mode):
    memory = spread(
        d.DiffusedHopfield(
            8,
            num_heads=2,
            diffusion_mode=mode,
            eta=0.3,
            k_neighbors=3,
            diffuse_query=True,
            diffuse_value=True,
        )
    ).double()
    stored, state, projection = data_of(memory, L=7, S=9, dtype=torch.float64)

    def smoothed(norm, x, patterns):
        items = []
        for i in range(2):
            L = _reference.laplacian(_reference.adjacency(patterns[i], 3), True)
            items.append(_reference.diffuse(norm(x[i]), L, mode, 0.3, 3))
        return torch.stack(items)

    key = smoothed(memory.norm_stored_pattern, stored, stored)
    query = smoothed(memory.norm_state_pattern, state, state)
    value = smoothed(memory.norm_pattern_projection, projection, stored)
    core = memory.association_core
    q, k, v = core.heads(query, key, value)
    exact = core.output(_reference.associate(q, k, v, memory.scaling))
    assert_close(memory((stored, state, projection)), exact)


def test_logit_diffusion_is_its_formula():
    memory = spread(
        d.DiffusedHopfield(
            8,
            num_heads=2,
            diffuse_key=False,
            use_logit_diffusion=True,
            logit_eta=0.4,
            k_neighbors=3,
        )
    ).double()
    plain = d.Hopfield(8, num_heads=2).double()
    plain.load_state_dict(memory.state_dict())
    stored, state, projection = data = data_of(memory, S=9, dtype=torch.float64)
    xi = plain.get_association_matrix(data)
    for i in range(2):
        L = _reference.laplacian(_reference.adjacency(stored[i], 3), True)
        exact = _reference.logit_diffusion(xi[i], L, 0.4)
        assert_close(memory.get_association_matrix(data)[i], exact)
    v = memory.get_projected_pattern_matrix(data)
    heads = memory.get_association_matrix(data) @ v
    assert_close(memory(data), memory.association_core.output(heads))
    one = tuple(x[:1].expand(2, -1, -1) if i != 1 else x for i, x in enumerate(data))
    assert_close(memory(one), memory(tuple(x.contiguous() for x in one)))


ALL_OPTIONS = [
    {},
    {"use_normalized_laplacian": False},
    {"use_logit_diffusion": True},
    {"adaptive_eta": True},
    {"diffuse_query": True, "diffuse_value": True},
    {"attention_mode": "graph"},
    {"separation": "sparsemax"},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_padding_touches_nothing_and_sparse_is_dense(mode, options):
    options = {"eta": 0.15, "num_heads": 2, "diffusion_mode": mode, **options}
    dense = spread(d.DiffusedHopfield(8, **options))
    stored, state, projection = data_of(dense, B=3, S=20)
    padding = torch.zeros(3, 20, dtype=torch.bool)
    padding[1, 12:] = True
    padding[2] = True
    out = dense((stored, state, projection), padding)
    assert bool(out.isfinite().all())
    short = dense((stored[1:2, :12], state[1:2], projection[1:2, :12]))
    assert_close(out[1:2], short)
    stored = stored.clone()
    stored[1, 12:] += 7.0
    assert_close(dense((stored, state, projection), padding)[1:2], short)
    sparse = d.DiffusedHopfield(8, use_sparse=True, **options)
    sparse.load_state_dict(dense.state_dict())
    assert_close(sparse((stored, state, projection), padding), out)


@pytest.mark.parametrize("mode", MODES)
def test_eta_zero_is_hopfield(mode):
    options = {"num_heads": 2, "stored_pattern_size": 6, "pattern_projection_size": 5}
    plain = spread(d.Hopfield(8, **options))
    diffused = d.DiffusedHopfield(8, eta=0.0, diffusion_mode=mode, **options)
    diffused.load_state_dict(plain.state_dict())
    data = data_of(plain)
    assert_close(diffused(data), plain(data))


def test_factored_is_iterative_on_clustered_memories():
    """A step that ignored the normalisation would grow by orders of magnitude here."""
    x = 5 + 0.1 * randn(2, 40, 8)
    outs = []
    for mode in ("factored", "iterative"):
        memory = spread(
            d.DiffusedHopfield(8, eta=0.9, diffusion_steps=20, k_neighbors=20, diffusion_mode=mode)
        )
        outs.append(memory(x))
    assert_close(outs[0], outs[1])
    assert outs[0].abs().max() < 1e3


def test_one_graph_per_item():
    memory = spread(d.DiffusedHopfield(8, eta=0.5))
    data = data_of(memory, B=3, S=15)
    out = memory(data)
    for i in range(3):
        assert_close(out[i : i + 1], memory(tuple(x[i : i + 1] for x in data)))


def test_queries_are_independent_unless_diffused():
    memory = spread(d.DiffusedHopfield(8, num_heads=2, eta=0.5))
    stored, state, projection = data_of(memory, L=6, S=15)
    out = memory((stored, state, projection))
    changed = state.clone()
    changed[:, 3:] += 2.0
    after = memory((stored, changed, projection))
    assert torch.equal(after[:, :3], out[:, :3]) and not torch.equal(after[:, 3:], out[:, 3:])
    coupled = spread(d.DiffusedHopfield(8, num_heads=2, eta=0.5, diffuse_query=True))
    assert not torch.equal(
        coupled((stored, changed, projection))[:, :3], coupled((stored, state, projection))[:, :3]
    )


def test_graph_attention_in_self_association_sees_the_graph_neighbours():
    memory = spread(d.DiffusedHopfield(8, attention_mode="graph", k_neighbors=3))
    x = randn(2, 10, 8)
    xi = memory.get_association_matrix(x)
    assert_close(xi.sum(-1), torch.ones(2, 1, 10))
    cosine = torch.nn.functional.normalize(x, dim=-1)
    cosine = (cosine @ cosine.mT) - 10 * torch.eye(10)
    nearest = cosine.topk(3, -1).indices
    seen = torch.zeros(2, 10, 10, dtype=torch.bool).scatter(-1, nearest, True)
    assert torch.equal(xi[:, 0] > 0, seen)
    heads = xi @ memory.get_projected_pattern_matrix(x)
    assert_close(memory(x), memory.association_core.output(heads))


@pytest.mark.parametrize("stored_size", [8, 5])
def test_graph_attention_between_different_sets(stored_size):
    memory = spread(
        d.DiffusedHopfield(
            8,
            num_heads=2,
            attention_mode="graph",
            k_neighbors=4,
            stored_pattern_size=stored_size,
            eta=0.0,
        )
    )
    data = data_of(memory, L=3, S=11)
    stored, state, _ = data
    xi = memory.get_association_matrix(data)
    q, k, _ = memory.association_core.heads(
        memory.norm_state_pattern(state), memory.norm_stored_pattern(stored), data[2]
    )
    if stored_size != 8:  # patterns of other sizes are compared in the association space
        state, stored = (x.transpose(1, 2).flatten(2) for x in (q, k))
    cosine = torch.nn.functional.cosine_similarity(state[:, :, None], stored[:, None], -1)
    seen = torch.zeros(2, 3, 11, dtype=torch.bool).scatter(-1, cosine.topk(4, -1).indices, True)
    scores = memory.scaling * q @ k.mT
    assert_close(xi, scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1))
    everyone = spread(
        d.DiffusedHopfield(
            8,
            num_heads=2,
            attention_mode="graph",
            k_neighbors=11,
            stored_pattern_size=stored_size,
            eta=0.0,
        )
    )
    plain = spread(d.Hopfield(8, num_heads=2, stored_pattern_size=stored_size))
    assert_close(everyone(data), plain(data))


def test_adaptive_eta_follows_the_entropy_of_each_item():
    memory = spread(d.DiffusedHopfield(8, adaptive_eta=True, eta=0.4, adaptive_threshold=1.0))
    stored, state, projection = data_of(memory, S=15)
    state = state.clone()
    xi = d.Hopfield.get_association_matrix
    key, query, value = memory._normalize(stored, state, projection)
    eta = memory._adaptive_eta(query, key, value, None, None)
    plain = spread(d.Hopfield(8))
    w = xi(plain, (stored, state, projection)).double()
    entropy = -(w * w.log()).sum(-1).mean((1, 2))
    assert_close(eta.view(-1), 0.4 * torch.sigmoid(5.0 * (entropy - 1.0)))
    for i in range(2):
        alone = memory(tuple(x[i : i + 1] for x in (stored, state, projection)))
        assert_close(memory((stored, state, projection))[i : i + 1], alone)


def test_learned_memory_builds_one_graph_per_optimizer_step():
    memory = spread(d.DiffusedHopfield(8, num_heads=2))
    bank, values = nn.Parameter(randn(1, 20, 8)), nn.Parameter(randn(1, 20, 8, seed=1))
    state = randn(3, 5, 8, seed=2)
    builds = []
    real = d.diffused_attention._graph.build

    def counting(*args, **keywords):
        builds.append(1)
        return real(*args, **keywords)

    d.diffused_attention._graph.build = counting
    try:
        for optimizer in (torch.optim.SGD([bank], 0.1), torch.optim.AdamW([bank], fused=True)):
            builds.clear()
            for _ in range(2):
                for _ in range(3):
                    out = memory((bank.expand(3, -1, -1), state, values.expand(3, -1, -1)))
                out.square().sum().backward()
                optimizer.step()
            assert len(builds) == 2
    finally:
        d.diffused_attention._graph.build = real
    assert bool((bank.grad != 0).any()) and bool((values.grad != 0).any())
    full = tuple(x.detach().expand(3, -1, -1).contiguous() for x in (bank, values))
    assert_close(
        memory((bank.expand(3, -1, -1), state, values.expand(3, -1, -1))),
        memory((full[0], state, full[1])),
    )


def test_copies_and_pickles_drop_the_graph():
    memory = spread(d.DiffusedHopfield(8))
    x = randn(2, 9, 8)
    out = memory(x)
    assert memory._stored_graph._value is not None
    for again in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert again._stored_graph._value is None
        assert torch.equal(again(x), out)
    assert memory.state_dict().keys() == d.Hopfield(8).state_dict().keys()
    memory.invalidate()
    assert memory._stored_graph._value is None


def test_config_object_says_the_same_as_keywords():
    cfg = d.DiffusionConfig(eta=0.2, steps=2, k_neighbors=4, diffuse_value=True)
    ours = spread(d.DiffusedHopfield(8, config=cfg))
    words = spread(
        d.DiffusedHopfield(8, eta=0.2, diffusion_steps=2, k_neighbors=4, diffuse_value=True)
    )
    data = data_of(ours, S=12)
    assert torch.equal(ours(data), words(data))
    assert d.DiffusedHopfield(8, config=d.DiffusionConfig(beta=3.0)).scaling == 3.0
    assert d.DiffusedHopfield(8, config=d.DiffusionConfig(beta=3.0), scaling=2.0).scaling == 2.0


@pytest.mark.system
@pytest.mark.parametrize("cls", others_thorough([d.Hopfield, d.DiffusedHopfield]))
def test_compiles_without_graph_breaks(cls):
    memory = spread(cls(8, num_heads=2, update_steps_max=1))
    data = data_of(memory, S=9)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    assert_close(compiled(data), memory(data))
    compiled(data).sum().backward()
