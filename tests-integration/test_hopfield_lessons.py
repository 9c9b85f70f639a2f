"""The three lessons on Hopfield memories run, in small, and say what they measured."""

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "bit_pattern": ["--bags", "256", "--epochs", "3"],
    "latch": ["--sequences", "256", "--epochs", "3", "--lengths", "20", "60"],
    "digit_bags": ["--bags", "40", "--epochs", "2"],
}


@pytest.fixture(scope="module")
def lesson():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield lambda name: importlib.import_module(f"hopfield_{name}")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("name", SMALL)
def test_a_lesson_runs_and_draws(name, lesson, tmp_path, capsys):
    measured = lesson(name).main([*SMALL[name], "--out", str(tmp_path)])
    drawn = tmp_path / f"{name}.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert str(drawn) in output and ("accuracy" in output or "AUC" in output)
    assert measured


def test_a_positive_bag_of_bits_holds_its_signal(lesson):
    bags, labels, is_signal = lesson("bit_pattern").make_bags(64, draw=3)
    assert bags.shape == (64, 16, 8)
    assert bool((is_signal.any(1) == (labels > 0)).all())


def test_the_first_symbol_is_the_answer(lesson):
    sequences, labels = lesson("latch").make_sequences(32, 25, draw=4)
    assert bool((sequences[:, 0].argmax(-1) == labels).all())
    assert bool((sequences[:, 1:, :2] == 0).all())


@pytest.mark.slow
def test_the_lessons_teach_what_they_say(lesson, tmp_path):
    out = ["--out", str(tmp_path)]
    bits = lesson("bit_pattern").main(out)
    assert min(bits[n] for n in ("Hopfield", "HopfieldPooling", "HopfieldLayer")) > 0.95
    assert bits["on_signal"] > 0.5
    latch = lesson("latch").main(out)
    assert latch["HopfieldPooling, sparsemax"][-1] > 0.95
    digits = lesson("digit_bags").main(out)
    assert digits["HopfieldPooling"] > max(digits["mean"], digits["max"])
    assert digits["found"] > 0.5
