"""What other indexes read of a distribution, made from its pyproject.toml and `_version.py`.

    hatch run recipes                                    # renews the committed files
    python .ci/recipe.py NAME --sdist dist/NAME-0.1.0.tar.gz \
        --repository https://example.org/owner/name --to recipe-NAME

`recipe/meta.yaml` is what conda-forge builds from, `CITATION.cff` what Zenodo and reference
managers read. The committed recipe builds from the checkout that it lies in. Only who publishes
knows where the sources lie and who answers for them: the second command, which the release runs,
writes the recipe of a source distribution, with its address, its digest and its maintainer.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from projects import ROOT, Project, metadata, projects, select
from release import version_of

# What conda-forge calls a distribution of the Python index, where the names differ.
CONDA = {"torch": "pytorch"}
UNPUBLISHED = "https://example.org/owner/sparse-weights"
FAMILIES = {"MIT": "MIT", "Apache-2.0": "Apache", "BSD-3-Clause": "BSD"}

RECIPE = """\
{{% set name = "{name}" %}}
{{% set version = "{version}" %}}

package:
  name: {{{{ name }}}}
  version: {{{{ version }}}}

source:
{source}

build:
{build}
  number: 0

requirements:
{compilers}  host:
    - python{host_python}
    - pip
    - hatchling{hatchling}
  run:
    - python{run_python}
{run}{constrained}
test:
  imports:
    - {module}
  requires:
    - python{test_python}
    - pip
  commands:
    - pip check

about:
  home: {home}
  summary: "{summary}"
  license: {license}
  license_family: {family}
  license_file: LICENSE

extra:
  recipe-maintainers:
    - {maintainer}
"""
# One build for every system and Python.
PURE = """\
  noarch: python
  script: {{ PYTHON }} -m pip install . -vv --no-deps --no-build-isolation"""
# With the native library, which knows no Python: it must not be left out in silence.
NATIVE = """\
  script_env:
    - SHARED_KERNELS_NATIVE=1
  script: {{ PYTHON }} -m pip install . -vv --no-deps --no-build-isolation"""
COMPILERS = """\
  build:
    - {{ compiler('cxx') }}
    - {{ stdlib('c') }}
"""
CITATION = """\
cff-version: 1.2.0
title: "{name}"
abstract: "{summary}"
message: "If you use {name}, please cite the version you used, and the papers its README names."
type: software
authors:
  - name: "{author}"
version: {version}
license: {license}
keywords: [{keywords}]
"""


def required(requirement: str) -> tuple[str, str, bool]:
    """A requirement's name at conda-forge, its range, and whether it is for some systems alone."""
    bare, _, marker = requirement.partition(";")
    name, limits = re.fullmatch(r"([\w.-]+)\s*(.*)", bare.strip()).groups()
    return CONDA.get(name, name), limits.replace(" ", ""), bool(marker)


def recipe(project: Project, source: str, home: str, maintainer: str) -> str:
    """The text of `recipe/meta.yaml`; shared-kernels has compiled parts, the others are pure."""
    table = metadata(ROOT / project.path)["project"]
    (hatchling,) = metadata(ROOT / project.path)["build-system"]["requires"]
    dependencies = sorted(map(required, table["dependencies"]))
    run = [f"    - {name} {limits}".rstrip() for name, limits, some in dependencies if not some]
    some = [f"    - {name} {limits}".rstrip() for name, limits, some in dependencies if some]
    is_pure = project.name != "shared-kernels"
    pin = " {{ python_min }}" if is_pure else ""
    return RECIPE.format(
        name=project.name,
        version=version_of(ROOT / project.path, project.module),
        source=source,
        build=PURE if is_pure else NATIVE,
        compilers="" if is_pure else COMPILERS,
        host_python=pin,
        test_python=pin,
        run_python=" >={{ python_min }}" if is_pure else "",
        hatchling=" " + hatchling.removeprefix("hatchling"),
        run="\n".join(run) + "\n",
        # what only some systems have is no requirement there: conda-forge's pytorch brings it
        constrained="\n".join(["  run_constrained:", *some]) + "\n" if some else "",
        module=project.module,
        home=home,
        summary=table["description"].rstrip("."),
        license=table["license"],
        family=FAMILIES[table["license"]],
        maintainer=maintainer,
    )


def from_checkout(project: Project) -> str:
    """The committed recipe: it builds the folder that it lies in, and nobody answers for it yet."""
    return recipe(project, "  path: ..", UNPUBLISHED, maintainer="owner")


def from_sdist(project: Project, sdist: Path, repository: str) -> str:
    """The recipe of a released source distribution, an asset of the release of its tag."""
    tag = f"{project.name}-v{version_of(ROOT / project.path, project.module)}"
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    url = f"{repository}/releases/download/{tag}/{sdist.name}"
    source = f"  url: {url}\n  sha256: {digest}"
    return recipe(project, source, repository, maintainer=repository.split("/")[-2])


def citation(project: Project) -> str:
    """The text of `CITATION.cff`."""
    table = metadata(ROOT / project.path)["project"]
    return CITATION.format(
        name=project.name,
        summary=table["description"],
        author=table["authors"][0]["name"],
        version=version_of(ROOT / project.path, project.module),
        license=table["license"],
        keywords=", ".join(table["keywords"]),
    )


def committed() -> dict[Path, str]:
    """Every file that is made from a pyproject.toml, and its text."""
    made = {}
    for project in projects():
        made[ROOT / project.path / "recipe" / "meta.yaml"] = from_checkout(project)
        made[ROOT / project.path / "CITATION.cff"] = citation(project)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="the distribution whose release gets a recipe")
    parser.add_argument("--sdist", type=Path, help="its source distribution")
    parser.add_argument("--repository", help="the address of the repository that publishes it")
    parser.add_argument("--to", type=Path, help="the folder for meta.yaml")
    options = parser.parse_args()
    wanted = (options.name, options.sdist, options.repository, options.to)
    if any(wanted) and not all(wanted):
        parser.error("a release needs all of NAME, --sdist, --repository and --to")
    if options.name:
        (project,) = select([options.name])
        files = {options.to / "meta.yaml": from_sdist(project, options.sdist, options.repository)}
    else:
        files = committed()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
