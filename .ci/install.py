#!/usr/bin/env python3
"""Install each package as docs/install.md says: `python .ci/install.py [NAME ...]`.

The page's commands run as they are written there, for each package, in a clone of this checkout;
each way gets an environment with nothing of ours in it. The environments see
the running one's torch and build tool, so that nothing is fetched.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

from projects import ROOT, select
from wheels import ALONE, SAFE, environment, run

SHOWN = "dsalt"  # the package that stands in the page's commands
# What a machine without an index needs; the words behind `pip` stay those of the page.
PIP = """pip() {
    local options="--no-deps --no-index --no-build-isolation --quiet --disable-pip-version-check"
    case $1 in
        install) "$RUNNING" -m pip --python "$FRESH" install $options --ignore-installed "${@:2}" ;;
        *) "$RUNNING" -m pip "$1" $options "${@:2}" ;;
    esac
}
set -e
"""


def ways(page: str) -> list[str]:
    """The page's code blocks, one for each way."""
    found = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    if not found:
        raise SystemExit("docs/install.md must show a command in a block of bash")
    return found


def installs(name: str, commands: str, clone: Path, folder: Path) -> None:
    """Run one way for one package, and import the package from where it was put."""
    folder.mkdir()
    python = environment(folder / "venv")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    tools = {"RUNNING": sys.executable, "FRESH": str(python)}
    commands = PIP + re.sub(rf"\b{SHOWN}\b", name, commands)
    run(["bash", "-c", commands], cwd=clone, env={**clean, **tools})
    module = name.replace("-", "_")
    imported = [python, *SAFE, "-W", "error", "-c", ALONE, f"shared_kernels,{module}", ""]
    run(imported, cwd=folder, env=clean)


def main() -> int:
    chosen = [project.name for project in select(sys.argv[1:]) if project.name != "shared-kernels"]
    found = ways((ROOT / "docs" / "install.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        run(["git", "clone", "--quiet", ROOT, clone])
        for name in chosen:
            started = time.monotonic()
            for number, commands in enumerate(found):
                installs(name, commands, clone, Path(scratch, f"{name}-{number}"))
            print(
                f"{name}: {len(found)} ways of docs/install.md ({time.monotonic() - started:.0f} s)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
