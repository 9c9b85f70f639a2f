"""Every distribution obeys the rules of `rules.py`, and imports alone, in a bare process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import distributions, rules
from .rules import PACKAGES, Source

pytestmark = pytest.mark.tools

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"shared-kernels": ROOT / "shared-kernels"}
FOLDERS |= {name: ROOT / "packages" / name for name in PACKAGES}
OUTSIDE = (".ci", "benchmarks", "docs", "examples", "tests-integration")

each_distribution = pytest.mark.parametrize("name", FOLDERS)


def module_of(name: str) -> str:
    return name.replace("-", "_")


@functools.cache
def library(name: str) -> list[Source]:
    return list(rules.sources(FOLDERS[name] / "src"))


# --------------------------------------------------------------------------------- what is written


def test_every_package_folder_is_known():
    folders = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("rule", rules.SOURCE_RULES, ids=lambda rule: rule.__name__)
@each_distribution
def test_sources_obey(name, rule):
    broken = [message for source in library(name) for message in rule(source)]
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize("rule", rules.ANY_FILE_RULES, ids=lambda rule: rule.__name__)
def test_tests_examples_and_tools_obey(rule):
    folders = [FOLDERS[name] / "tests" for name in FOLDERS] + [ROOT / name for name in OUTSIDE]
    broken = [
        f"{folder.relative_to(ROOT)}/{message}"
        for folder in folders
        for source in rules.sources(folder)
        for message in rule(source)
    ]
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@each_distribution
def test_all_is_the_table_of_the_readme(name):
    from shared_kernels.testing import readme

    folder = FOLDERS[name]
    init = Source(
        f"{module_of(name)}/__init__.py",
        (folder / "src" / module_of(name) / "__init__.py").read_text(encoding="utf-8"),
    )
    named, shown = set(rules.public_names(init)), readme.api_names(folder / "README.md")
    version = {"__version__"}  # every distribution has it; its table need not say so
    assert named - version == shown - version


@each_distribution
def test_distribution_says_who_it_is(name):
    folder = FOLDERS[name]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    pyproject = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    assert not distributions.distribution(pyproject, licence, files)


@each_distribution
def test_tests_are_plain_folders(name):
    """pytest's importlib mode needs no __init__.py, and an sdist's tests then run anywhere."""
    assert not list((FOLDERS[name] / "tests").rglob("__init__.py"))


def test_nothing_names_a_folder_of_one_machine():
    broken = []
    for path in distributions.texts(ROOT):
        if path.name != "test_rules.py":  # which shows what the rule forbids
            relative = path.relative_to(ROOT).as_posix()
            broken += distributions.machine_paths(relative, path.read_text(encoding="utf-8"))
    assert not broken, "\n".join(broken)


# ------------------------------------------------------------------------------- what imports do

BLOCKED = ("triton", "swanlab", "matplotlib")

# Imports `names`, one after the other, where nothing under `blocked` can be imported, and prints
# which top-level packages are loaded beyond those that torch itself brings.
PROBE = """
import importlib, json, sys
blocked, names = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
import torch
before = set(sys.modules)
for name in names:
    importlib.import_module(name)
new = {name for name in sys.modules if name not in before}
heavy = {name for name in new if name in ("torch._dynamo", "torch._inductor")}
print(json.dumps(sorted({name.split(".")[0] for name in new} | heavy)))
"""


def loaded_by(names, blocked=(), path=()):
    """What importing `names` in a fresh process loads; fails with that process's stderr."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    inherited = filter(None, [environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *inherited])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([list(blocked), list(names)])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


# A module whose classes are those of an optional package, which it cannot do without.
MADE_OF = {"dsalt.huggingface": "transformers"}


def importable_everywhere(name: str) -> list[str]:
    """Every module but the kernels (and pytest's own, which an extra brings)."""
    modules = []
    for source in library(name):
        parts = source.module.split(".")
        kernels = "_triton" in parts or source.module.startswith("shared_kernels.triton")
        tables = "_triton" in parts and parts[-1] == "configs"
        if parts[-1] != "__main__" and (not kernels or tables) and source.module not in MADE_OF:
            modules.append(source.module)
    return modules


@each_distribution
def test_every_module_imports_without_the_optional_packages_and_the_siblings(name):
    loaded_by(importable_everywhere(name), {*BLOCKED, *PACKAGES} - {name})


@pytest.mark.parametrize("module", MADE_OF)
def test_a_module_made_of_an_optional_package_says_how_to_get_it(module):
    package = module.split(".")[0]
    with pytest.raises(
        AssertionError, match=rf"ImportError: {module} needs .*pip install {package}"
    ):
        loaded_by([module], {MADE_OF[module]})


# What takes long to import or is not everybody's, and who may load it with `import NAME`.
HEAVY = {
    "IPython",
    "hypothesis",
    "matplotlib",
    "mpmath",
    "pandas",
    "pytest",
    "scipy",
    "sklearn",
    "swanlab",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "triton",
}


@each_distribution
def test_import_costs_nothing_beyond_torch(name):
    module = module_of(name)
    heavy = loaded_by([module]) & HEAVY
    assert not heavy, f"import {module} loads {sorted(heavy)}"


# ------------------------------------------------------------------ these checks can fail as well


def test_the_probe_sees_a_blocked_import(tmp_path):
    (tmp_path / "careless.py").write_text("import matplotlib\n")
    with pytest.raises(AssertionError, match="No module named 'matplotlib' \\(blocked\\)"):
        loaded_by(["careless"], BLOCKED, [tmp_path])


def test_the_probe_sees_what_is_loaded(tmp_path):
    (tmp_path / "heavy.py").write_text("import mpmath\n")
    assert "mpmath" in loaded_by(["heavy"], (), [tmp_path])
