"""What the repository's pages promise: commands, links and code that exist and run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from shared_kernels.testing import readme

from . import distributions, requirements

pytestmark = pytest.mark.tools

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TEXTS = list(distributions.texts(ROOT))
PAGES = [path for path in TEXTS if path.suffix == ".md"]
WORKFLOWS = [path for path in TEXTS if path.parent == ROOT / ".github" / "workflows"]


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda path: str(path.relative_to(ROOT)))


def code_lines(text: str) -> list[str]:
    """The lines inside of code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_two_commands_are_one_line_each(name):
    lines = code_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    (command,) = (line for line in lines if f"hatch run {name}" in line)
    start = "python3 -m venv .venv && .venv/bin/pip install -q hatch && .venv/bin/hatch run "
    assert command == start + name


def test_the_demo_comes_first():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in code_lines(text) if "hatch run" in line]
    assert [line.split()[-1] for line in commands[:2]] == ["demo", "test"]


def test_the_readme_s_python_runs():
    path = ROOT / "README.md"
    assert readme.blocks(path), "the README shows no code"
    readme.run_blocks(path)


SITE = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", SITE, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_the_site_s_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a tutorial saves its model
    readme.run_blocks(page)


def test_each_package_has_its_pages():
    wanted = {"tutorial.md", "how-to.md", "explanation.md"}
    for package in (ROOT / "packages").iterdir():
        assert wanted <= {path.name for path in (ROOT / "docs" / package.name).glob("*.md")}


@pytest.mark.parametrize("name", requirements.TABLES)
def test_the_support_page_has_the_tables_of_its_sources(name):
    """`hatch run requirements` renews them."""
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert requirements.between(page, name) == requirements.TABLES[name](ROOT)


def test_a_stack_that_is_not_there_is_refused():
    command = ["bash", ROOT / ".ci" / "stack", "latest"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "there is no stack named latest: oldest, pinned, newest\n"


OTHERS = ("adasplash", "difflayers", "diffmax", "dsalt", "flashdiffusion")
BARE = re.compile(
    rf"pip install\b[^\n`#]*?[\s\"'](?:{'|'.join(OTHERS)})(?:\[[\w,]+\])?(?=[\s\"'`]|$)"
)


def bare_installs(text: str) -> list[str]:
    """Commands that would bring another project of the same name from a package index."""
    return BARE.findall(text)


@each(PAGES)
def test_no_page_installs_a_bare_name(page):
    """Where a page shows what not to do, it says so behind the command."""
    text = page.read_text(encoding="utf-8")
    shown = re.sub(r"`pip install dsalt` brings somebody else's code", "", text)
    assert not bare_installs(shown)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install dsalt", 1),
        ('pip install "dsalt[plots]"', 1),
        ("pip install difflayers scikit-learn", 1),
        ("`pip install --no-deps adasplash`", 1),
        ('pip install ./shared-kernels "./packages/dsalt[plots]"', 0),
        ("pip install ./wheels/shared_kernels-*.whl ./wheels/dsalt-*.whl", 0),
    ],
)
def test_a_bare_name_is_found(text, found):
    assert len(bare_installs(text)) == found


def test_the_ways_to_install_bring_shared_kernels_first():
    """`.ci/install.py` runs them, as `hatch run wheels` does."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    commands = [line for line in code_lines(page) if line.startswith("pip install")]
    assert len(commands) == 3 and all("shared" in line.split()[2] for line in commands)
    assert commands[0] in code_lines((ROOT / "packages" / "dsalt" / "README.md").read_text("utf-8"))


def test_the_front_page_counts_the_fuzz_as_its_page_does():
    counted = re.search(r"of (\d+) draws left", (ROOT / "docs" / "fuzz.md").read_text("utf-8"))
    drawn = re.search(r"drew (\d+) cases", (ROOT / "README.md").read_text("utf-8"))
    assert drawn[1] == counted[1]


def hatch_scripts() -> set[str]:
    environments = tomllib.loads((ROOT / "hatch.toml").read_text(encoding="utf-8"))["envs"]
    return {
        script if name == "default" else f"{name}:{script}"
        for name, table in environments.items()
        for script in table["scripts"]
    }


@each(PAGES + WORKFLOWS)
def test_every_script_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert not [name for name in re.findall(r"\.ci/[\w.]*\w", text) if not (ROOT / name).exists()]
    named = re.findall(r"hatch run ([a-z][a-z:-]*)", text)
    # what is no script is looked up as a program
    assert set(named) <= hatch_scripts() | {"python", "pytest", "ruff", "mypy"}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links and images of a markdown text that lead nowhere."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)["']""", prose)
    local = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [target for target in local if not (folder / target.partition("#")[0]).exists()]


@each(PAGES)
def test_every_relative_link_leads_somewhere(page):
    assert not broken_links(page.read_text(encoding="utf-8"), page.parent)


def test_there_are_pages_and_workflows():
    assert {"ci.yml", "release.yml"} <= {path.name for path in WORKFLOWS}
    assert ROOT / "README.md" in PAGES and ROOT / "packages" / "dsalt" / "README.md" in PAGES


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("x")
    good = '[a](there.md#top) ![b](there.md "title") [c](https://example.org/x) [d](#here)'
    assert broken_links(good, tmp_path) == []
    assert broken_links("see [e](gone.md)", tmp_path) == ["gone.md"]
    assert broken_links('<img src="gone.png">', tmp_path) == ["gone.png"]
    assert broken_links("```\n[e](gone.md)\n```", tmp_path) == []
