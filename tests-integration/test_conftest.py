"""The root conftest: what `--extras` runs, and that it lets no missing package pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.extras
def test_optional():
    pytest.importorskip("{package}", reason="needs the optional package")

def test_plain():
    pass
"""


@pytest.mark.parametrize(
    ("package", "options", "closing"),
    [
        ("json", [], "1 passed, 1 deselected"),
        ("json", ["--extras"], "1 passed, 1 deselected"),
        ("no_such_package", ["--extras"], "1 failed, 1 deselected"),
    ],
)
def test_extras_run_alone_and_for_real(tmp_path, package, options, closing):
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "test_toy.py").write_text(TESTS.format(package=package))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert closing in said
