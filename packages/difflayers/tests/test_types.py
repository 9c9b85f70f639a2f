"""The typed program runs; that type checkers accept it is tested for all packages at once."""

from pathlib import Path

PROGRAM = Path(__file__).parent / "typed_program.py"


def test_the_program_runs():
    from .typed_program import main

    assert len(main()) == 11
