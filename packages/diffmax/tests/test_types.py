"""The typed program runs; that type checkers accept it is tested for all packages at once."""

import runpy
from pathlib import Path

PROGRAM = Path(__file__).parent / "typed_program.py"


def test_the_program_runs():
    found = runpy.run_path(str(PROGRAM))
    assert bool(found["total"].isfinite()) and "diffmax::bisect" in found["text"]
