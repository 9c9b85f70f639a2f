"""`.ci/run` itself, on a toy checkout whose `hatch` is a script: order, failures, closing line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(sys.platform == "win32" or not shutil.which("bash"), reason="a bash script"),
]

# Says which leg ran; fails in the leg that the file `broken` names.
HATCH = """#!/bin/sh
echo "leg $2"
[ "$2" = "$(cat broken 2>/dev/null)" ] && { echo "this is why"; exit 3; }
case $2 in
    demo) mkdir -p demo-report && echo page | tee demo-report/index.html >demo-report/loss.png ;;
    test) echo "===== 7 passed, 1 skipped in 0.10s =====" ;;
esac
exit 0
"""
README = """# Toy

The tests run with `hatch run test`.

```bash
mkdir -p .venv/bin && cp hatch .venv/bin/hatch && .venv/bin/hatch run demo
```

```bash
test -e .venv/bin/hatch && .venv/bin/hatch run test
```
"""
FOLDERS = ("benchmarks", "examples", "packages", "shared-kernels", "tests-integration")


@pytest.fixture
def ci_run(tmp_path):
    """Runs `.ci/run` on a toy checkout; `broken` names the leg that fails there.

    With `until`, the run is ended by a signal as soon as it has said so.
    """

    def run(*arguments, broken="", readme=README, hatch=HATCH, until=None):
        toy = tmp_path / "toy"
        (toy / ".ci").mkdir(parents=True)
        shutil.copy(ROOT / ".ci" / "run", toy / ".ci" / "run")
        (toy / ".ci" / "offline").write_text("")
        for name in FOLDERS:
            (toy / name).mkdir()
        (toy / "conftest.py").write_text("")
        (toy / "README.md").write_text(readme)
        (toy / "broken").write_text(broken)
        (toy / "hatch").write_text(hatch)
        (toy / "hatch").chmod(0o755)
        before = {path.relative_to(toy) for path in toy.rglob("*")}
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        # No other Python than this one, so that the leg which compiles for each stays short.
        environment = {**os.environ, "TMPDIR": str(scratch), "PYENV_ROOT": str(tmp_path)}
        environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        process = subprocess.Popen(
            ["bash", toy / ".ci" / "run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        said = ""
        while until and until not in said:
            said += process.stdout.readline()
        if until:
            process.terminate()
        said += process.communicate(timeout=60)[0]
        assert not list(scratch.iterdir()), "it left something behind"
        assert {path.relative_to(toy) for path in toy.rglob("*")} == before
        return process.returncode, said

    return run


def test_runs_every_leg_and_closes_with_the_tests_line(ci_run):
    status, said = ci_run()
    assert status == 0, said
    early = ("demo", "lint", "types", "deps", "docs:build", "test")
    late = ("test-tools", "test-interpret", "test-kernels", "extras:test", "test-native", "wheels")
    places = {leg: said.find(f"leg {leg}\n") for leg in (*early, *late, "test-offline")}
    assert min(places.values()) >= 0, places
    assert places["demo"] == min(places.values())
    assert places["test"] == max(places[leg] for leg in early)
    assert places["test"] < min(places[leg] for leg in late)
    assert said.splitlines()[-1] == "===== 7 passed, 1 skipped in 0.10s ====="
    costs = said[said.index("What each leg cost") :]
    for name in (
        "demo",
        "test",
        "tools-system",
        "interpreter",
        "offline",
        "types",
        "sources",
        "compileall",
    ):
        assert f" s  {name}\n" in costs
    assert " s  in all\n" in costs
    assert "leg test-thorough\n" not in said


def test_a_whole_run_repeats_the_large_grids(ci_run):
    status, said = ci_run("--whole")
    assert status == 0, said
    assert "leg test-thorough\n" in said
    for name in ("tools-system", "interpreter", "extras"):
        assert f" s  {name}-thorough\n" in said


def test_an_unknown_argument_is_refused(ci_run):
    assert ci_run("--hole") == (2, "usage: .ci/run [--whole]\n")


@pytest.mark.parametrize(
    ("broken", "leg", "never"),
    [
        ("demo", "demo", "test"),
        ("test", "test", "wheels"),
        ("test-tools", "tools-system", "wheels"),
        ("test-interpret", "interpreter", "wheels"),
        ("test-kernels", "kernels", "wheels"),
        ("create", "environments", "wheels"),
        ("test-offline", "offline", "wheels"),
        ("lint", "sources", "deps"),
        ("types", "types", "wheels"),
        ("release-check", "sources", "wheels"),
        ("test-native", "native", "wheels"),
        ("wheels", "wheels", "What each leg cost"),
    ],
)
def test_stops_at_the_first_leg_that_fails(ci_run, broken, leg, never):
    status, said = ci_run(broken=broken)
    assert status == 1
    assert "this is why" in said
    last = said.splitlines()[-1]
    assert last.startswith(f"FAILED: {leg} (after ")
    assert f"leg {never}\n" not in said


def test_a_run_without_a_test_fails(ci_run):
    status, said = ci_run(hatch=HATCH.replace("7 passed, 1 skipped", "no tests ran"))
    assert status == 1
    assert said.splitlines()[-1] == "FAILED: the tests ran no test"


def test_a_demo_without_a_report_fails(ci_run):
    status, said = ci_run(hatch=HATCH.replace("demo-report/index.html", "/dev/null"))
    assert status == 1
    assert said.splitlines()[-1].startswith("FAILED: demo-report")


def test_a_readme_without_the_command_fails(ci_run):
    status, said = ci_run(readme=README.replace("hatch run test\n", "hatch run tests\n"))
    assert status == 1
    assert "FAILED: README.md has not exactly one `hatch run test` line" in said


@pytest.mark.parametrize("leg", ["demo", "wheels"])
def test_a_signal_ends_the_leg_and_cleans_up(ci_run, leg):
    sleeping = HATCH.replace("case $2 in", f"[ $2 = {leg} ] && sleep 300\ncase $2 in")
    status, said = ci_run(hatch=sleeping, until=f"leg {leg}\n")
    assert status == 130
    assert "FAILED" not in said and "What each leg cost" not in said


def test_no_path_of_a_machine_and_no_registry():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "://" not in script


PYTHON = """#!/bin/sh
[ "$1" = -c ] && { echo 3.7.1; exit 0; }
echo "compiled: $*"
exit $(cat broken 2>/dev/null || echo 0)
"""


@pytest.mark.parametrize(
    ("script", "runs", "fails", "other", "option", "of_option"),
    [
        ("offline", 2, 1, "benchmarks/results/offline_more.json", ["--targets", "more"], 1),
        ("compiled", 3, 3, "packages/adasplash/tests/test_triton.py", ["-x"], 3),
    ],
)
def test_a_leg_has_nothing_to_do_where_no_source_changed(
    tmp_path, script, runs, fails, other, option, of_option
):
    (tmp_path / ".ci").mkdir()
    for name in (script, "held"):
        shutil.copy(ROOT / ".ci" / name, tmp_path / ".ci")
    tests = re.findall(r"[\w/-]+\.py(?=::)", (ROOT / ".ci" / "compiled").read_text("utf-8"))
    for name in (
        "conftest.py",
        "shared-kernels/src/kernel.py",
        "shared-kernels/tests/launches.py",
        "packages/one/src/kernel.py",
        "packages/one/tests/launches.py",
        *(f"packages/one/tests/{name}.py" for name in ("cases", "lazy_cases", "kernels")),
        "packages/one/tests/test_paged.py",
        *(f"benchmarks/results/{name}.json" for name in ("offline", "offline_more", "forms")),
        *tests,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def leg(*arguments, **variables):
        done = subprocess.run(
            ["bash", tmp_path / ".ci" / script, *arguments],
            env={**os.environ, "PYTHON": str(tmp_path / "python"), **variables},
            capture_output=True,
            text=True,
        )
        assert not done.stderr
        return done.returncode, done.stdout.count("compiled: ")

    assert leg() == (0, runs)
    assert leg() == (0, 0)
    assert leg("--again") == (0, runs)
    assert leg(*option) == (0, of_option)
    if script == "compiled":
        assert leg(TARGET="sm_90") == (0, 1)
        assert leg(TRITON_DEFAULT_FP_FUSION="0") == (0, runs)
    for name in ("packages/one/src/kernel.py", other):
        (tmp_path / name).write_text("another")
        (tmp_path / "broken").write_text("1")
        assert leg() == (1, fails)
        assert leg() == (1, fails)  # what failed is not what held
        (tmp_path / "broken").unlink()
        assert leg(*option) == (0, of_option)  # a part that holds is not the whole
        assert leg() == (0, runs)
        assert leg() == (0, 0)
