"""The calls that users of this API know, as they write them. The README itself: test_public_api."""

import pytest
import torch
from torch import nn

import difflayers as d

from .cases import randn


def test_quick_start_calls():
    stored, queries, projections = (
        randn(8, 50, 64),
        randn(8, 10, 64, seed=1),
        randn(8, 50, 64, seed=2),
    )
    assert d.Hopfield(input_size=64, num_heads=4, batch_first=True)(
        (stored, queries, projections)
    ).shape == (8, 10, 64)
    pooling = d.HopfieldPooling(input_size=64, num_heads=1, batch_first=True)
    assert pooling(randn(8, 100, 64)).shape == (8, 1, 64)
    lookup = d.HopfieldLayer(input_size=64, num_pattern_repetitions=32)
    assert lookup.quantity == 32 and lookup(queries).shape == (8, 10, 64)
    dh = d.DiffusedHopfield(
        input_size=64,
        num_heads=4,
        batch_first=True,
        eta=0.1,
        k_neighbors=8,
        diffusion_mode="factored",
        diffusion_steps=3,
        diffuse_key=True,
        diffuse_query=False,
    )
    assert dh((stored, queries, projections)).shape == (8, 10, 64)
    mask = torch.zeros(8, 50, dtype=torch.bool)
    mask[:, 40:] = True
    assert dh((stored, queries, projections), stored_pattern_padding_mask=mask).shape == (8, 10, 64)


def test_all_keywords_of_the_layers():
    d.Hopfield(
        input_size=128,
        hidden_size=64,
        output_size=128,
        num_heads=8,
        scaling=None,
        update_steps_max=0,
        update_steps_eps=1e-4,
        normalize_stored_pattern=True,
        normalize_state_pattern=True,
        batch_first=True,
        dropout=0.1,
    )
    d.DiffusedHopfield(
        input_size=128,
        num_heads=4,
        batch_first=True,
        scaling=1.0,
        eta=0.1,
        k_neighbors=8,
        diffusion_mode="factored",
        diffusion_steps=3,
        use_normalized_laplacian=True,
        diffuse_key=True,
        diffuse_query=False,
        use_sparse=False,
        use_logit_diffusion=False,
        logit_eta=None,
        adaptive_eta=False,
        cache_graph=True,
        energy_stop_tol=0.0,
    )
    x = randn(3, 9, 128)
    assert d.HopfieldPooling(input_size=128, num_heads=4, batch_first=True, dropout=0.1)(
        x
    ).shape == (3, 1, 128)
    layer = d.HopfieldLayer(input_size=128, num_pattern_repetitions=64, batch_first=True)
    assert layer(x).shape == x.shape


def test_static_retrieval():
    off = {
        f"normalize_{name}{tail}": False
        for name in ("stored_pattern", "state_pattern", "pattern_projection")
        for tail in ("", "_affine")
    }
    model = d.DiffusedHopfield(
        input_size=None,
        stored_pattern_as_static=True,
        state_pattern_as_static=True,
        pattern_projection_as_static=True,
        disable_out_projection=True,
        batch_first=True,
        scaling=4.0,
        eta=0.15,
        k_neighbors=10,
        diffusion_mode="iterative",
        diffusion_steps=5,
        diffuse_key=True,
        **off,
    )
    assert not list(model.parameters())
    assert model((randn(2, 30, 5), randn(2, 4, 5), randn(2, 30, 6))).shape == (2, 4, 6)


def test_config_is_frozen_and_serialisable():
    cfg = d.DiffusionConfig(
        eta=0.1,
        beta=1.0,
        steps=3,
        diffusion_mode="factored",
        attention_mode="dense",
        k_neighbors=5,
        use_normalized_laplacian=True,
        use_sparse=False,
        diffuse_key=True,
        diffuse_query=False,
        use_logit_diffusion=False,
        logit_eta=None,
        adaptive_eta=False,
        adaptive_temperature=5.0,
        adaptive_threshold=1.0,
        cache_graph=True,
        energy_stop_tol=0.0,
    )
    assert cfg == d.DiffusionConfig() == d.DiffusionConfig.from_json(cfg.to_json())
    with pytest.raises(AttributeError):
        cfg.eta = 0.2  # type: ignore[misc]


def test_graph_pipeline():
    from difflayers.graph.build_graph import build_knn_graph, build_similarity_matrix
    from difflayers.graph.laplacian import compute_normalized_laplacian

    X = randn(100, 64)
    L = compute_normalized_laplacian(
        build_knn_graph(build_similarity_matrix(X), k=8, as_sparse=False)
    )
    graph = (
        d.GraphBuilder(X).cosine_similarity().knn(k=8, sparse=True).normalized_laplacian().build()
    )
    assert graph.W.is_sparse and graph.deg.shape == (100,)
    torch.testing.assert_close(graph.L.to_dense(), L)


def test_logit_adaptive_and_ablation():
    x = randn(2, 12, 64)
    for options in (
        {"diffuse_key": True, "diffuse_query": False, "eta": 0.1},
        {"diffuse_key": False, "diffuse_query": True, "eta": 0.1},
        {"diffuse_key": True, "diffuse_query": True, "eta": 0.1},
        {"diffuse_key": True, "use_logit_diffusion": True, "logit_eta": 0.05},
        {"adaptive_eta": True, "eta": 0.2, "adaptive_temperature": 5.0, "adaptive_threshold": 1.0},
    ):
        assert d.DiffusedHopfield(input_size=64, **options)(x).shape == x.shape


def test_dynamics_engine():
    from difflayers.attention_operator import AttentionOperator
    from difflayers.diffusion import FactoredDiffusion

    patterns = Q = K = V = randn(40, 16)
    cfg = d.DiffusionConfig(eta=0.1, steps=5, k_neighbors=8)
    graph = d.GraphCache(cfg).get(patterns)
    engine = d.DynamicsEngine(
        FactoredDiffusion(graph.W, graph.deg, cfg.eta),
        AttentionOperator(beta=cfg.beta, mode=cfg.attention_mode),
        cfg,
    )
    tracker = d.EnergyTracker(enabled=True)
    Q_out, K_out = engine.run(Q, K, V, tracker=tracker)
    assert Q_out.shape == Q.shape and K_out.shape == K.shape and len(tracker.energies) == 5


def test_transformer_integration():
    encoder = nn.TransformerEncoder(
        encoder_layer=d.HopfieldEncoderLayer(
            d_model=32, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True
        ),
        num_layers=2,
    )
    decoder = nn.TransformerDecoder(
        decoder_layer=d.HopfieldDecoderLayer(
            d_model=32, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True
        ),
        num_layers=2,
    )
    x = randn(2, 5, 32)
    assert decoder(x, encoder(randn(2, 7, 32))).shape == x.shape
