import inspect
import pickle
from pathlib import Path

import pytest
import torch

import difflayers
from shared_kernels.testing import contracts, readme

DOCUMENTED = {
    "activation": ["HopfieldCore"],
    "api": ["retrieve", "energy", "explain"],
    "functional": ["hopfield_core_forward"],
    "transformer": ["HopfieldEncoderLayer", "HopfieldDecoderLayer"],
    "attention_operator": ["AttentionOperator"],
    "diffusion": ["DiffusionOperator", "FactoredDiffusion", "apply_diffusion"],
    "diffused_attention": ["DiffusedHopfield"],
    "dynamics_engine": ["DiffusionConfig", "GraphCache", "DynamicsEngine", "EnergyTracker"],
    "graph.build_graph": ["build_similarity_matrix", "build_knn_graph"],
    "graph.laplacian": ["compute_laplacian", "compute_normalized_laplacian"],
    "graph.builder": ["GraphBuilder"],
    "graph.laplacian_builder": ["LaplacianBuilder"],
    "pages": ["PatternPages"],
    "auxiliary.data": ["LookupTableDataset", "BitPatternSet", "LatchSequenceSet"],
}


class TestPackage(contracts.PackageContract):
    package = "difflayers"
    root = Path(__file__).parents[1]


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_modules_are_the_homes_of_their_names(module):
    home = __import__(f"difflayers.{module}", fromlist=["_"])
    for name in DOCUMENTED[module]:
        thing = getattr(home, name)
        assert thing.__module__ == f"difflayers.{module}"
        assert inspect.getdoc(thing)


def test_the_migration_page_runs():
    page = Path(__file__).parents[1] / "docs" / "migration.md"
    assert len(readme.blocks(page)) >= 6
    readme.run_blocks(page)


def test_examples_in_docstrings_run():
    import doctest

    names = [n for n in DOCUMENTED if n not in ("graph.build_graph",)] + ["hopfield"]
    ran = 0
    for name in names:
        module = __import__(f"difflayers.{name}", fromlist=["_"])
        torch.manual_seed(0)
        found = doctest.testmod(module, extraglobs={"torch": torch, "nn": torch.nn})
        assert found.failed == 0, name
        ran += found.attempted
    assert ran > 15


@pytest.mark.parametrize(
    "name", ["Hopfield", "HopfieldPooling", "HopfieldLayer", "DiffusedHopfield"]
)
def test_modules_pickle(name):
    module = getattr(difflayers, name)(8)
    again = pickle.loads(pickle.dumps(module))
    assert again.state_dict().keys() == module.state_dict().keys()


def test_explain_names_the_ops_of_a_call_and_leaves_its_caches_right():
    states = torch.randn(1, 20, 8)
    layer = difflayers.DiffusedHopfield(8, use_sparse=True).eval()
    text = difflayers.explain(layer, states)
    assert text.startswith("difflayers::neighbour_sum:\n  torch: chosen")
    twin = difflayers.DiffusedHopfield(8, use_sparse=True).eval()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(states), twin(states))
    assert "plain PyTorch" in difflayers.explain(difflayers.Hopfield(8), states)
