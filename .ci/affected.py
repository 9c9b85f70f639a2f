"""Which distributions does a change touch? The CI matrix asks.

    python .ci/affected.py --base origin/main   # [{"name": "diffmax", "path": "packages/diffmax"}]
    python .ci/affected.py --all

A file inside a project's folder touches that project and everything that requires it, directly or
not. A file that belongs to no project touches all of them, except under the folders in
`NO_PACKAGE`, which only the integration job reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable

from projects import ROOT, Project, projects

NO_PACKAGE = ("benchmarks/", "docs/", "examples/", "tests-integration/")


def affected(files: Iterable[str], projects: Iterable[Project]) -> list[str]:
    """Names of the projects that a change of `files` can break, in alphabetical order.

    Args:
        files: paths relative to the repository's root, with forward slashes.
        projects: every distribution of the repository.
    """
    projects = list(projects)
    touched: set[str] = set()
    for file in files:
        owners = {p.name for p in projects if file.startswith(f"{p.path}/")}
        if owners:
            touched |= owners
        elif not file.startswith(NO_PACKAGE):
            return sorted(p.name for p in projects)
    while True:
        dependents = {p.name for p in projects if p.siblings & touched} - touched
        if not dependents:
            return sorted(touched)
        touched |= dependents


def changed_files(base: str) -> list[str] | None:
    """Paths that differ between HEAD and its common ancestor with `base`, old names included.

    None where that cannot be known: the first push of a branch names no commit, a forced push one
    that is gone.
    """
    command = ["git", "diff", "--name-only", "--no-renames", "-z", f"{base}...HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not base:
        return None
    return [name for name in done.stdout.split("\0") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", help="a commit; what changed since the common ancestor counts")
    what.add_argument("--all", action="store_true", help="every distribution")
    arguments = parser.parse_args()
    every = projects()
    files = None if arguments.all else changed_files(arguments.base)
    names = [project.name for project in every] if files is None else affected(files, every)
    chosen = sorted((p for p in every if p.name in names), key=lambda project: project.name)
    print(json.dumps([{"name": project.name, "path": project.path} for project in chosen]))


if __name__ == "__main__":
    main()
