"""Sequences on several ranks: the lesson under torchrun, the page, and what it says is counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import ranks

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(sys.platform != "linux", reason="forks its processes"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

SHOWN = 1e-4  # the last digit of a loss that the lesson prints


def lesson(launcher, folder, *more):
    command = [sys.executable, *launcher, str(ROOT / "examples" / "long_context.py")]
    done = subprocess.run(
        [*command, "--length", "600", "--out", str(folder), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (loss,) = re.findall(r"loss ([0-9.]+) after", done.stdout)
    return float(loss), done.stdout


@pytest.mark.thorough
def test_the_lesson_learns_the_same_with_two_processes_as_with_one(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    one, _ = lesson((), tmp_path / "one")
    two, said = lesson(torchrun, tmp_path / "two")
    assert "600 characters, 2 process(es)" in said
    assert abs(one - two) <= SHOWN and one < 5.5
    # what two processes have saved one goes on with
    more, _ = lesson((), tmp_path / "two", "--resume", "--steps", "5")
    assert more < two


def test_the_tables_of_the_page_are_those_of_the_results():
    found = json.loads(ranks.RESULTS.read_text(encoding="utf-8"))
    text = ranks.PAGE.read_text(encoding="utf-8")
    assert ranks.page(text, found) == text


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_what_can_be_ruled_out_is_not_sent(kind):
    sizes = {"N": 1024, "H": 2, "D": 32, "alpha": 1.5, "ranks": 2}
    sent = [
        each["forward"] + each["backward"]
        for each in ranks.on_ranks(2, ranks.attention_bytes, kind, sizes)
    ]
    share = sum(sent) / len(sent) / sum(ranks.ring_bytes(sizes).values())
    most = {"noise": 1.0, "topics, shuffled": 1.0, "topics in runs of 128 tokens": 0.7}
    assert 0 < share < most.get(kind, 0.5)
