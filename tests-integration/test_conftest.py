"""The root conftest: which tests an option chooses, and that no missing package passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.extras
def test_optional():
    pytest.importorskip("{package}", reason="needs the optional package")

@pytest.mark.thorough
def test_grid():
    pass

@pytest.mark.thorough
@pytest.mark.tools
def test_grid_of_tools():
    pass

@pytest.mark.tools
def test_tools():
    pass

@pytest.mark.slow
def test_slow():
    pass

def test_plain():
    pass
"""


@pytest.mark.parametrize(
    ("package", "options", "closing"),
    [
        ("json", [], "1 passed, 5 deselected"),
        ("json", ["--thorough"], "1 passed, 5 deselected"),
        ("json", ["--tools"], "2 passed, 4 deselected"),
        ("json", ["--extras"], "1 passed, 5 deselected"),
        ("no_such_package", ["--extras"], "1 failed, 5 deselected"),
    ],
)
def test_options_choose_and_extras_run_for_real(tmp_path, package, options, closing):
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "test_toy.py").write_text(TESTS.format(package=package))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert closing in output
