"""The bill of materials of a release: what its wheel brings with it, with versions and licences.

    python .ci/sbom.py NAME --dist dist --to bill/NAME.cdx.json

The wheel of NAME in `dist` is installed into a fresh environment, with shared-kernels from this
checkout and everything else from the index; cyclonedx-bom (a package of the index) reads that
environment. The result is CycloneDX 1.6: the wheel with its digest, and every package that was
installed with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import wheels
from projects import ROOT, Project, select
from release import version_of


def describe(project: Project, wheel: Path, python: Path, to: Path) -> None:
    """Write what is installed beside `wheel` in the environment of `python`."""
    options = ["--output-reproducible", "--validate", "--spec-version", "1.6"]
    root = ["--pyproject", ROOT / project.path / "pyproject.toml", "--mc-type", "library"]
    to.parent.mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, "-m", "cyclonedx_py", "environment", *options, *root]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    wheels.run([*tool, "--output-file", to, python], env=clean)
    bill = json.loads(to.read_text(encoding="utf-8"))
    # the version is no part of pyproject.toml, and the digest says which file this is about
    bill["metadata"]["component"] |= {
        "version": version_of(ROOT / project.path, project.module),
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}],
    }
    to.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the distribution")
    parser.add_argument("--dist", type=Path, required=True, help="the folder of its wheel")
    parser.add_argument("--to", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    (project,) = select([options.name])
    version = version_of(ROOT / project.path, project.module)
    found = sorted(options.dist.glob(f"{project.module}-{version}-*.whl"))
    if not found:
        raise SystemExit(f"{options.dist} holds no wheel of {project.name} {version}")
    shared = [] if project.name == "shared-kernels" else [ROOT / "shared-kernels"]
    with tempfile.TemporaryDirectory() as scratch:
        wheels.run([sys.executable, "-m", "venv", scratch])
        python = Path(scratch, "Scripts" if sys.platform == "win32" else "bin", "python")
        wheels.run([python, "-m", "pip", "install", "--quiet", *shared, found[0]])
        describe(project, found[0], python, options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
