"""The typed program runs, and mypy --strict reads it; wrong names in it are found."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "typed_program.py"
WRONG = {
    'HopfieldPooling(8, quantitty=2)': "quantitty",
    'HopfieldLayer(8, num_head=2)': "num_head",
    'DiffusedHopfield(8, seperation="softmax")': "seperation",
    'hidden: str = Hopfield(8).hidden_size': "Incompatible types",
    'x: str = HopfieldPooling(8).batch_first': "Incompatible types",
    'x: str = DiffusedHopfield(8).config.eta': "Incompatible types",
    'from difflayers import Hopfeld': "Hopfeld",
}  # fmt: skip


def test_the_program_runs():
    from .typed_program import main

    assert len(main()) == 11


@pytest.mark.tools
def test_mypy_reads_it_strictly(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    names = "DiffusedHopfield, Hopfield, HopfieldLayer, HopfieldPooling"
    body = "".join(f"def f{i}() -> None:\n    {code}\n" for i, code in enumerate(WRONG))
    wrong.write_text(f"from difflayers import {names}\n{body}", encoding="utf-8")
    run = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    run += [f"--cache-dir={tmp_path}"]
    good = subprocess.run([*run, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    bad = subprocess.run([*run, str(wrong)], capture_output=True, text=True, check=False)
    errors = [line for line in bad.stdout.splitlines() if ": error:" in line]
    for i, (code, word) in enumerate(WRONG.items()):
        line = f"wrong.py:{2 * i + 3}:"
        assert any(line in e and word in e for e in errors), (code, bad.stdout)
