"""The three lessons of examples/, in small; they are not part of the wheel."""

import runpy
from pathlib import Path

import pytest

from .cases import SPHERE, TOL

EXAMPLES = Path(__file__).parents[3] / "examples"
pytestmark = pytest.mark.skipif(
    not (EXAMPLES / "diffusion_map_sphere.py").exists(),
    reason="examples/ is not beside the package",
)


def run(name, tmp_path, *arguments):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"{name}.png"
    main = runpy.run_path(str(EXAMPLES / f"diffusion_map_{name}.py"))["main"]
    figures = main([*arguments, "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert figures["residual"] <= TOL
    return figures


def test_swiss_roll(tmp_path):
    figures = run("swiss_roll", tmp_path, "--points", "1500")
    assert figures["spearman"] >= 0.98 and figures["across"] > 0.75


def test_sphere(tmp_path):
    figures = run("sphere", tmp_path, "--points", "1500", "--degrees", "2", "--beta", "30")
    assert figures["rate_error"] < 0.02 and figures["value_error"] <= SPHERE


def test_digits(tmp_path):
    figures = run("digits", tmp_path, "--points", "700")
    assert figures["diffusion map"] > 0.8
