"""The lessons in examples/ that no other test runs: they run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from shared_kernels.testing import tolerance

pytestmark = pytest.mark.tools

NAMES = ("labelled digits only", "all digits, labels flow")
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


def test_sparse_attention_says_what_its_picture_shows(tmp_path, capsys):
    measured = lesson("sparse_attention").main(["--length", "256", "--out", str(tmp_path)])
    assert f"drew {tmp_path / 'sparse_attention.png'}" in capsys.readouterr().out
    zeros = [measured[f"zeros at alpha={alpha}"] for alpha in (1.0, 1.25, 1.5, 2.0)]
    assert zeros[0] == 0 and zeros == sorted(zeros) and zeros[2] > 0.5
    bound = tolerance(torch.float32)
    assert all(x <= 3 * bound for name, x in measured.items() if name.startswith("difference"))


def test_labels_that_flow_answer_more_than_labels_that_stay(tmp_path, capsys):
    arguments = ["--digits", "500", "--splits", "1", "--out", str(tmp_path)]
    right = lesson("few_label_memory").main(arguments)
    assert "drew" in capsys.readouterr().out and (tmp_path / "few_label_memory.png").exists()
    for n in (1, 2):
        stay, flow = (right[f"{n} per class, {name}"] for name in NAMES)
        assert flow > stay + 0.05
    assert right[f"8 per class, {NAMES[0]}"] > right[f"1 per class, {NAMES[0]}"]


def test_the_profile_names_every_part(tmp_path, capsys):
    parts = lesson("profile_attention").main(["--length", "128", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert set(parts) == {
        "entmax attention", "window attention", "feed-forward", "readout", "backward",
    }  # fmt: skip
    assert all(milliseconds > 0 for milliseconds in parts.values())
    assert ": chosen" in output
    assert "adasplash::attention" in output and "aten::" in output
    assert {path.name for path in tmp_path.iterdir()} == {"profile.png", "trace.json"}


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
