"""Releasing one distribution: everything short of publishing.

    python .ci/release.py --dry-run NAME            # what a release of NAME would check
    python .ci/release.py --tag NAME-v0.2.0 --dist dist --notes notes.md

The tag, `src/NAME/_version.py` and the topmost heading of CHANGELOG.md must say the same version;
wheel and sdist are built, their contents checked, and the wheel's own tests run with nothing but
shared-kernels beside it. With --tag the built files and the release notes are kept; publishing them
is the workflow's business.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import wheels
from packaging.requirements import Requirement
from projects import ROOT, Project, metadata, projects, select

HEADING = re.compile(r"^## \[?(?P<version>\d[\w.]*)\]?(?P<rest>.*)$", re.M)
DATED = re.compile(r"^\s*(?:\(\d{4}-\d\d-\d\d\)|[-–—]\s*\d{4}-\d\d-\d\d)$")


def version_of(folder: Path, module: str) -> str:
    """What `src/NAME/_version.py` says, read and not imported."""
    text = (folder / "src" / module / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"""^__version__ = ["'](.+)["']$""", text, re.M)
    if not found:
        raise SystemExit(f"{folder}: _version.py has no version")
    return found.group(1)


def split_tag(tag: str) -> tuple[str, str]:
    """`diffmax-v0.2.0` → ("diffmax", "0.2.0")."""
    found = re.fullmatch(r"(?P<name>[a-z-]+)-v(?P<version>\d[\w.]*)", tag)
    if not found:
        raise SystemExit(f"`{tag}` is not of the form NAME-vX.Y.Z")
    return found["name"], found["version"]


def notes(changelog: str, version: str) -> str | None:
    """The text below the heading of `version`; None where the changelog has no such heading."""
    headings = list(HEADING.finditer(changelog))
    for heading, after in zip(headings, [*headings[1:], None], strict=True):
        if heading["version"] == version:
            end = after.start() if after else len(changelog)
            return changelog[heading.end() : end].strip()
    return None


def agreement(name: str, version: str, tag: str, changelog: str, final: bool) -> list[str]:
    """Why tag, version file and changelog do not describe one release; empty if they do.

    Args:
        final: the release is meant, so its heading must carry a date.
    """
    wrong = []
    if tag != f"{name}-v{version}":
        wrong.append(f"tag {tag}, but _version.py makes it {name}-v{version}")
    headings = list(HEADING.finditer(changelog))
    if not headings or headings[0]["version"] != version:
        top = headings[0]["version"] if headings else "nothing"
        wrong.append(f"CHANGELOG.md begins with {top}, not with {version}")
    elif not notes(changelog, version):
        wrong.append(f"CHANGELOG.md says nothing about {version}")
    elif final and not DATED.match(headings[0]["rest"]):
        wrong.append(f"CHANGELOG.md's heading must be `## {version} (YYYY-MM-DD)`")
    return wrong


def floor(requirements: list[str], version: str, shared_tags: list[str] | None) -> list[str]:
    """Why this tree's shared-kernels `version`, or none that is tagged, meets `requirements`."""
    (wanted,) = (r for r in map(Requirement, requirements) if r.name == "shared-kernels")
    wrong = []
    if not wanted.specifier.contains(version, prereleases=True):
        wrong.append(f"requires {wanted}, this tree has shared-kernels {version}")
    if shared_tags is not None:
        released = [split_tag(tag)[1] for tag in shared_tags]
        if not any(wanted.specifier.contains(version) for version in released):
            wrong.append(
                f"requires {wanted}, of which none is tagged: release shared-kernels first"
            )
    return wrong


def wheel_contents(wheel: Path, module: str, version: str) -> list[str]:
    """What a wheel lacks or should not hold."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{module}-{version}.dist-info"
    wanted = {f"{module}/__init__.py", f"{module}/py.typed", f"{module}/_version.py"}
    wanted |= {f"{info}/METADATA", f"{info}/licenses/LICENSE"}
    wrong = [f"{wheel.name} lacks {name}" for name in sorted(wanted - names)]
    stray = sorted(name for name in names if name.split("/")[0] not in (module, info))
    return wrong + [f"{wheel.name} holds {name}" for name in stray]


def sdist_contents(sdist: Path, module: str, version: str) -> list[str]:
    """What an sdist lacks or should not hold."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", "pytest.ini"}
    wanted |= {f"src/{module}/__init__.py", f"src/{module}/py.typed"}
    wrong = [f"{sdist.name} lacks {name}" for name in sorted(wanted - names)]
    if not any(re.fullmatch(r"tests/test_\w+\.py", name) for name in names):
        wrong.append(f"{sdist.name} holds no tests")
    # docs/ and results/: what the tests hold the pages and the figures of a README against
    # native/: the sources of the library that the build hook compiles
    allowed = (
        *wanted,
        "src/",
        "tests/",
        "docs/",
        "results/",
        ".gitignore",
        "native/",
        "hatch_build",
    )
    stray = sorted(name for name in names if name and not name.startswith(allowed))
    return wrong + [f"{sdist.name} holds {name}" for name in stray]


def rebuilt_from_sdist(sdist: Path, wheel: Path, scratch: Path) -> list[str]:
    """A wheel built from the sdist, as packagers do, holds the same files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (tree,) = (path for path in scratch.iterdir() if path.is_dir())
    # the native library of this wheel is never run
    quick = {**os.environ, "SHARED_KERNELS_CXXFLAGS": "-O0"}
    wheels.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tree, env=quick)
    (again,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        differ = sorted(set(one.namelist()) ^ set(two.namelist()))
    return [f"{name} is in only one of the wheels from tree and sdist" for name in differ]


def tags(pattern: str) -> list[str]:
    command = ["git", "tag", "--list", pattern]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


def check(project: Project, tag: str, dist: Path, final: bool, tests: bool) -> list[str]:
    """Build `project` into `dist` and list everything that stands against releasing it."""
    folder = ROOT / project.path
    version = version_of(folder, project.module)
    changelog = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    wrong = agreement(project.name, version, tag, changelog, final)
    shared = select(["shared-kernels"])[0]
    if project.name != shared.name:
        requirements = metadata(folder)["project"]["dependencies"]
        known = tags(f"{shared.name}-v*") if final else None
        wrong += floor(requirements, version_of(ROOT / shared.path, shared.module), known)
    wheel, sdist = wheels.build(project, dist), wheels.build(project, dist, "sdist")
    if project.name == shared.name:
        wheels.build(wheels.DEV, dist)  # released with it
    wrong += wheel_contents(wheel, project.module, version)
    wrong += sdist_contents(sdist, project.module, version)
    with tempfile.TemporaryDirectory() as scratch:
        wrong += rebuilt_from_sdist(sdist, wheel, Path(scratch))
    if tests and not wrong:
        with tempfile.TemporaryDirectory() as scratch:
            built = {project.name: wheel}
            for other in (*projects(), wheels.DEV):
                if other.name in (*project.siblings, wheels.DEV.name):
                    built[other.name] = wheels.build(other, Path(scratch))
            told = wheels.check(project, built, Path(scratch, "alone"), True, [])
            print(f"{project.name}: {told}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dry-run", nargs="*", metavar="NAME", help="all of them if none is named")
    what.add_argument("--tag", help="the tag that is being released")
    parser.add_argument("--dist", type=Path, help="where to keep wheel and sdist")
    parser.add_argument("--notes", type=Path, help="where to write the release notes")
    parser.add_argument("--no-tests", action="store_true", help="build and compare, run no tests")
    options = parser.parse_args()
    final = options.tag is not None
    chosen = select([split_tag(options.tag)[0]] if final else options.dry_run)
    worst = 0
    for project in chosen:
        folder = ROOT / project.path
        version = version_of(folder, project.module)
        tag = options.tag or f"{project.name}-v{version}"
        with tempfile.TemporaryDirectory() as scratch:
            wrong = check(project, tag, Path(scratch), final, not options.no_tests)
            if not wrong and options.dist:
                shutil.copytree(scratch, options.dist, dirs_exist_ok=True)
        if not wrong and options.notes:
            text = notes((folder / "CHANGELOG.md").read_text(encoding="utf-8"), version)
            options.notes.write_text(f"{text}\n", encoding="utf-8")
        print(f"{tag}: {'; '.join(wrong) or 'ready'}", flush=True)
        worst |= bool(wrong)
    return worst


if __name__ == "__main__":
    sys.exit(main())
