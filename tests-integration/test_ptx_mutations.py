"""Real compiled kernels, broken on purpose one place at a time: the sanitizer tells."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from shared_kernels import device
from shared_kernels.offline.ptx.sanitizer import KINDS

_spec = importlib.util.spec_from_file_location(
    "ptx_mutations", Path(__file__).with_name("ptx_mutations.py")
)
mutations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutations)
COMMITTED = json.loads(mutations.RESULT.read_text("utf-8"))["faults"]


@pytest.mark.thorough
@pytest.mark.skipif(device.interpreting(), reason="compiles, so Triton must not interpret")
@pytest.mark.parametrize(
    "case", mutations.BROKEN, ids=lambda case: f"{case[0]}-{case[1].kernel}-{case[2]}"
)
def test_a_fault_is_told_as_the_committed_table_says(case):
    target, subject, fault = case
    (committed,) = (
        r
        for r in COMMITTED
        if (r["fault"], r["target"]) == (fault, target)
        and r["kernel"].endswith(subject.kernel)
        and r["kernel"].startswith(subject.package)
    )
    assert mutations.row(*case) == committed


@pytest.mark.tools
def test_every_kind_of_fault_is_in_the_table_and_told():
    assert len(COMMITTED) == len(mutations.BROKEN) >= 20
    assert all(r["told"] for r in COMMITTED)
    assert {r["kind"] for r in COMMITTED} == set(KINDS)


@pytest.mark.tools
def test_the_page_shows_the_committed_table():
    text = mutations.PAGE.read_text("utf-8")
    assert mutations.page(text, COMMITTED) == text
