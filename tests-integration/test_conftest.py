"""The root conftest: which tests an option chooses, and that no missing package passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared_kernels.offline.run import why_not
from shared_kernels.testing import others_thorough

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.extras
def test_optional():
    pytest.importorskip("{package}", reason="needs the optional package")

@pytest.mark.extras
@pytest.mark.slow
def test_every_optional():
    pass

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

@pytest.mark.thorough
@pytest.mark.system
def test_grid_of_processes():
    pass

@pytest.mark.system
def test_processes():
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
        ("json", [], "1 passed, 8 deselected"),
        ("json", ["--thorough"], "1 passed, 8 deselected"),
        ("json", ["--tools"], "1 passed, 8 deselected"),
        ("json", ["--tools", "--thorough"], "1 passed, 8 deselected"),
        ("json", ["--system"], "1 passed, 8 deselected"),
        ("json", ["--system", "--thorough"], "1 passed, 8 deselected"),
        ("json", ["--system", "--tools"], "2 passed, 7 deselected"),
        ("json", ["--extras"], "1 passed, 8 deselected"),
        ("no_such_package", ["--extras"], "1 failed, 8 deselected"),
        ("no_such_package", ["--extras", "--thorough"], "1 passed, 8 deselected"),
    ],
)
def test_options_choose_and_extras_run_for_real(tmp_path, package, options, closing):
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "test_toy.py").write_text(TESTS.format(package=package))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert closing in said


KERNEL = """
from typing import NamedTuple

import torch
import triton
import triton.language as tl

class Place(NamedTuple):
    ptr: torch.Tensor
    offset: int

@triton.jit
def _double_kernel(x, by):
    tl.store(x.ptr + x.offset, by * tl.load(x.ptr + x.offset))

def test_double():
    x = torch.ones(5)
    _double_kernel[(1,)](Place(x, 1), 2.0)
    _double_kernel[(1,)](Place(x, 3), 2.0)
    assert x.tolist() == [1, 2, 1, 2, 1]
"""


@pytest.mark.parametrize("missing", others_thorough([["_other_kernel"], []]))
def test_a_kernel_of_the_report_that_did_not_run_fails(tmp_path, missing):
    if reason := why_not():
        pytest.skip(reason)
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "test_triton_toy.py").write_text(KERNEL)
    report = {"kernels": [{"kernel": name} for name in ["_double_kernel", *missing]]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--compiled"]
    command += ["sm_80", "--every-kernel", "report.json", "."]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout
    assert done.returncode == bool(missing)
    assert ("ran no _other_kernel" in done.stdout) == bool(missing)
