"""The examples of flashdiffusion in use run, in small, and find what they should."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOL = 1e-6  # the default tol of eigenpairs and marginals
COMMITTOR = 0.01  # mean error: landmarks against all frames

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "packages" / "flashdiffusion" / "results"


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
    assert found["error"] <= TOL
    assert found["start"] < -2.5 and found["end"] > 2.5 and abs(found["middle"]) < 1.0


def test_slow_manifold_of_a_hinge(example):
    assert example("protein_slow_manifold", "--hinge")["order"] > 0.999


@pytest.mark.extras
def test_slow_manifold_of_a_protein(example):
    pytest.importorskip("MDAnalysis", reason="needs the optional MDAnalysis")
    pytest.importorskip("MDAnalysisTests", reason="needs the optional MDAnalysisTests")
    found = example("protein_slow_manifold")
    assert found["order"] >= 0.999 and found["frames"] == 98


def measurement(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.mark.slow
def test_slow_coordinate_of_the_mueller_brown_surface():
    # among 3000 landmarks at this beta a lonely one makes the first coordinate
    found = measurement("muller_brown", "--frames", "60000", "--landmarks", "4000")
    assert found["slow coordinate, correlation"] > 0.99
    assert found["committor, mean error"] < COMMITTOR
    # 270 timescales long: a tenth of an error is chance
    assert 0.7 < found["timescale"] / found["timescale on the grid"] < 1.4


@pytest.mark.slow
def test_the_measurements_run():
    shared = measurement("scaling", "--points", "2000", "--repeats", "1")
    assert shared["largest difference of eigenvalues"] < TOL
    assert len(measurement("scaling", "--points", "1500", "--part", "plan")["sets"]) == 3
    assert measurement("bridge", "--points", "1000")["marginal error"] <= TOL
