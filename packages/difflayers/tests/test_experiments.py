"""The experiment commands run, and say what the README says of them."""

import importlib
import json

import pytest

pytest.importorskip("sklearn")

NAMES = (
    "ablation",
    "attention_analysis",
    "benchmark",
    "logit_vs_feature",
    "mode_comparison",
    "noise_robustness",
    "steps_sweep",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_its_usage(name, capsys):
    module = importlib.import_module(f"difflayers.experiments.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0 and name in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        module.main(["--seeds", "0"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["attention_analysis", "benchmark"])
def test_a_quick_run_writes_its_results(name, tmp_path, capsys):
    module = importlib.import_module(f"difflayers.experiments.{name}")
    assert module.main(["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.md").read_text() == capsys.readouterr().out.split("(no")[0]
    rows = {row[0]: row[1:] for row in result["rows"]}
    if name == "attention_analysis":
        share = {key: float(row[-1].split()[0]) for key, row in rows.items()}
        assert share["softmax"] < 0.1 and share["sparsemax"] >= 0.95


def test_values_spread_labels_where_few_are_known():
    from difflayers.experiments import digits

    task = digits.task(0, 20)
    plain = digits.hopfield_score(task)
    options = {**digits.VALUES, "scaling": 32.0, "k_neighbors": 10, "restart": 0.02}
    assert digits.diffused_score(task, **{**options, "diffusion_steps": 10}) >= plain + 0.05
