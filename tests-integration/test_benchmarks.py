"""The harness refuses a wrong op, times the others, and says why a peer is missing."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import gate, registry, report, runner  # noqa: E402

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 64)


def _row(ours, **options):
    return registry.Row("toy/exp", "[64]", ours, lambda: X.double().exp(), **options)


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
    }
    row = _row(lambda: X.exp(), peers=peers, floor=lambda: X.clone(), bars={"slow": 1e6})
    measured = runner.measure(row, CPU)
    assert set(measured["seconds"]) == {"ours", "ours again", "floor", "slow"}
    assert measured["seconds"]["slow"] > measured["seconds"]["ours"]
    assert measured["refused"]["absent"] == "no_such_module is not installed"
    assert measured["refused"]["broken"].startswith("ZeroDivisionError")
    assert measured["repeats"] == runner.MANY and measured["torch"] == torch.__version__
    text = report.table([json.loads(json.dumps(measured))])
    assert "| toy/exp | [64] |" in text
    assert "Bars not met:" in text and "the bar is 1e+06×" in text
    assert "absent: no_such_module is not installed" in text


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
