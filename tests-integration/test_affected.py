"""`.ci/affected.py`: which distributions a change touches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["adasplash", "difflayers", "diffmax", "dsalt", "flashdiffusion"]


@pytest.fixture
def ci(monkeypatch):
    """The tools of .ci, imported as they import each other."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import affected
    import projects

    yield type("Tools", (), {"affected": affected, "projects": projects})
    for name in ("affected", "projects"):
        sys.modules.pop(name, None)


@pytest.fixture
def chain(ci):
    """base <- middle <- top, and `lone` beside them."""
    make = ci.projects.Project
    return [
        make("base", "base", frozenset()),
        make("middle", "packages/middle", frozenset({"base"})),
        make("top", "packages/top", frozenset({"middle"})),
        make("lone", "packages/lone", frozenset()),
    ]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([], []),
        (["packages/top/src/top/api.py"], ["top"]),
        (["packages/middle/README.md"], ["middle", "top"]),
        (["base/src/base/qexp.py"], ["base", "middle", "top"]),
        (["packages/lone/tests/test_api.py", "packages/top/pyproject.toml"], ["lone", "top"]),
        (["pytest.ini"], ["base", "lone", "middle", "top"]),
        (["packages/top/x.py", ".github/workflows/ci.yml"], ["base", "lone", "middle", "top"]),
        ([".ci/affected.py"], ["base", "lone", "middle", "top"]),
        # a folder whose name only begins like a project's
        (["packages/topmost/x.py"], ["base", "lone", "middle", "top"]),
        # read by the integration job alone
        (["docs/index.md", "examples/demo.py", "benchmarks/run.py"], []),
        (["tests-integration/test_rules.py", "packages/top/x.py"], ["top"]),
    ],
)
def test_affected(ci, chain, files, names):
    assert ci.affected.affected(files, chain) == names


def test_affected_by_an_iterator(ci, chain):
    assert ci.affected.affected(iter(["base/x"]), iter(chain)) == ["base", "middle", "top"]


def test_the_real_projects(ci):
    every = ci.projects.projects()
    assert [project.name for project in every] == ["shared-kernels", *PACKAGES]
    assert ci.affected.affected(["packages/dsalt/src/dsalt/api.py"], every) == ["dsalt"]
    shared = ci.affected.affected(["shared-kernels/src/shared_kernels/ops.py"], every)
    assert shared == sorted([*PACKAGES, "shared-kernels"])


def test_projects_are_read_from_pyprojects(ci, tmp_path):
    for path, extra in {
        "shared-kernels": "",
        "packages/a": 'dependencies = ["torch>=2.7", "shared-kernels>=0.1,<0.2"]',
        "packages/b": "optional-dependencies = { dev = [\"A[x]>=1; python_version > '3'\"] }",
        "packages/notes": None,
    }.items():
        (tmp_path / path).mkdir(parents=True)
        if extra is not None:
            name = Path(path).name
            text = f'[project]\nname = "{name}"\n{extra}\n'
            (tmp_path / path / "pyproject.toml").write_text(text, encoding="utf-8")
    found = {project.name: project for project in ci.projects.projects(tmp_path)}
    assert set(found) == {"shared-kernels", "a", "b"}
    assert found["a"].siblings == {"shared-kernels"}
    assert found["b"].siblings == {"a"}
    assert found["shared-kernels"].module == "shared_kernels"
    assert found["a"].path == "packages/a"


def test_an_unknown_name_lists_the_known_ones(ci):
    with pytest.raises(SystemExit, match="no such distribution: nothing; there are shared-kernels"):
        ci.projects.select(["nothing", "dsalt"])


# a new branch's first push has the zero commit before it
@pytest.mark.parametrize("arguments", [["--all"], ["--base", "0" * 40], ["--base", ""]])
def test_the_command_prints_a_matrix(arguments):
    command = [sys.executable, str(ROOT / ".ci" / "affected.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert rows[:-1] == [{"name": name, "path": f"packages/{name}"} for name in PACKAGES]
    assert rows[-1] == {"name": "shared-kernels", "path": "shared-kernels"}


def test_changed_files_name_both_ends_of_a_move(ci, tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init", "-q", "-b", "main")
    (tmp_path / "old name.py").write_text("x = 1\n" * 20)
    git("add", ".")
    git("commit", "-qm", "one")
    git("checkout", "-qb", "topic")
    git("mv", "old name.py", "new.py")
    git("commit", "-qm", "two")
    monkeypatch.setattr(ci.affected, "ROOT", tmp_path)
    assert sorted(ci.affected.changed_files("main")) == ["new.py", "old name.py"]
    assert ci.affected.changed_files("gone") is None
