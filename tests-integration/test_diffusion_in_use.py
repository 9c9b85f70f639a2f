"""The examples of flashdiffusion in use run, in small, and find what they should."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tmp_path, capsys):
    def run(name, *arguments):
        found = importlib.import_module(name).main([*arguments, "--out", str(tmp_path)])
        picture = tmp_path / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in capsys.readouterr().out
        return found

    sys.path.insert(0, str(EXAMPLES))
    yield run
    sys.path.remove(str(EXAMPLES))


def test_committor_of_a_double_well(example):
    found = example("committor_double_well", "--frames", "1500")
    assert found["mean error"] < 0.03 and found["slowest timescale in frames"] > 20


def test_bridge_between_two_clouds(example):
    found = example("bridge_frames", "--points", "60", "--steps", "4")
    assert found["error"] <= 1e-6
    assert found["start"] < -2.5 and found["end"] > 2.5 and abs(found["middle"]) < 1.0


def test_slow_manifold_of_a_hinge(example):
    assert example("protein_slow_manifold", "--hinge")["order"] > 0.999


@pytest.mark.extras
def test_slow_manifold_of_a_protein(example):
    pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    pytest.importorskip("MDAnalysisTests", reason="needs the optional MDAnalysisTests")
    found = example("protein_slow_manifold")
    assert found["order"] >= 0.999 and found["frames"] == 98
