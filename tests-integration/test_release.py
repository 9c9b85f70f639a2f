"""`.ci/release.py`: what stands against a release is found before anything is published."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent

CHANGELOG = """# Changelog of toy

Prose.

## 0.2.0 (2026-03-01)

- `f` takes a `dim`.

### Fixed
- A row of −inf gives zeros.

## [0.1.0] - 2026-01-01

- The first one.
"""


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import release

    yield release
    for name in ("release", "wheels", "projects"):
        sys.modules.pop(name, None)


def test_notes_are_the_section_of_the_version(release):
    assert release.notes(CHANGELOG, "0.1.0") == "- The first one."
    text = release.notes(CHANGELOG, "0.2.0")
    assert text.startswith("- `f` takes") and text.endswith("gives zeros.")
    assert release.notes(CHANGELOG, "0.3.0") is None
    assert release.notes("## 0.1.0\n\n", "0.1.0") == ""


@pytest.mark.parametrize(
    ("version", "tag", "changelog", "word"),
    [
        ("0.2.0", "toy-v0.2.1", CHANGELOG, "tag toy-v0.2.1"),
        ("0.2.0", "other-v0.2.0", CHANGELOG, "tag other"),
        ("0.1.0", "toy-v0.1.0", CHANGELOG, "begins with 0.2.0"),
        ("0.2.0", "toy-v0.2.0", "# Nothing yet\n", "begins with nothing"),
        ("0.2.0", "toy-v0.2.0", "## 0.2.0 (2026-03-01)\n\n## 0.1.0\n- x", "says nothing"),
        ("0.2.0", "toy-v0.2.0", "## 0.2.0 (unreleased)\n- x", "(YYYY-MM-DD)"),
        ("0.2.0", "toy-v0.2.0", "## 0.2.0\n- x", "(YYYY-MM-DD)"),
    ],
)
def test_disagreement_is_found(release, version, tag, changelog, word):
    (message,) = release.agreement("toy", version, tag, changelog, final=True)
    assert word in message


def test_agreement(release):
    assert not release.agreement("toy", "0.2.0", "toy-v0.2.0", CHANGELOG, final=True)
    dashed = "## [0.2.0] - 2026-03-01\n- x"
    assert not release.agreement("toy", "0.2.0", "toy-v0.2.0", dashed, final=True)
    unreleased = "## 0.2.0 (unreleased)\n- x"
    assert not release.agreement("toy", "0.2.0", "toy-v0.2.0", unreleased, final=False)


def test_tags(release):
    assert release.split_tag("shared-kernels-v0.10.2") == ("shared-kernels", "0.10.2")
    for tag in ("v0.1.0", "diffmax-0.1.0", "diffmax-v", "diffmax-v0.1.0/../x", "Diffmax-v0.1.0"):
        with pytest.raises(SystemExit, match="NAME-vX"):
            release.split_tag(tag)


def test_shared_kernels_comes_first(release):
    requirements = ["torch>=2.7", "shared-kernels>=0.2,<0.3"]
    assert not release.floor(requirements, "0.2.1", None)
    assert not release.floor(
        requirements, "0.2.1", ["shared-kernels-v0.1.0", "shared-kernels-v0.2.0"]
    )
    (behind,) = release.floor(requirements, "0.2.1", ["shared-kernels-v0.1.0"])
    assert "release shared-kernels first" in behind
    (tree,) = release.floor(requirements, "0.1.9", None)
    assert "this tree has shared-kernels 0.1.9" in tree


def test_version_is_read_not_imported(release, tmp_path):
    folder = tmp_path / "src" / "toy"
    folder.mkdir(parents=True)
    (folder / "_version.py").write_text('raise SystemExit\n__version__ = "0.2.0"\n')
    assert release.version_of(tmp_path, "toy") == "0.2.0"
    (folder / "_version.py").write_text("version = 2\n")
    with pytest.raises(SystemExit, match="has no version"):
        release.version_of(tmp_path, "toy")


WHEEL = [
    *(f"toy/{name}" for name in ("__init__.py", "py.typed", "_version.py")),
    *(f"toy-0.2.0.dist-info/{name}" for name in ("METADATA", "licenses/LICENSE")),
]
SDIST = [
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", "pytest.ini"),
    *(".gitignore", "src/toy/__init__.py", "src/toy/py.typed", "tests/test_api.py"),
]


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def sdist(path, names):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"toy-0.2.0/{name}"), io.BytesIO())
    return path


def test_contents_of_a_good_wheel_and_sdist(release, tmp_path):
    assert not release.wheel_contents(wheel(tmp_path / "toy.whl", WHEEL), "toy", "0.2.0")
    assert not release.sdist_contents(sdist(tmp_path / "toy.tar.gz", SDIST), "toy", "0.2.0")


@pytest.mark.parametrize("name", WHEEL)
def test_a_wheel_that_lacks_a_file(release, tmp_path, name):
    made = wheel(tmp_path / "toy.whl", [other for other in WHEEL if other != name])
    assert release.wheel_contents(made, "toy", "0.2.0") == [f"toy.whl lacks {name}"]


def test_a_wheel_that_holds_its_tests(release, tmp_path):
    made = wheel(tmp_path / "toy.whl", [*WHEEL, "tests/test_api.py"])
    assert release.wheel_contents(made, "toy", "0.2.0") == ["toy.whl holds tests/test_api.py"]


@pytest.mark.parametrize("name", [name for name in SDIST if name != ".gitignore"])
def test_an_sdist_that_lacks_a_file(release, tmp_path, name):
    made = sdist(tmp_path / "toy.tar.gz", [other for other in SDIST if other != name])
    assert len(release.sdist_contents(made, "toy", "0.2.0")) == 1


def test_an_sdist_that_holds_more(release, tmp_path):
    made = sdist(tmp_path / "toy.tar.gz", [*SDIST, "notes/secret.txt"])
    assert release.sdist_contents(made, "toy", "0.2.0") == ["toy.tar.gz holds notes/secret.txt"]


def test_the_tag_of_nobody_lists_the_names():
    command = [sys.executable, str(ROOT / ".ci" / "release.py"), "--tag", "nobody-v0.1.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no such distribution: nobody; there are shared-kernels")
