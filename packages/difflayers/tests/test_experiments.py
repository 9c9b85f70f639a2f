"""The experiment commands run, and say what the README says of them."""

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the experiments need scikit-learn")

HOME = Path(__file__).parents[1]
NAMES = (
    "ablation",
    "attention_analysis",
    "benchmark",
    "digit_bags",
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
    record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == (
        capsys.readouterr().out.split("(no")[0]
    )
    assert "--seeds 1 --quick" in record["made_by"]["command"] and record["made_by"]["torch"]
    assert len(record["tables"]) == (1 if name == "benchmark" else 2)
    if name == "attention_analysis":
        rows = {row[0]: row[1:] for row in record["tables"][0]["rows"]}
        share = {key: float(row[-1].split()[0]) for key, row in rows.items()}
        assert share["softmax"] < 0.1 and share["sparsemax"] >= 0.95
        assert share["sparsemax, keys diffused"] < share["sparsemax"]


@pytest.mark.parametrize("data", ["digits", "clusters"])
def test_values_spread_labels_where_few_are_known(data):
    from difflayers.experiments import tasks

    task = tasks.task(data, 0, 20, balanced=True)
    assert torch.equal(task.values.sum(0), torch.full((10,), 2.0))
    plain = tasks.hopfield_score(task)
    options = {**tasks.VALUES, "scaling": 32.0, "k_neighbors": 10, "restart": 0.02}
    assert tasks.diffused_score(task, **{**options, "diffusion_steps": 10}) >= plain + 0.05


def test_parts_of_a_task_share_no_pattern():
    from difflayers.experiments import tasks

    task = tasks.task("clusters", 1, 30, noise=0.5)
    patterns = torch.cat((task.stored, task.validation[0], task.test[0]))
    assert len(patterns.unique(dim=0)) == len(patterns) == 1800
    assert int((task.values.sum(1) > 0).sum()) == 30 == len(task.labelled)


def test_a_positive_bag_holds_one_nine():
    from difflayers.experiments import digit_bags, tasks

    X, y = tasks.digits()
    parts = digit_bags.bags(3, counts=(20, 20, 20))
    seen = []
    for part in parts:
        assert part.images.shape == (20, digit_bags.BAG, 64)
        which = torch.cdist(part.images.flatten(0, 1), X).argmin(1)
        nines = (y[which] == digit_bags.TARGET).view(20, -1)
        assert torch.equal(nines.sum(1).float(), part.labels)
        assert bool((nines.int().argmax(1) == part.place).all())
        seen.append(set(which.tolist()))
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_fit_leaves_the_state_that_validated_best():
    from difflayers.experiments import digit_bags

    torch.manual_seed(0)
    train, validation, _ = digit_bags.bags(0, size=5, counts=(60, 40, 2))
    model = digit_bags.Classifier(digit_bags.hopfield(num_heads=4))
    best = digit_bags.fit(model, train, validation, 1e-2, 6)
    assert digit_bags.auc(model, validation) == best > 0.6


@pytest.mark.slow
def test_hopfield_pooling_finds_the_nine():
    from difflayers.experiments import digit_bags

    name = "HopfieldPooling, softmax (as hflayers)"
    tried = [(make, rate) for make in digit_bags.POOLINGS[name] for rate in digit_bags.RATES]
    scores = [digit_bags._score(seed, tried, digit_bags.EPOCHS) for seed in range(3)]
    assert statistics.mean(scores) >= 0.92


# ---------------------------------------------------------------- what is committed


def test_the_headline_figures_are_those_of_the_committed_results():
    text = (HOME / "README.md").read_text(encoding="utf-8")
    headline = text[text.index("## What it is good for") : text.index("## More of it")]
    committed = ""
    for path in sorted((HOME / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "date", "torch", "commit"} <= record["made_by"].keys()
        committed += json.dumps(record["tables"], ensure_ascii=False)
    figures = re.findall(r"\d\.\d{3} ± \d\.\d{3}", headline)
    assert len(figures) >= 12
    missing = [figure for figure in figures if figure not in committed]
    assert not missing
