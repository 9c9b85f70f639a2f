"""The demo: every part matters, nothing looks ahead, the report is whole or absent."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("loss", "attention", "windows", "alpha", "gate", "diffusion_map")


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import demo
        import demo_model

        yield demo, demo_model
    finally:
        sys.path.remove(str(EXAMPLES))


def _model(demo_model, **options):
    torch.manual_seed(0)
    model = demo_model.CharModel(30, d_model=32, n_heads=2, n_patterns=16, **options)
    with torch.no_grad():  # away from the symmetric start, so that nothing is zero by accident
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def _batch(n=64):
    return torch.randint(0, 30, (2, n), generator=torch.Generator().manual_seed(2))


def test_each_part_changes_the_loss(demo):
    demo, demo_model = demo
    whole = demo.loss_of(_model(demo_model), _batch()).item()
    for part in demo_model.PARTS:
        less = demo.loss_of(_model(demo_model, without=(part,)), _batch()).item()
        assert abs(less - whole) > 1e-4, f"{part} has no influence"


def test_each_part_learns(demo):
    demo, demo_model = demo
    model = _model(demo_model)
    demo.loss_of(model, _batch()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, f"no gradient: {still}"


def test_the_whole_model_is_causal(demo):
    _, demo_model = demo
    model = _model(demo_model)
    ids = _batch(96)
    for mode in (model.train(), model.eval()):
        before = mode(ids)
        changed = ids.clone()
        changed[:, 50:] = (changed[:, 50:] + 7) % 30
        after = mode(changed)
        assert (before[:, :50] - after[:, :50]).abs().max() <= FLOAT32 / 2
        assert (before[:, 50:] - after[:, 50:]).abs().max() > 1e-3
        assert (mode(ids[:, :37]) - before[:, :37]).abs().max() <= FLOAT32 / 2


def test_shown_weights_are_the_weights(demo):
    """Pictures show what the model computes: rows sum to one, nothing looks ahead, zeros exist."""
    _, demo_model = demo
    model = _model(demo_model).eval()
    for name, (weights, windows) in model.attention(_batch()[0]).items():
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=5 * FLOAT32), (
            name
        )
        assert (weights.triu(1) == 0).all(), name
        assert (windows is None) == (name == "block 3")
    assert ((weights == 0) & torch.ones(64, 64).tril().bool()).any()


@pytest.mark.thorough  # the demo's own leg writes the report every time
def test_report_is_written_and_the_same_seed_repeats(demo, tmp_path, capsys, monkeypatch):
    demo, _ = demo
    monkeypatch.setattr(demo, "SAMPLE", 40)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox, again.\n" for i in range(400)))
    out = tmp_path / "report"
    losses = []
    for _ in range(2):  # the second report replaces the first
        arguments = ["--text", str(text), "--steps", "3", "--seed", "5", "--out", str(out)]
        assert demo.main(arguments) == 0
        printed = capsys.readouterr().out
        losses.append([line for line in printed.splitlines() if "loss" in line])
        assert len(losses[-1]) == 3
        page = (out / "index.html").read_text()
        for name in PICTURES:
            assert f'src="{name}.png"' in page
            assert (out / f"{name}.png").stat().st_size > 5000
    assert losses[0] == losses[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--text", "short.txt"], "at least 5120 are needed"),
        (["--text", "binary.txt"], "it is not UTF-8 text"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--out", "taken"], "is not an earlier report"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_2(
    demo, tmp_path, monkeypatch, capsys, arguments, words
):
    demo, _ = demo
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("binary.txt").write_bytes(bytes(range(128, 256)) * 100)
    Path("taken").mkdir()
    Path("taken/precious.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in error and error.count("\n") == 1 and error.startswith("demo: ")
    assert sorted(Path().rglob("*")) == before


def test_a_broken_run_leaves_no_report(demo, tmp_path, monkeypatch):
    demo, _ = demo
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij " * 600)
    monkeypatch.setattr(demo.report, "gate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.main(["--text", str(text), "--steps", "1", "--out", str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ("a title\n----------", "a title\n---"),
        ("and ... so", "and ... so"),
        ("aaaaa  b", "aaaaa  b"),
        ("an end        \n   ", "an end"),
    ],
)
def test_a_sample_is_shown_without_what_says_nothing(demo, sample, shown):
    assert demo[0].shorten(sample) == shown


def test_help_reads_well():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for option in ("--text", "--steps", "--seed", "--device", "--out"):
        assert option in done.stdout
