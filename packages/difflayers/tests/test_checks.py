"""Bad input: one clear error that names what is wrong."""

import pytest
import torch

import difflayers as d
from difflayers.graph.build_graph import build_knn_graph, build_similarity_matrix

from .cases import randn

X = randn(2, 6, 8)


def wrong(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_tuples_in_the_wrong_order_or_sizes():
    memory = d.Hopfield(8)
    with wrong("stored, state, projection"):
        memory((X, randn(2, 4, 8), randn(2, 5, 8)))
    with wrong("`state` must have the batch size"):
        memory((X, randn(3, 4, 8), X))
    with wrong("`stored` must have last dimension 8"):
        memory((randn(2, 6, 7), X, X))
    with wrong("`projection` must have last dimension 8"):
        memory((X, X, randn(2, 6, 7)))
    with wrong("three dimensions"):
        memory(randn(6, 8))
    with wrong("one tensor or the tuple", TypeError):
        memory((X, X))
    with wrong("floating", TypeError):
        memory(X.long())
    with wrong("`state` must have the dtype of `stored`|`state`.*dtype"):
        memory((X, X.double(), X))
    with torch.autocast("cpu", torch.bfloat16):
        assert memory((X, X.bfloat16(), X)).shape == X.shape


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_heads": 3}, "divisible by num_heads=3"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"update_steps_eps": -1e-4}, "update_steps_eps"),
        ({"scaling": float("nan")}, "scaling.*finite"),
        ({"normalize_state_pattern_eps": -1.0}, "normalize_state_pattern_eps"),
        ({"update_steps_eps": torch.tensor([0.1, -1.0]), "num_heads": 2}, "update_steps_eps"),
        ({"update_steps_max": torch.tensor([1, 2, 3])}, "one entry per head"),
        ({"scaling": torch.ones(3)}, "one entry per head"),
        ({"separation": "hardmax"}, "separation"),
        ({"association_activation": "no_such"}, "association_activation"),
        ({"normalize_state_pattern": False}, "normalize_state_pattern_affine"),
        ({"concat_bias_pattern": True, "stored_pattern_as_static": True}, "concat_bias_pattern"),
    ],
)
def test_constructor(options, match):
    with wrong(match):
        d.Hopfield(8, **options)


def test_input_size_is_needed_unless_all_is_static():
    with wrong("input_size"):
        d.Hopfield()


def test_masks():
    memory = d.Hopfield(8, num_heads=2)
    with wrong("stored_pattern_padding_mask"):
        memory(X, stored_pattern_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with wrong("association_mask"):
        memory(X, association_mask=torch.zeros(3, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eta": 1.3}, "at most 1 for the normalised"),
        ({"eta": -0.1}, "eta"),
        ({"diffusion_mode": "warm"}, "diffusion_mode"),
        ({"attention_mode": "sparse"}, "attention_mode"),
        ({"k_neighbors": 0}, "k_neighbors"),
        ({"diffusion_steps": 0}, "steps"),
        ({"restart": 1.5}, "restart"),
        ({"adaptive_threshold": float("nan")}, "adaptive_threshold"),
        ({"diffusion_mode": "heat", "eta": float("inf")}, "eta.*finite"),
        ({"use_logit_diffusion": True, "logit_eta": 2.0}, "logit_eta"),
        ({"attention_mode": "graph", "add_zero_association": True}, "add_zero_association"),
        ({"attention_mode": "graph", "update_steps_max": None}, "update_steps_max"),
        ({"config": d.DiffusionConfig(), "eta": 0.3}, "not contradict"),
    ],
)
def test_diffusion_settings(options, match):
    with wrong(match):
        d.DiffusedHopfield(8, **options)


def test_any_eta_is_legal_for_the_heat_kernels():
    for mode in ("spectral", "heat"):
        assert d.DiffusedHopfield(8, diffusion_mode=mode, eta=7.0)(X).isfinite().all()


def test_a_step_too_large_for_the_plain_laplacian_names_the_bound():
    X = torch.rand(1, 30, 4)
    memory = d.DiffusedHopfield(4, use_normalized_laplacian=False, eta=0.9, k_neighbors=8)
    with wrong("1/d_max"):
        memory(X)
    cfg = d.DiffusionConfig(use_normalized_laplacian=False, eta=0.9, k_neighbors=8)
    with wrong("1/d_max"):
        d.GraphCache(cfg).get(X[0])


def test_nan_patterns_have_no_graph():
    bad = X.clone()
    bad[0, 0, 0] = torch.nan
    with wrong("finite"):
        d.DiffusedHopfield(8)(bad)
    with wrong("finite"):
        build_similarity_matrix(bad[0])


def test_more_neighbours_than_patterns():
    S = build_similarity_matrix(X[0])
    with wrong("less than the number of patterns"):
        build_knn_graph(S, 6)
    with wrong("less than the number of patterns"):
        d.GraphBuilder(k=6).build(X[0])
    assert d.DiffusedHopfield(8, k_neighbors=60)(X).isfinite().all()


def test_operators():
    with wrong("precompute", RuntimeError):
        d.SimpleDiffusion(0.1)(X[0])
    with wrong("N = 5"):
        d.SimpleDiffusion(0.1).precompute(torch.eye(5))(X[0])
    with wrong("mode"):
        d.apply_diffusion(X[0], torch.eye(6), 0.1, mode="fast")
    with wrong("adj_indices"):
        d.AttentionOperator(mode="graph")(X[0], X[0], X[0])
    with wrong(r"`adj_indices` must be in \[0, 6\)"):
        d.AttentionOperator(mode="graph")(X[0], X[0], X[0], torch.full((6, 2), 6))
    with wrong("mode"):
        d.AttentionOperator(mode="nearest")


def test_pooling_and_layer():
    with wrong("stored, projection", TypeError):
        d.HopfieldPooling(8)((X, X, X))
    with wrong("num_pattern_repetitions"):
        d.HopfieldLayer(8, quantity=3, num_pattern_repetitions=4)
    with wrong("quantity"):
        d.HopfieldLayer(8, quantity=0)


def test_energy_of_a_callable_is_not_known():
    with wrong("energy", NotImplementedError):
        d.energy(X[0], X[0], separation=lambda x, dim: torch.softmax(x, dim))


def test_config_rejects_unknown_fields():
    with wrong("fields of DiffusionConfig"):
        d.DiffusionConfig.from_dict({"etta": 0.1})
    with wrong("mapping", TypeError):
        d.DiffusionConfig.from_json("[1, 2]")
    with wrong("use_sparse", TypeError):
        d.DiffusionConfig(use_sparse="yes")
    with wrong("be a DiffusionConfig", TypeError):
        d.DiffusedHopfield(8, config={"eta": 0.1})


@pytest.mark.parametrize("function", [d.retrieve, d.energy])
def test_memories_and_queries_that_do_not_fit(function):
    with wrong("size of `memory`"):
        function(X[0], randn(3, 7))
    with wrong("batch size of `memory`, 2"):
        function(X, randn(3, 4, 8))
    with wrong("shape"):
        function(X[0], randn(8))
    with wrong("dtype"):
        function(X[0], X[0].double())
    with wrong("beta"):
        function(X[0], X[0], beta=float("nan"))
    assert torch.equal(d.retrieve(X[0], X[0], steps=0).patterns, X[0])
    with wrong("steps"):
        d.retrieve(X[0], X[0], steps=-1)


def test_a_callable_that_returns_something_else():
    with wrong("`separation` must return weights of the scores' shape"):
        d.Hopfield(8, separation=lambda scores, dim: scores.sum(dim))(X)


@pytest.mark.parametrize("options", [{}, {"update_steps_max": 2}, {"separation": "entmax15"}])
def test_nan_reaches_only_the_states_that_see_it(options):
    memory, bad = d.Hopfield(8, **options), X.clone()
    bad[0, 1, 2] = torch.nan
    assert torch.equal(memory((X, bad, X)).isnan().any(-1), bad.isnan().any(-1))
    seen = memory((bad, X, bad)).isnan().any(-1)
    assert bool(seen[0].all()) and not bool(seen[1].any())
