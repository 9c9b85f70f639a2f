"""``python -m shared_kernels.native`` says what runs here; with ``build`` it compiles first."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .library import instruction_set, why_not


def main() -> int:
    if sys.argv[1:] not in ([], ["build"]):
        sys.stderr.write("usage: python -m shared_kernels.native [build]\n")
        return 2
    if sys.argv[1:]:
        here = Path(__file__).resolve().parent
        script = here.parents[2] / "native" / "build.py"
        if not script.exists():
            sys.stderr.write(f"{script} is not there: only a checkout has the sources\n")
            return 1
        build = runpy.run_path(str(script))
        try:
            build["build"](here)
        except build["BuildError"] as problem:
            sys.stderr.write(f"no native library: {problem}\n")
            return 1
    reason = why_not()
    sys.stdout.write(f"{reason or f'native library: {instruction_set()}'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
