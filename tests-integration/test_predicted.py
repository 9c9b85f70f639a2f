"""The page of predicted times shows the committed counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import predicted  # noqa: E402

pytestmark = pytest.mark.tools


def test_the_page_is_of_the_committed_rows():
    assert predicted.PAGE.read_text("utf-8") == predicted.page(predicted.read())


def test_rows_are_of_the_cases_and_cards_that_are_known():
    rows = [(r["case"], r["card"], r["state"]) for r in predicted.read()]
    assert len(rows) == len(set(rows))
    assert {case for case, *_ in rows} <= {case.name for case in predicted.CASES}
    assert {card for _, card, state in rows if state == "now"} == set(predicted.CARDS)


@pytest.mark.parametrize(
    ("case", "share"), [("adasplash f+b, bf16 B4", 0.7), ("dsalt forward", 0.75)]
)
def test_attention_takes_less_than_before(case, share):
    found = {(r["card"], r["state"]): r for r in predicted.read() if r["case"].startswith(case)}
    for card in ("H100 SXM", "H200"):
        now, before = found[card, "now"], found[card, "before"]
        for time in ("bound_ms", "in_turn_ms"):
            assert now[time] <= share * before[time]
        assert now["instructions"] <= share * before["instructions"]
