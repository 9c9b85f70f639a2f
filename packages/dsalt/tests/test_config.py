"""The settings of a run: checks, schedules, and how the trainer takes them."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import math

import pytest
import torch

from dsalt import _config
from dsalt.training import DSALTTrainer, Schedule, TrainConfig

from .runs import QUIET, loader, make, trainer


def test_examples():
    failed, tried = doctest.testmod(_config)
    assert tried >= 4 and not failed


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_a_schedule_is_a_function_of_the_step(kind):
    schedule = Schedule(kind, warmup_steps=5, total_steps=50, min_lr_ratio=0.2)
    factors = [schedule(step) for step in range(60)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5] == 1.0
    assert all(a >= b for a, b in zip(factors[5:], factors[6:], strict=False))
    if kind == "wsd":
        assert factors[40] == 1.0 and factors[45] == pytest.approx(0.6)
    assert factors[50:] == [1.0 if kind == "constant" else pytest.approx(0.2)] * 10
    assert factors == [schedule(step) for step in range(60)]


def test_config_is_frozen_and_checked(tmp_path):
    config = TrainConfig(**{**QUIET, "total_steps": 3, "save_dir": tmp_path})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    run = DSALTTrainer(make(), loader(), config=config, total_steps=5)
    assert (run.lr, run.total_steps, run.save_dir) == (1e-2, 5, tmp_path)
    assert run.config == dataclasses.replace(config, total_steps=5)
    run.lr = 0.5
    assert run.learning_rate(1) == 0.5 and config.lr == 1e-2
    with pytest.raises(ValueError, match="`lr` must be positive"):
        run.lr = -1.0
    assert run.train()["step"] == 5


def test_arguments_by_position_and_by_name(tmp_path):
    run = DSALTTrainer(make(), loader(), None, 0.5, 0.25, None, 1, 7, save_dir=tmp_path)
    assert (run.lr, run.weight_decay, run.max_grad_norm) == (0.5, 0.25, None)
    assert (run.warmup_steps, run.total_steps) == (1, 7)
    shown = inspect.signature(DSALTTrainer).parameters
    assert list(shown)[:4] == ["model", "train_loader", "val_loader", "lr"]
    assert set(_config.NAMES) < set(shown) and shown["total_steps"].default == 100_000
    with pytest.raises(TypeError, match="no argument 'warm_up_steps'; did you mean 'warmup_steps'"):
        trainer(tmp_path, warm_up_steps=3)
    with pytest.raises(TypeError, match="two values of 'lr'"):
        DSALTTrainer(make(), loader(), None, 0.5, lr=0.5)
    with pytest.raises(TypeError, match="at most 22 arguments by position"):
        DSALTTrainer(make(), loader(), *[None] * 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "`schedule` must be one of"),
        ({"loss": "l2"}, "`loss` must be one of"),
        ({"ema": 1.0}, r"`ema` must be in \(0, 1\)"),
        ({"max_time": 0.0}, "`max_time` must be positive"),
        ({"early_stopping": 0}, "`early_stopping` must be at least 1"),
        ({"keep_best": True}, "`keep_best` must come with val_every > 0"),
        ({"keep_best": True, "val_every": 1}, "`keep_best` must come with a val_loader"),
        ({"early_stopping": 2, "val_every": 1}, "`early_stopping` must come with a val_loader"),
        ({"overwrite": True, "resume_from": "latest"}, "not both be given"),
        ({"optimizer": 3}, "`optimizer` must be an optimizer or a function"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "hold parameters of the model"),
        ({"init_from": "nowhere"}, "no weights in nowhere"),
        ({"lr": math.nan}, "`lr` must be positive"),
        ({"weight_decay": math.nan}, "`weight_decay` must be at least 0"),
        ({"loss": lambda h, w, y: 0.0}, "`loss` must"),
    ],
)
def test_errors(tmp_path, options, message):
    model = torch.nn.Embedding(20, 20) if callable(options.get("loss")) else make()
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        trainer(tmp_path, model, **options)


def test_a_schedule_of_ones_own_and_optimizers(tmp_path):
    """Per-group rates of an own optimizer are scaled by the schedule; its state is resumed."""
    rates = []

    class Watch:
        def on_step_end(self, trainer):
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    def sgd(groups):
        return torch.optim.SGD(
            [{**g, "lr": 0.1 * (i + 1)} for i, g in enumerate(groups)], momentum=0.9, lr=0.1
        )

    options = {"schedule": lambda step: 1 / (1 + step), "optimizer": sgd, "save_every": 2}
    whole = trainer(tmp_path, callbacks=[Watch()], save_dir=tmp_path / "whole", **options)
    whole.train()
    assert rates == [[pytest.approx(0.1 / k), pytest.approx(0.2 / k)] for k in (1, 2, 3, 4)]
    start = {"resume_from": tmp_path / "whole/step-00000002", "save_dir": tmp_path / "again"}
    again = trainer(tmp_path, **options, **start)
    again.train()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    model = make()
    given = torch.optim.Adagrad(model.parameters(), lr=0.05)
    run = trainer(tmp_path, model, optimizer=given)
    run.train()
    assert run.optimizer is given and run.optimizer.param_groups[0]["lr"] < 0.05


def test_resuming_with_another_schedule_says_what_it_does(tmp_path):
    import warnings as w

    first = trainer(tmp_path, total_steps=4, warmup_steps=2)
    first.train()
    with pytest.raises(ValueError, match="`total_steps` must be at least step-00000004's 4, got 3"):
        trainer(tmp_path, total_steps=3, resume_from="latest")
    with pytest.warns(UserWarning, match=r"total_steps 4 -> 8.*step 4 has the learning rate"):
        longer = trainer(tmp_path, total_steps=8, warmup_steps=2, resume_from="latest")
    assert longer.learning_rate(4) == TrainConfig(
        lr=1e-2, warmup_steps=2, total_steps=8
    ).learning_rate(4)
    with pytest.warns(UserWarning, match="step 4 has"):
        kept = trainer(tmp_path, total_steps=400, resume_from="latest")
    kept.warmup_steps = None
    kept._continue_schedule({**first.config.schedule_settings(), "schedule": "?"})
    assert kept.warmup_steps == 2
    with w.catch_warnings():
        w.simplefilter("error")
        trainer(tmp_path, total_steps=4, warmup_steps=2, resume_from="latest")
