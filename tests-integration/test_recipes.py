"""What other indexes read of a distribution says what its pyproject.toml says."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch):
    """`.ci/NAME.py` as a module."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    yield importlib.import_module
    for name in ("recipe", "sbom", "release", "wheels", "projects"):
        sys.modules.pop(name, None)


def section(recipe: str, name: str) -> list[str]:
    """The entries of one list of a recipe."""
    found = re.search(rf"^  {name}:\n((?:    - .*\n)+)", recipe, re.M)
    return [line.strip().removeprefix("- ") for line in found[1].splitlines()] if found else []


@pytest.mark.tools
def test_the_committed_files_are_those_of_the_sources(tool):
    """`hatch run recipes` renews them."""
    recipe = tool("recipe")
    made = recipe.committed()
    assert len(made) == 12
    assert not [path for path, text in made.items() if path.read_text("utf-8") != text]


@pytest.mark.tools
def test_a_recipe_asks_for_what_the_wheel_asks_for(tool):
    recipe, projects = tool("recipe"), tool("projects")
    for project in projects.projects():
        text = (ROOT / project.path / "recipe" / "meta.yaml").read_text("utf-8")
        asked = [*section(text, "run"), *section(text, "run_constrained")]
        (python,) = (entry for entry in asked if entry.split()[0] == "python")
        asked.remove(python)
        names = {conda: name for name, conda in recipe.CONDA.items()}
        found = {names.get(e.split()[0], e.split()[0]): e.partition(" ")[2] for e in asked}
        table = projects.metadata(ROOT / project.path)["project"]
        wanted = {r.name: r.specifier for r in map(Requirement, table["dependencies"])}
        assert found.keys() == wanted.keys()
        for name, limits in found.items():
            assert Requirement(f"{name}{limits}").specifier == wanted[name]
        # what is compiled is built for every system, the rest once
        assert ("noarch: python" in text) == ("compiler('cxx')" not in text)
        assert ("noarch: python" in text) == (project.name != "shared-kernels")


@pytest.mark.tools
def test_the_recipe_of_a_release_names_its_file_and_its_digest(tool, tmp_path, monkeypatch):
    recipe = tool("recipe")
    sdist = tmp_path / "diffmax-0.1.0.tar.gz"
    sdist.write_bytes(b"sources")
    repository = "https://example.org/ada/weights"
    where = ["--repository", repository, "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["recipe.py", "diffmax", "--sdist", str(sdist), *where])
    assert recipe.main() == 0
    text = (tmp_path / "meta.yaml").read_text("utf-8")
    url = f"{repository}/releases/download/diffmax-v0.1.0/diffmax-0.1.0.tar.gz"
    assert f"  url: {url}\n  sha256: {hashlib.sha256(b'sources').hexdigest()}\n" in text
    assert f"  home: {repository}\n" in text and "    - ada\n" in text and "path:" not in text
    monkeypatch.setattr("sys.argv", ["recipe.py", "diffmax"])
    with pytest.raises(SystemExit):
        recipe.main()


@pytest.mark.extras
def test_the_bill_of_materials_of_a_wheel(tool, tmp_path, monkeypatch):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    sbom, wheels, projects = tool("sbom"), tool("wheels"), tool("projects")
    (project,) = projects.select(["diffmax"])
    monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")
    shared = [wheels.build(p, tmp_path) for p in projects.select(["shared-kernels"])]
    wheel = wheels.build(project, tmp_path)
    # an environment that sees nothing but the wheels: the tool reads every package that it sees
    wheels.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wheels.install(python, [*shared, wheel])
    bill = tmp_path / "bill.cdx.json"
    sbom.describe(project, wheel, python, bill)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.read_text("utf-8")) is None
    found = json.loads(bill.read_text("utf-8"))
    about = found["metadata"]["component"]
    assert (about["name"], about["version"]) == ("diffmax", "0.1.0")
    assert about["licenses"][0]["license"]["id"] == "MIT"
    assert about["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    versions = {component["name"]: component["version"] for component in found["components"]}
    assert versions == {"shared-kernels": "0.1.0"}
