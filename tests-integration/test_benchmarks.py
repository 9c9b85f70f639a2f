"""The harness refuses a wrong op, times the others, and says why a peer is missing."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.tools

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import clock, gate, registry, report, runner  # noqa: E402

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 64)


def _row(ours, **options):
    return registry.Row("toy/exp", "[64]", ours, lambda: X.double().exp(), **options)


@pytest.mark.parametrize("name", registry.names())
def test_every_module_of_cases_is_imported(name):
    assert callable(importlib.import_module(f"benchmarks.cases.{name}").rows)


def test_a_wrong_op_is_not_timed():
    gate.check(_row(lambda: X.exp()))
    with pytest.raises(gate.WrongAnswerError, match=r"toy/exp \[64\], result 0"):
        runner.measure(_row(lambda: X.exp() * 1.02), CPU)
    with pytest.raises(gate.WrongAnswerError, match="2 results, expected 1"):
        gate.check(_row(lambda: (X.exp(), X)))


def test_a_row_has_times_noise_and_reasons():
    peers = {
        "slow": lambda: [X.exp() for _ in range(200)],
        "absent": registry.peer("no_such_module", lambda m: m.f),
        "broken": lambda: 1 / 0,
        "elsewhere": "ImportError: no x (/usr/lib/site-packages/sklearn/utils/base.py); see https://a.b/c/d",
        "near": "no /tmp/x.so, 3/4 of it",
    }
    row = _row(lambda: X.exp(), peers=peers, floor=lambda: X.clone(), bars={"slow": 1e6})
    measured = runner.measure(row, CPU)
    assert set(measured["seconds"]) == {"ours", "floor", "slow"}
    assert measured["noise"] >= 1
    assert measured["seconds"]["slow"] > measured["seconds"]["ours"]
    assert measured["refused"]["absent"] == "no_such_module is not installed"
    assert measured["refused"]["broken"].startswith("ZeroDivisionError")
    elsewhere = "ImportError: no x (…/sklearn/utils/base.py); see https://a.b/c/d"
    assert measured["refused"]["elsewhere"] == elsewhere
    assert measured["refused"]["near"] == "no …/x.so, 3/4 of it"
    assert (
        measured["repeats"] == 24 >= runner.FAST_ROUNDS and measured["torch"] == torch.__version__
    )
    text = report.table([json.loads(json.dumps(measured))])
    assert "| toy/exp | [64] |" in text and f"| {measured['noise']:.2f}× |" in text
    assert "Bars not met:" in text and "the bar is 1e+06×" in text
    assert "absent: no_such_module is not installed" in text


@pytest.mark.parametrize("n", range(2, 9))
def test_every_contender_has_every_place_and_predecessor_equally_often(n):
    orders = runner.orders(n)
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = Counter((i, c) for order in orders for i, c in enumerate(order))
    assert len(places) == n * n and len(set(places.values())) == 1
    follows = Counter(pair for order in orders for pair in zip(order, order[1:], strict=False))
    assert len(follows) == n * (n - 1) and len(set(follows.values())) == 1


def test_rounds_follow_the_orders_and_ours_is_the_median_of_both_slots(monkeypatch):
    ran = []
    ticks = iter(range(10**6))
    slow_first = {"ours": 3.0, "ours again": 1.0}  # a slot that is always slow, e.g. by its place

    def timed(call):
        ran.append(call)
        return next(ticks) * 1e-9 + 1.0

    monkeypatch.setattr(clock.CpuClock, "__call__", lambda self, call: timed(call))
    ours, peer = (lambda: X.exp()), (lambda: X.sin())
    measured = runner.measure(_row(ours, peers={"peer": peer}), CPU)
    after_first = ran[3:]
    assert measured["repeats"] == 6 and len(after_first) == 18
    got = [after_first[i : i + 3].index(peer) for i in range(0, 18, 3)]
    assert got == [order.index(2) for order in runner.orders(3)]
    seconds = {name: iter([value] * 10) for name, value in slow_first.items()}
    names = iter(
        ["ours", "ours again"] + [runner.SLOTS[c] for o in runner.orders(2) for c in o] * 9
    )
    monkeypatch.setattr(clock.CpuClock, "__call__", lambda self, call: next(seconds[next(names)]))
    measured = runner.measure(_row(ours), CPU)
    assert measured["seconds"] == {"ours": 2.0} and measured["noise"] == 3.0


def test_rows_are_written_one_by_one_within_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        registry, "rows", lambda *a: iter([_row(lambda: X.exp()), _row(lambda: X.exp())])
    )
    out = tmp_path / "rows.jsonl"
    assert command.main(["--quick", "--out", str(out)]) == 0
    assert len(report.read(out)) == 2
    capsys.readouterr()
    assert command.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out.count("| toy/exp |") == 2
    assert command.main(["--budget", "-1", "--out", str(out)]) == 0
    assert "used up" in capsys.readouterr().out
    assert len(report.read(out)) == 2
