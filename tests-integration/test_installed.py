"""Each package says so when the distribution installed under its name is another project's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from shared_kernels.installed import warn_of_another_project

from .rules import PACKAGES


def installed(folder: Path, name: str, requires: str) -> None:
    """A distribution's metadata, as an installer leaves it."""
    info = folder / f"{name}-9.9.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 9.9\nRequires-Dist: {requires}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("requires", ["shared-kernels<0.2,>=0.1", "shared-kernels >= 0.1"])
def test_this_repository_s_own_is_silent(tmp_path, monkeypatch, requires):
    installed(tmp_path, "some_name", requires)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_project("some_name")


def test_nothing_installed_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_project("nothing_of_this_name")


def test_metadata_of_an_old_layout_is_another_project_s(tmp_path, monkeypatch):
    """An egg-info folder has no METADATA; nothing of this repository was ever installed so."""
    info = tmp_path / "some_name-9.9.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Name: some_name\nVersion: 9.9\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="some_name 9.9 that is installed is another project"):
        warn_of_another_project("some_name")


PROBE = """
import importlib, json, sys, warnings
found = {}
for name in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        importlib.import_module(name)
    found[name] = [str(each.message) for each in heard if each.category is UserWarning]
print(json.dumps(found))
"""


@pytest.mark.system
def test_every_package_asks(tmp_path):
    for name in PACKAGES:
        installed(tmp_path, name, "torch")
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *inherited])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(list(PACKAGES))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)
    for name in PACKAGES:
        (output,) = (text for text in heard[name] if "another project" in text)
        assert f"{name} 9.9" in output and f"pip uninstall {name}" in output
