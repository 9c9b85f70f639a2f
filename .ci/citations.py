"""Validate every CITATION.cff against the schema that it names: `hatch run workflows:check`."""

from __future__ import annotations

import sys

from cffconvert import Citation
from projects import ROOT, projects


def main() -> int:
    paths = [ROOT / "CITATION.cff", *(ROOT / p.path / "CITATION.cff" for p in projects())]
    for path in paths:
        Citation(path.read_text(encoding="utf-8"), str(path)).validate()
    print(f"cffconvert: {len(paths)} citation files are valid")
    return 0


if __name__ == "__main__":
    sys.exit(main())
