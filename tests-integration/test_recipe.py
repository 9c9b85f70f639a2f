"""docs/recipe.md, followed: a toy op added to a copy of the repository passes every gate."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r'^```\w+ title="([^"]+)"\n(?:# after the line `(.*?)`\n)?(.*?)^```$', re.M | re.S
)
FOLDERS = (
    "packages",
    "shared-kernels",
    "tests-integration",
    "docs",
    "benchmarks",
    "examples",
    ".ci",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the page's blocks added."""
    root = tmp_path_factory.mktemp("house")
    unwanted = shutil.ignore_patterns("__pycache__", "*.png", "dist", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, root)
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert len(blocks) == page.count("title=")
    for place, after, code in blocks:
        path = root / place
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if after:
            assert text.count(after + "\n") == 1, f"{place} has not one line `{after}`"
            indent = re.search(rf"^ *(?={re.escape(after)}$)", text, re.M).group()
            text = text.replace(after + "\n", after + "\n" + indent + code.lstrip())
        else:
            text = text + "\n\n" + code if text else code
        path.write_text(text, encoding="utf-8")
    return root


def gate(root, *command):
    """Run a command of CONTRIBUTING's table in the copy; what it said if it failed."""
    sources = [root / "shared-kernels" / "src", *(root / "packages").glob("*/src")]
    clean = {"PYTHONPATH": os.pathsep.join(map(str, sources)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env={**os.environ, **clean},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_style(copy):
    gate(copy, "ruff", "format", "--check", "packages/diffmax")
    gate(copy, "ruff", "check", "packages/diffmax")


def test_house_rules(copy):
    gate(
        copy, "pytest", "-q", "-p", "no:cacheprovider", "--tools", "tests-integration/test_rules.py"
    )


def test_cpu(copy):
    names = ("test_public_api", "test_reference", "test_checks", "test_backends", "test_ops")
    files = [f"packages/diffmax/tests/{name}.py" for name in names]
    wanted = "softclip or Softclip or limit or table or all"
    output = gate(copy, "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", wanted)
    assert "passed" in output


def test_interpreter(copy):
    pytest.importorskip("triton", reason="no Triton on this platform")
    path = "packages/diffmax/tests/test_triton.py"
    output = gate(
        copy, "pytest", "--interpret", "-q", "-p", "no:cacheprovider", path, "-k", "softclip"
    )
    assert "1 passed" in output


@pytest.mark.thorough
def test_offline(copy, tmp_path):
    pytest.importorskip("triton", reason="no Triton on this platform")
    launches = "packages/diffmax/tests/launches.py"
    report = tmp_path / "offline.json"
    gate(
        copy,
        "shared_kernels.offline",
        launches,
        *("--targets", "sm_90", "--only", "softclip", "--report", str(report)),
    )
    assert "softclip" in report.read_text(encoding="utf-8")
