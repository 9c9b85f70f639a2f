"""The typed program runs, and mypy --strict reads it; wrong names in it are found."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "typed_program.py"
WRONG = {
    "from diffmax import difmax_bisect": "difmax_bisect",
    "diffmax_bisect(x, alfa=0.5)": "alfa",
    "diffmax_bisect(x, alpha='half')": "alpha",
    "y: str = diffmax_bisect(x)": "Incompatible types",
    "y: str = diffmax_loss(x, x)": "Incompatible types",
    "y: str = sparsity_stats(x)['sparsity']": "Incompatible types",
    "DiffmaxBisectModule(0.5, alpha_map=HillMap)": "alpha_map",
    "y: str = DiffmaxBisectModule(0.5)(x)": "Incompatible types",
}


def test_the_program_runs():
    found = runpy.run_path(str(PROGRAM))
    assert bool(found["total"].isfinite()) and "diffmax::bisect" in found["text"]


@pytest.mark.tools
def test_mypy_reads_it_strictly(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    names = "DiffmaxBisectModule, HillMap, diffmax_bisect, diffmax_loss, sparsity_stats"
    body = "".join(f"def f{i}() -> None:\n    {code}\n" for i, code in enumerate(WRONG))
    head = f"from diffmax import {names}\nfrom torch import ones\nx = ones(1, 8)\n"
    wrong.write_text(head + body, encoding="utf-8")
    run = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    run += [f"--cache-dir={tmp_path}"]
    good = subprocess.run([*run, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    bad = subprocess.run([*run, str(wrong)], capture_output=True, text=True, check=False)
    errors = [line for line in bad.stdout.splitlines() if ": error:" in line]
    for i, (code, word) in enumerate(WRONG.items()):
        line = f"wrong.py:{2 * i + 5}:"
        assert any(line in e and word in e for e in errors), (code, bad.stdout)
