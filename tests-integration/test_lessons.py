"""The lessons in examples/ that no other test runs: they run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def lesson(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["learned_alpha", "learned_window"])
def test_it_runs_and_draws(name, tmp_path, capsys):
    lesson(name).main(["--steps", "2", "--out", str(tmp_path)])
    assert "drew" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_the_copying_head_becomes_sparser_than_the_averaging_one():
    module = lesson("learned_alpha")
    torch.manual_seed(1)
    copying, averaging = module.train(module.TwoHeads(), 100)[-1]
    assert copying > 1.65 and averaging < 1.4


@pytest.mark.parametrize(("lag", "grows"), [(4, False), (20, True)])
def test_the_window_goes_where_the_lag_is(lag, grows):
    module = lesson("learned_window")
    torch.manual_seed(1)
    widths, right = module.train(module.Repeater(), lag, 100)
    assert (max(widths[-1]) > max(widths[0])) == grows and right[-1] > 0.9
