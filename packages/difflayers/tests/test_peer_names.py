"""Every public name, signature and method of difflayers 0.1.1 against ours and the page."""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

import difflayers as d
from difflayers import _reference
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

from . import peer_names
from .cases import randn

ROUNDING32 = tolerance(torch.float32, "rounding")

PEER = json.loads(peer_names.FILE.read_text(encoding="utf-8"))
PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
# what differs -> how the page's table says it
KNOWN = {
    ":DiffusedHopfield: positional": "`DiffusedHopfield` takes eight positional arguments",
    ":HopfieldPooling: positional": "`HopfieldPooling` and `HopfieldLayer` take eight positional",
    ":HopfieldLayer: positional": "`HopfieldPooling` and `HopfieldLayer` take eight positional",
    ":EnergyTracker: keywords eta": "`EnergyTracker(enabled, tol, beta)`",
    ":EnergyTracker: positional": "`EnergyTracker(enabled, tol, beta)`",
    ":EnergyTracker.history": "`energies`, not `history`",
    ":EnergyTracker.step: keywords L": "`step(Q, K, beta)`",
    ":EnergyTracker.step: positional": "`step(Q, K, beta)`",
    ":EnergyTracker.step_factored": "no `step_factored`",
}
# documented forms of two kinds of call; the tests below make the peer's
BOTH_WAYS = {
    ":DynamicsEngine",
    ":FactoredDiffusion",
    ":GraphBuilder",
    "graph:GraphBuilder",
    "transformer:HopfieldEncoderLayer",
    "transformer:HopfieldDecoderLayer",
}
INSTANCES = {
    "auxiliary.data:BitPatternSet": lambda cls: cls(4, 3, 2),
    "auxiliary.data:LatchSequenceSet": lambda cls: cls(4),
}


def _calls(label, peer, function):
    signature = inspect.signature(function).parameters
    names = [n for n in signature if n != "self"]
    if "hopfield" in names and signature["hopfield"].kind.name == "VAR_KEYWORD":
        names += list(inspect.signature(d.Hopfield).parameters)
    missing = [n for n, _, _ in peer if n not in names]
    if missing:
        yield f"{label}: keywords {' '.join(missing)}"
    wanted = [n for n, kind, _ in peer if kind != "KEYWORD_ONLY"]
    given = [n for n, p in signature.items() if "POSITIONAL" in p.kind.name and n != "self"]
    if wanted != given[: len(wanted)] and label not in BOTH_WAYS:
        yield f"{label}: positional"


def _differences():
    for key, entry in PEER.items():
        where, name = key.split(":")
        home = importlib.import_module("difflayers" + ("." + where if where else ""))
        thing = getattr(home, name, None)
        if thing is None:
            yield key
            continue
        yield from _calls(key, entry["call"], thing)
        owner = INSTANCES[key](thing) if key in INSTANCES else thing
        for member, parameters in entry.get("members", {}).items():
            if not hasattr(owner, member):
                yield f"{key}.{member}"
            elif parameters is not None:
                yield from _calls(f"{key}.{member}", parameters, getattr(owner, member))


def test_the_page_says_exactly_what_differs():
    assert len(PEER) > 25
    assert sorted(set(_differences())) == sorted(KNOWN)
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    for what, text in KNOWN.items():
        assert text in table, what


@pytest.mark.parametrize("key", PEER)
def test_defaults_are_the_peers(key):
    where, name = key.split(":")
    thing = getattr(importlib.import_module("difflayers" + ("." + where if where else "")), name)
    signature = inspect.signature(thing).parameters
    for parameter, _, default in PEER[key]["call"]:
        ours = signature.get(parameter)
        if default is None or ours is None or f"{key}: positional" in KNOWN and "Energy" in key:
            continue
        value = ours.default
        if repr(value) == "<from config>":
            field = "steps" if parameter == "diffusion_steps" else parameter
            value = getattr(d.DiffusionConfig(), field)
        elif value is None and default != "None":
            continue  # settled inside: the tests below make the call
        assert repr(value) == default, parameter


@pytest.mark.parametrize("use_sparse", [False, True])
def test_graph_builder_of_a_number(use_sparse):
    X = randn(20, 4)
    exact = _reference.adjacency(X.double(), 5)
    for builder in (
        d.GraphBuilder(5, use_sparse),
        d.GraphBuilder(k=5, use_sparse=use_sparse),
        d.GraphBuilder(use_sparse=use_sparse),
    ):
        assert (builder.k, builder.use_sparse) == (5, use_sparse)
        W, deg, adj_indices = builder.build(X)
        assert_close(W.to_dense() if use_sparse else W, exact)
        assert_close(deg, exact.sum(1))
        assert adj_indices.shape == (20, 5)
    with pytest.raises(TypeError, match="`X`"):
        d.GraphBuilder(5, 6)


@pytest.mark.parametrize("normalized", [False, True])
def test_factored_diffusion_of_a_number(normalized):
    W = _reference.adjacency(randn(20, 4, dtype=torch.float64), 3)
    L, X = _reference.laplacian(W, normalized), randn(20, 2, dtype=torch.float64)
    exact = _reference.diffuse(X, L, "factored", 0.1, 3)
    for op in (
        d.FactoredDiffusion(0.1, 3),
        d.FactoredDiffusion(0.1, steps=3),
        d.FactoredDiffusion(eta=0.1, steps=3),
        d.DiffusionOperator.create("factored", 0.1, 3),
    ):
        with pytest.raises(RuntimeError, match="precompute"):
            op(X)
        assert_close(op.precompute(L)(X), exact)
        assert_close(op.precompute(L.to_sparse())(X=X), exact)
        if not normalized:
            assert_close(op.precompute_from_graph(W, W.sum(1))(X), exact)
    assert d.FactoredDiffusion(0.1).steps == 1
    assert_close(d.apply_diffusion(X=X, L=L, eta=0.1, mode="factored", steps=3), exact)
    with pytest.raises(ValueError, match="eta"):
        d.FactoredDiffusion()


def test_dynamics_engine_without_a_config():
    X = randn(12, 4)
    graph = d.GraphCache(d.DiffusionConfig(eta=0.2, k_neighbors=3)).get(X)
    op = d.FactoredDiffusion(0.2, 1).precompute_from_graph(graph.W, graph.deg)
    attend, tracker = d.AttentionOperator(beta=2.0), d.EnergyTracker(beta=2.0)
    L = _reference.laplacian(graph.W.double(), False)
    Q = K = X.double()
    for _ in range(4):
        K = _reference.diffuse(K, L, "simple", 0.2, 1)
        Q = _reference.diffuse(Q, L, "simple", 0.2, 1)
        Q = _reference.associate(Q, K, X.double(), 2.0)
    op = d.FactoredDiffusion(0.2).precompute(L.float())
    for engine in (
        d.DynamicsEngine(op, attend, 4, tracker),
        d.DynamicsEngine(op, attend, steps=4, energy_tracker=tracker, query_diffusion_op=op),
    ):
        assert engine.steps == 4
        found = engine.run_dynamics(X, X, X, L=L.float(), W=graph.W, deg=graph.deg)
        assert len(tracker.energies) == 4
        for a, b in zip(found, (Q, K), strict=True):
            assert_close(a, b)
        # patterns in front, then the batch: as diffusion operators take them
        many = torch.stack((X, X.flip(0)), 1)
        assert_close(engine.run_dynamics(many, many, many)[0][:, 0], Q)
    assert d.DynamicsEngine(d.IterativeDiffusion(0.1, 7)).steps == 7
    assert_close(d.DynamicsEngine(op).run_diffusion(X), op(X))
    again = d.DynamicsEngine(op, steps=2, energy_tracker=tracker).run_diffusion(X, L.float(), X)
    assert_close(again, op(op(X)))
    with pytest.raises(RuntimeError, match="attention_op"):
        d.DynamicsEngine(op).run_dynamics(X, X, X)
    eta = d.DynamicsEngine(op).compute_adaptive_eta(torch.zeros(3, 8), 0.4, 5.0, 1.0)
    assert abs(eta - 0.4 / (1 + torch.exp(torch.tensor(5.0 * (1 - 2.0794415))).item())) < ROUNDING32


def test_diffused_hopfield_has_the_peers_attributes():
    layer = d.DiffusedHopfield(8, eta=0.2, k_neighbors=3, diffusion_steps=2)
    assert layer.get_config()["eta"] == layer.eta == 0.2 and json.dumps(layer.get_config())
    assert (layer.k_neighbors, layer.diffusion_steps, layer.logit_eta) == (3, 2, 0.2)
    layer(randn(1, 9, 8))
    assert layer._stored_graph._value is not None
    layer.invalidate_cache()
    assert layer._stored_graph._value is None
    with pytest.raises(AttributeError, match="can only be read"):
        layer.eta = 0.3


@pytest.mark.parametrize("pattern_size", [None, 2, 3, 6])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_checkpoint_with_a_bias_pattern_loads_strictly(pattern_size, heads):
    """hflayers gives bias_v the size of bias_k, whatever that of the projected patterns."""
    layer = d.Hopfield(4, pattern_size=pattern_size, num_heads=heads, concat_bias_pattern=True)
    core = layer.association_core
    assert core.bias_v.shape == core.bias_k.shape == (1, 1, 4)
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
    x = randn(2, 5, 4)
    v = layer.get_projected_pattern_matrix(x)
    width = min(4 // heads, v.shape[-1])
    own = core.bias_v.view(heads, -1)[:, :width]
    assert torch.equal(v[0, :, -1, :width], own.detach())
    assert not v[0, :, -1, width:].any()
    if pattern_size == 2 and heads == 1:  # ours before 0.1.0: the size of the projected patterns
        old = {**layer.state_dict(), "association_core.bias_v": torch.ones(1, 1, 2)}
        layer.load_state_dict(old, strict=True)
        assert core.bias_v.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
