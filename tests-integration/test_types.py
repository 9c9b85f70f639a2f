"""Pyright accepts the typed example program of each package, and finds a wrong name in its place.

The programs themselves are run, and read by mypy --strict, by the tests of their packages.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .rules import PACKAGES

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent


def pyright(project: Path) -> dict:
    """What pyright says of a project that has the configuration of this repository."""
    pytest.importorskip("basedpyright", reason="needs basedpyright")
    run = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*run, "--project", str(project)], capture_output=True, text=True, check=False, cwd=project
    )
    return json.loads(done.stdout)


def test_pyright_accepts_the_program_of_each_package():
    output = pyright(ROOT)
    assert output["summary"]["filesAnalyzed"] == len(PACKAGES)
    assert output["generalDiagnostics"] == []


def test_pyright_finds_a_wrong_name_of_each_package(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in (ROOT / "shared-kernels", *(ROOT / "packages" / name for name in PACKAGES)):
        place = tmp_path / folder.relative_to(ROOT)
        place.mkdir(parents=True)
        (place / "src").symlink_to(folder / "src")
    wanted = set()
    for package in PACKAGES:
        names = [n for n in importlib.import_module(package).__all__ if not n.startswith("__")]
        program = tmp_path / "packages" / package / "tests" / "typed.py"
        program.parent.mkdir()
        lines = [f"from {package} import {name}, {name}_misspelled" for name in names]
        program.write_text("\n".join(lines) + "\n", encoding="utf-8")
        wanted |= {(package, i) for i in range(len(names))}
    output = pyright(tmp_path)
    found = {
        (Path(error["file"]).parts[-3], error["range"]["start"]["line"])
        for error in output["generalDiagnostics"]
        if "_misspelled" in error["message"] and "unknown import symbol" in error["message"]
    }
    assert len(wanted) > 60 and found == wanted
