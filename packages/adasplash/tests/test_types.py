"""The typed program runs, and mypy --strict reads it; wrong names in it are found."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "typed_program.py"
WRONG = {
    "from adasplash import adasplsh": "adasplsh",
    "adasplash(q, q, q, alfa=1.5)": "alfa",
    "adasplash(q, q, q, niter='many')": "niter",
    "x: str = adasplash(q, q, q)": "Incompatible types",
    "EntmaxAttention(16, 2, casual=True)": "casual",
    "x: str = EntmaxAttention(16, 2)(q)": "Incompatible types",
    "x: str = LazyAttention(16, 2)(q, use_cache=True)": "Incompatible types",
    "x: str = attention_stats(q, q).tile": "Incompatible types",
    "x: str = check_transformers(EntmaxAttention(16, 2)).called": "Incompatible types",
}


def test_the_program_runs():
    found = runpy.run_path(str(PROGRAM))
    assert found["length"] == 9 and bool(found["total"].isfinite())


@pytest.mark.tools
def test_mypy_reads_it_strictly(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    names = "EntmaxAttention, LazyAttention, adasplash, attention_stats, check_transformers"
    body = "".join(f"def f{i}() -> None:\n    {code}\n" for i, code in enumerate(WRONG))
    head = f"from adasplash import {names}\nfrom torch import ones\nq = ones(1, 1, 2, 8)\n"
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
