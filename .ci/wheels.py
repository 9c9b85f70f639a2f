"""Each distribution alone: its wheel and shared-kernels' in a clean environment, its own tests.

    python .ci/wheels.py [NAME ...] [--jobs 2] [--whole] [-- PYTEST ARGUMENTS]

What a wheel can lack is a file, a dependency or a name: the tests of the public names, of the
pages and of the checks run, and `opcheck` of each op. `--whole` runs every test of the
distribution.

A fresh environment sees torch and the test tools of the running one, but none of the house's
editable checkouts: what a package's tests use must come out of the wheels. The environment has no
pip of its own and nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from projects import ROOT, Project, projects, select

# What the tests need beside the wheels that a program needs.
DEV = Project("shared-kernels-dev", "shared-kernels/dev", frozenset())
SMOKE = ("public_api", "readme", "examples", "ops", "checks")

# Python 3.11 can leave the current folder off sys.path; before, it is an empty folder.
SAFE = ["-P"] if sys.version_info >= (3, 11) else []


def run(command: list[str | Path], **options) -> str:
    """The command's output; SystemExit with it where the command fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        shown = " ".join(str(word) for word in command)
        raise SystemExit(f"{done.stdout}\nfailed ({done.returncode}): {shown}")
    return done.stdout


def build(project: Project, to: Path, target: str = "wheel") -> Path:
    """Build the wheel (or "sdist") of `project` into the folder `to`."""
    before = set(to.iterdir())
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", to]
    run(command, cwd=ROOT / project.path)
    (built,) = set(to.iterdir()) - before
    return built


def environment(folder: Path) -> Path:
    """A clean environment that sees the running one's site-packages; its python.

    A path in a .pth file is put on sys.path, but the .pth files in *it* are not read, and by these
    the editable installs of the siblings are found.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / ("python.exe" if os.name == "nt" else "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-c", ask]).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def install(python: Path, wheels: list[Path]) -> None:
    """Install `wheels`, and nothing that they require."""
    options = ["--no-index", "--no-deps", "--ignore-installed", "--quiet"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels])


CHOSEN = "not slow and not extras and not thorough and not tools"
ALONE = """
import importlib, importlib.util, sys
present, absent = sys.argv[1].split(","), [name for name in sys.argv[2].split(",") if name]
for name in present:
    where = importlib.import_module(name).__file__
    if not where.startswith(sys.prefix):
        sys.exit(f"{name} was imported from {where}, not from its wheel")
for name in absent:
    if importlib.util.find_spec(name):
        sys.exit(f"{name} can be imported, so nothing shows that it is not needed")
"""


def tests_of(project: Project, whole: bool) -> list[Path]:
    """The folder of its tests, or those files of it that show that a wheel is complete."""
    folder = ROOT / project.path / "tests"
    files = [folder / f"test_{subject}.py" for subject in SMOKE]
    return [folder] if whole else [file for file in files if file.exists()]


def check(
    project: Project, wheels: dict[str, Path], folder: Path, whole: bool, arguments: list[str]
) -> str:
    """Install one project from its wheel in `folder`, run its tests there; pytest's last line."""
    every = projects()
    wanted = [project.name, *(name for name in project.siblings)]
    python = environment(folder / "venv")
    install(python, [wheels[name] for name in (*wanted, DEV.name)])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["PYTHONDONTWRITEBYTECODE"] = "1"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    present = ",".join(p.module for p in every if p.name in wanted)
    absent = ",".join(p.module for p in every if p.name not in wanted)
    run([python, *SAFE, "-c", ALONE, present, absent], cwd=elsewhere, env=clean)
    tests = [f"--rootdir={ROOT}", "-c", ROOT / "pytest.ini", *tests_of(project, whole)]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", CHOSEN]
    options += arguments if whole else ["-k", "not test_ops or opcheck", *arguments]
    told = run([python, *SAFE, "-m", "pytest", *tests, *options], cwd=elsewhere, env=clean)
    return told.strip().splitlines()[-1]


def main() -> int:
    own, _, pytest_arguments = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="distributions; all of them if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--whole", action="store_true", help="every test of each")
    options = parser.parse_args(own.split())
    chosen = select(options.names)
    arguments = pytest_arguments.split()
    with tempfile.TemporaryDirectory() as scratch:
        dist = Path(scratch, "dist")
        dist.mkdir()
        wheels = {project.name: build(project, dist) for project in (*projects(), DEV)}

        def alone(project: Project) -> str:
            started = time.monotonic()
            last = check(project, wheels, Path(scratch, project.name), options.whole, arguments)
            return f"{project.name} alone: {last} ({time.monotonic() - started:.0f} s)"

        with ThreadPoolExecutor(options.jobs) as pool:
            for line in pool.map(alone, chosen):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
