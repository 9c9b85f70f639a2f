"""What a daily user asks of a run: averages, the best checkpoint, wrappers, and honest failures."""

from __future__ import annotations

import math
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dsalt import _checkpoint, _objective
from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing import assert_close
from shared_kernels.testing.tolerances import tolerance

from .runs import VOCAB, data, loader, logs, make, same, trainer

FLOAT32 = tolerance(torch.float32)
ROUNDING32 = tolerance(torch.float32, "rounding")
UNIFORM = 1e-3  # the entropy of nearly equal weights

# --- runs that look fine and are not -------------------------------------------------------------


class Shifting(nn.Module):
    """Scores place t against the label of t + 1, as Hugging Face's language models do."""

    def __init__(self, how="object"):
        super().__init__()
        self.table, self.how = nn.Embedding(VOCAB, VOCAB), how

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            moved = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(*moved)
        if self.how == "tuple":
            return (logits,) if loss is None else (loss, logits)
        if self.how == "dict":
            return {"loss": loss, "logits": logits}
        return type("Output", (), {"loss": loss, "logits": logits})()


@pytest.mark.parametrize("how", ["object", "tuple", "dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_shifts_the_labels_itself_is_pointed_out(tmp_path, how, dtype):
    torch.manual_seed(0)
    run = trainer(tmp_path, Shifting(how), dtype=dtype)
    with pytest.raises(ValueError, match='shifted twice; set loss="cross_entropy"'):
        run.train()
    with pytest.raises(ValueError, match='loss="cross_entropy"'):
        trainer(tmp_path, Shifting(how), val_loader=loader(), dtype=dtype).validate()
    torch.manual_seed(0)
    model = Shifting(how)
    plain = nn.Embedding(VOCAB, VOCAB)
    plain.load_state_dict(model.table.state_dict())
    for module in (model, plain):
        found = trainer(tmp_path, module, loss="cross_entropy", dtype=dtype).train()
        assert found["loss"] == pytest.approx(
            trainer(tmp_path, plain).last_logs.get("loss", found["loss"])
        )
    assert same(model.table.weight, plain.weight)


def test_a_loss_of_its_own_is_not_taken_for_a_shift(tmp_path):
    class Smoothed(Shifting):
        def forward(self, input_ids, labels=None):
            logits = self.table(input_ids)
            flat = logits.flatten(0, 1), labels.flatten()
            return nn.functional.cross_entropy(*flat, label_smoothing=0.1), logits

    assert trainer(tmp_path, Smoothed()).train()["step"] == 4


def test_float16_steps_left_out_for_ever_end_the_run(tmp_path):
    class Broken(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * math.nan

    run = trainer(tmp_path, Broken(VOCAB, VOCAB), dtype=torch.float16, total_steps=50)
    with pytest.raises(FloatingPointError, match="the last 20 steps until step 19 were left out"):
        run.train()
    assert not _checkpoint.steps(tmp_path / "run")
    for steps in (1, 2, 10):
        run = trainer(tmp_path, Broken(VOCAB, VOCAB), dtype=torch.float16, total_steps=steps)
        with pytest.raises(FloatingPointError, match="were left out"):
            run.train()
        assert not _checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e38, 1e30, 1e12])
@pytest.mark.parametrize("total_steps", [1, 2, 8])
@pytest.mark.parametrize("validates", [True, False])
def test_weights_that_overflow_are_one_documented_error(
    tmp_path, lr, dtype, total_steps, validates
):
    options = {"lr": lr, "dtype": dtype, "total_steps": total_steps, "health": True}
    val_loader = loader() if validates else None
    run = trainer(tmp_path, **options, warmup_steps=0, val_loader=val_loader)
    try:
        run.train()
    except FloatingPointError as error:
        assert "\n" not in str(error) and "try" in str(error)
    else:  # it may have survived
        assert math.isfinite(run.last_logs["val_loss" if validates else "loss"])


@pytest.mark.parametrize("where", ["embedding.weight", "transformer.norm.weight"])
def test_weights_that_are_no_numbers(tmp_path, where):
    model = make()
    model.get_parameter(where).data.flatten()[0] = math.nan
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, model).train()
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, model, val_loader=loader()).validate()
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        trainer(tmp_path, model).save()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["on_step_end", "on_log", "on_validation", "on_checkpoint"])
def test_what_a_callback_draws_does_not_change_the_run(tmp_path, name):
    def generate(trainer, *rest):
        trainer.model.generate(data(1, 3), 4)
        np.random.random()

    results = []
    for callbacks in ([], [type("Draw", (), {name: staticmethod(generate)})()]):
        run = trainer(
            tmp_path,
            make(dropout=0.3),
            loader(shuffle=True),
            val_loader=loader(),
            seed=5,
            callbacks=callbacks,
            log_every=1,
            val_every=1,
            save_every=1,
        )
        run.train()
        results.append(dict(run.model.state_dict()))
    assert same(*results)


@pytest.mark.parametrize(
    "changed",
    [
        {"n_max": 7},
        {"n_min": 1},
        {"k_lmk": 1},
        {"n_sink": 1},
        {"rope_base": 5e3},
        {"n_heads": 4},
        {"landmark_block": 8},
        {"window_reg": "length"},
    ],
    ids=str,
)
def test_another_model_is_not_resumed(tmp_path, changed):
    """Of the same shapes: loading alone would not notice."""
    trainer(tmp_path, make(dropout=0.1)).train()
    with pytest.raises(ValueError, match=f"does not fit this model: .*{next(iter(changed))}"):
        trainer(tmp_path, make(**changed), resume_from="latest")
    assert trainer(tmp_path, make(dropout=0.5), resume_from="latest").step == 4


# --- ids, labels and wrappers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
)
@pytest.mark.parametrize("form", ["ids", "pair", "masked"])
@pytest.mark.parametrize("kind", ["dsalt", "plain"])
def test_ids_and_labels_of_every_integer_type(tmp_path, dtype, form, kind):
    def model():
        torch.manual_seed(1)
        return make() if kind == "dsalt" else nn.Embedding(VOCAB, VOCAB)

    if form == "masked" and kind == "plain":
        pytest.skip("a plain module takes no mask")
    losses = []
    for to in (torch.int64, dtype):
        x, y = data(4).to(to), data(4, seed=8).to(to)
        mask = torch.ones(4, 9, dtype=torch.int64)
        mask[0, 5:] = 0
        batch = {"ids": x, "pair": (x, y), "masked": {"input_ids": x, "attention_mask": mask}}[form]
        run = trainer(tmp_path, model(), [batch], val_loader=[batch])
        losses.append((run.train()["loss"], run.last_logs["val_loss"]))
    assert losses[0] == losses[1]


def compiled(model):
    return torch.compile(model, backend="eager")


def partly(model):
    model.transformer = torch.compile(model.transformer, backend="eager")
    return model


@pytest.mark.system
@pytest.mark.parametrize(
    "wrap", [compiled, pytest.param(partly, marks=pytest.mark.thorough)], ids=["whole", "a part"]
)
def test_compiled_and_plain_models_share_checkpoints(tmp_path, wrap):
    options = {"save_every": 2, "ema": 0.9}
    runs = {}
    for name, make_one in (("plain", make), ("compiled", lambda: wrap(make()))):
        runs[name] = trainer(tmp_path, make_one(), save_dir=tmp_path / name, **options)
        runs[name].train()
        last = tmp_path / name / "step-00000004"
        for folder in (last, last / "ema"):
            assert not any("_orig_mod" in n for n in _names(folder))
            DSALTLMHeadModel.from_pretrained(folder)
    for start, make_one in (("plain", lambda: wrap(make())), ("compiled", make)):
        again = trainer(
            tmp_path,
            make_one(),
            save_dir=tmp_path / f"from-{start}",
            resume_from=tmp_path / start / "step-00000002",
            **options,
        )
        again.train()
        a, b = (
            DSALTLMHeadModel.from_pretrained(tmp_path / n / "step-00000004").state_dict()
            for n in (start, f"from-{start}")
        )
        assert same(dict(a), dict(b))


def _names(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, nn.DataParallel])
def test_a_wrapped_model_is_unwrapped(tmp_path, wrapper):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        run = trainer(tmp_path, wrapper(make()))
        run.train()
    finally:
        torch.distributed.destroy_process_group()
    assert not any(name.startswith("module.") for name in _names(tmp_path / "run/step-00000004"))
    assert trainer(tmp_path, resume_from="latest", total_steps=5).train()["step"] == 5


class Odd(nn.Module):
    """Buffers that are views of one another, and a state that is no tensor."""

    def __init__(self, extra):
        super().__init__()
        self.table, self.extra = nn.Embedding(VOCAB, VOCAB), extra
        whole = torch.arange(12.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[3:6])
        self.register_buffer("turned", whole.view(3, 4).mT)
        self.register_buffer("again", whole.view(3, 4))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, ids):
        if self.training and isinstance(self.extra, dict):
            self.extra["calls"] += 1
        return self.table(ids)


def test_views_and_extra_state_are_saved(tmp_path):
    run = trainer(tmp_path, Odd({"calls": 0, "seen": torch.zeros(2)}), save_every=2)
    run.train()
    fresh = Odd({"calls": 0, "seen": None})
    fresh.whole.zero_()
    again = trainer(tmp_path, fresh, resume_from="latest", total_steps=6)
    assert again.model.extra["calls"] == 4 and same(again.model.extra["seen"], torch.zeros(2))
    for name, buffer in run.model.named_buffers():
        assert same(buffer, again.model.get_buffer(name)), name
    again.train()
    assert again.model.extra["calls"] == 6


def test_a_state_that_cannot_be_read_back_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="a state that a checkpoint can hold, got '_extra_state'"):
        trainer(tmp_path, Odd(object()))


def test_half_models(tmp_path):
    with pytest.raises(ValueError, match="`model` must have float32 parameters, got float16"):
        trainer(tmp_path, make().half(), dtype=torch.float16)
    with pytest.warns(UserWarning, match="trained and saved in float32"):
        run = trainer(tmp_path, make().bfloat16(), dtype=torch.bfloat16)
    run.train()
    assert {t.dtype for t in _names(tmp_path / "run/step-00000004").values()} == {torch.float32}


# --- what daily users would miss -----------------------------------------------------------------


def test_the_average_of_the_weights(tmp_path):
    weights, averages = [make()], {}

    class Watch:
        def on_step_end(self, trainer):
            weights.append(make())
            weights[-1].load_state_dict(trainer.model.state_dict())

    options = {"ema": 0.8, "save_every": 2, "val_loader": loader()}
    run = trainer(tmp_path, make(tie_embeddings=True), callbacks=[], **options)
    run = trainer(tmp_path, callbacks=[Watch()], **options)
    result = run.train()
    for name, p in weights[0].named_parameters():
        average = p.detach().clone()
        for step, model in enumerate(weights[1:]):
            keep = min(0.8, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * model.get_parameter(name).detach()
        averages[name] = average
    last = tmp_path / "run/step-00000004"
    saved = DSALTLMHeadModel.from_pretrained(last / "ema")
    for name, average in averages.items():
        torch.testing.assert_close(
            saved.get_parameter(name), average, atol=ROUNDING32, rtol=FLOAT32 / 2
        )
    x = data(12)
    exact = saved(x[:, :-1], labels=x[:, 1:]).loss.item()
    assert result["val_loss"] == pytest.approx(exact, abs=FLOAT32 / 2)
    assert same(dict(run.model.state_dict()), _names(last))  # the weights themselves go on
    start = {"resume_from": tmp_path / "run/step-00000002", "save_dir": tmp_path / "again"}
    trainer(tmp_path, **options, **start).train()
    assert same(_names(last / "ema"), _names(tmp_path / "again/step-00000004/ema"))


def test_the_average_of_a_tied_model(tmp_path):
    run = trainer(tmp_path, make(tie_embeddings=True), ema=0.5)
    run.train()
    saved = DSALTLMHeadModel.from_pretrained(tmp_path / "run/step-00000004/ema")
    assert saved.lm_head.weight is saved.embedding.weight
    assert same(saved.lm_head.weight.detach(), run._average.values["embedding.weight"])


def worse_after(step):
    """A metric that turns: the learning rate is negative from some step on."""
    return lambda k: 1.0 if k < step else -5.0


def test_the_best_checkpoint_is_kept_and_training_ends_early(tmp_path):
    options = {
        "val_loader": loader(),
        "val_every": 1,
        "keep_best": True,
        "keep_last": 1,
        "schedule": worse_after(5),
        "total_steps": 40,
        "log_every": 1,
        "save_every": 3,
    }
    run = trainer(tmp_path, early_stopping=4, **options)
    result = run.train()
    losses = {row["step"]: row["val_loss"] for row in logs(tmp_path / "run") if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert result["step"] == best + 4 < 40
    assert _checkpoint.best(tmp_path / "run").name == _checkpoint.step_name(best)
    steps = [step for step, _ in _checkpoint.steps(tmp_path / "run")]
    assert steps == [best, best + 4]
    # what is best is remembered across a resume
    again = trainer(tmp_path, resume_from="latest", **{**options, "total_steps": best + 6})
    again.train()
    assert _checkpoint.best(tmp_path / "run").name == _checkpoint.step_name(best)
    # and from a checkpoint before it, the run has yet to find it
    first = tmp_path / "one"
    trainer(tmp_path, save_dir=first, **{**options, "keep_last": None, "save_every": 1}).train()
    found = _checkpoint.best(first).name
    more = {**options, "keep_last": None, "total_steps": 3, "schedule": "constant"}
    trainer(tmp_path, save_dir=first, resume_from=first / "step-00000002", **more).train()
    assert _checkpoint.best(first).name == "step-00000003" != found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [3, 4])
def test_a_signal_saves_before_a_long_validation(tmp_path, number, at, request):
    """What was due is validated when the run goes on: logs and best are those of one run."""
    if number == signal.SIGINT:
        # tests that a shell runs in its background start with this signal ignored
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
    options = {"val_loader": loader(), "val_every": 2, "total_steps": 6, "log_every": 1}
    options |= {"keep_best": True}
    trainer(tmp_path, save_dir=tmp_path / "whole", **options).train()

    class Send:
        def on_step_end(self, trainer):
            if trainer.step == at:
                signal.raise_signal(number)

        def on_validation(self, trainer, logs):
            assert trainer.step != at

    ends = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    handler = signal.getsignal(number)
    with pytest.raises(ends) as caught:
        trainer(tmp_path, callbacks=[Send()], **options).train()
    assert signal.getsignal(number) is handler
    assert number == signal.SIGINT or caught.value.code == 128 + number
    assert _checkpoint.latest(tmp_path / "run").name == _checkpoint.step_name(at)
    trainer(tmp_path, resume_from="latest", **options).train()
    whole, run = (
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in logs(folder)]
        for folder in (tmp_path / "whole", tmp_path / "run")
    )
    assert whole == run
    assert _checkpoint.best(tmp_path / "whole").name == _checkpoint.best(tmp_path / "run").name


def test_a_handler_of_the_programs_own_stays(tmp_path):
    got = []

    class Send:
        def on_step_end(self, trainer):
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        assert trainer(tmp_path, callbacks=[Send()]).train()["step"] == 4
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM] * 4


def test_time_is_up(tmp_path):
    class Slow:
        def on_step_end(self, trainer):
            time.sleep(0.05)

    run = trainer(tmp_path, total_steps=1000, max_time=0.4, callbacks=[Slow()])
    done = run.train()["step"]
    assert 1 <= done < 20 and _checkpoint.latest(tmp_path / "run").name.endswith(f"{done:02d}")


def test_beginning_from_weights(tmp_path):
    trainer(tmp_path, save_dir=tmp_path / "first").train()
    model = DSALTLMHeadModel.from_pretrained(tmp_path / "first/step-00000004")
    model.save_pretrained(tmp_path / "saved")
    for source in ("first", "first/step-00000004", "saved"):
        run = trainer(tmp_path, make(n_max=6), init_from=tmp_path / source)
        assert run.step == 0 and same(dict(run.model.state_dict()), dict(model.state_dict()))
        assert run.train()["step"] == 4
    # a job that is started again goes on with its own run
    again = trainer(tmp_path, make(n_max=6), init_from=tmp_path / "saved", resume_from="auto")
    assert again.step == 4


@pytest.mark.thorough
def test_compile_is_the_plain_run(tmp_path, monkeypatch):
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: eager(model, backend="aot_eager"))
    results = []
    for on in (False, True):
        run = trainer(tmp_path, compile=on, val_loader=loader(), log_every=1)
        result = run.train()
        assert (run._run is run.model) != on
        results.append([result["loss"], result["val_loss"]])
    assert results[0] == pytest.approx(results[1], abs=FLOAT32 / 2)


def test_many_logits_are_not_made(tmp_path, monkeypatch):
    seen = []

    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.vocab_size, self.loss = nn.Embedding(VOCAB, VOCAB), VOCAB, None

        def forward(self, ids, labels=None, return_logits=True):
            seen.append(return_logits)
            logits, own = self.table(ids), self.loss or nn.functional.cross_entropy
            loss = own(logits.flatten(0, 1), labels.flatten())
            return (loss, logits if return_logits else None)

    trainer(tmp_path, Chunked(), total_steps=2).train()
    assert seen == [True, True]
    monkeypatch.setattr(_objective, "MAX_LOGITS", 4 * 8 * VOCAB)
    trainer(tmp_path, Chunked(), total_steps=2, val_loader=loader()).train()
    assert seen[2:4] == [False, False] and not any(seen[2:])
    doubled = trainer(tmp_path, Chunked(), loss=lambda x, y: 2 * nn.functional.cross_entropy(x, y))
    torch.manual_seed(0)
    assert doubled.train()["loss"] > 1.5 * trainer(tmp_path, Chunked()).train()["loss"]


def plain_loss(hidden, weight, labels):
    """Cross-entropy as a user writes it: a mean that is no number without a valid label."""
    return nn.functional.cross_entropy((hidden @ weight.T).float(), labels)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def packed(n=6):
    """Rows of documents, one whose labels do not count among them."""
    ids = data(n, 12)
    rows = [
        {"input_ids": ids[i : i + 1], "cu_seqlens": torch.tensor(bounds)}
        for i, bounds in enumerate([[0, 5, 12], [0, 3, 3, 12], [0, 12], [0, 1, 2, 12]] * 2)
        if i < n
    ]
    labels = torch.roll(rows[1]["input_ids"], -1, 1)
    return [*rows, {**rows[1], "labels": torch.full_like(labels, -100)}]


@pytest.mark.parametrize(
    ("train", "dtype", "tied"),
    [
        (loader, torch.float32, True),
        pytest.param(packed, torch.float32, False, marks=pytest.mark.thorough),
        (packed, torch.bfloat16, False),
    ],
    ids=["rows", "packed", "packed-bfloat16"],
)
def test_cross_entropy_as_a_function_is_the_string(tmp_path, train, dtype, tied):
    def run(loss, **options):
        given = {"loss": loss, "grad_accum": 3, "dtype": dtype, "log_every": 1, "ema": 0.9}
        given["save_dir"] = folder
        given |= {"val_loader": train(), "window_reg_coef": 0.1, "optimizer": sgd, **options}
        model = make(dropout=0.1, tie_embeddings=tied)
        made = trainer(tmp_path, model, train(), **given)
        return made.train(), made.model

    found = {}
    for loss in ("cross_entropy", plain_loss):
        folder = tmp_path / getattr(loss, "__name__", loss)
        found[loss] = run(loss, total_steps=6, save_every=3)
        logs, model = found[loss]
        again, resumed = run(loss, total_steps=6, resume_from=folder / "step-00000003")
        assert same(dict(resumed.state_dict()), dict(model.state_dict()))
        assert again["loss"] == logs["loss"] and model.loss is None
    (a, model_a), (b, model_b) = found.values()
    for name in ("loss", "val_loss", "window_reg"):
        assert_close(torch.tensor(a[name]), torch.tensor(b[name]))
    for x, y in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert_close(x, y)


def test_a_loss_for_a_model_that_has_none(tmp_path):
    with pytest.raises(ValueError, match="for a model without an attribute `loss`"):
        trainer(tmp_path, nn.Embedding(VOCAB, VOCAB), loss=plain_loss)
    for wrong in ("mean", 3):
        with pytest.raises(ValueError, match="`loss` must be one of 'model', 'cross_entropy'"):
            trainer(tmp_path, loss=wrong)


def test_health_of_the_layers(tmp_path):
    model = make(n_layers=2)
    run = trainer(tmp_path, model, log_every=4)
    line = run.train()
    ids = run._sample
    assert ids.shape == (1, 8)
    model.eval()
    windows = model(ids).window_sizes
    for i in range(2):
        assert line[f"window/{i}"] == pytest.approx(
            float(windows[i].detach().mean()), rel=5 * FLOAT32
        )
        assert 0.0 <= line[f"landmark_share/{i}"] <= 1.0
        assert 0.0 <= line[f"attention_entropy/{i}"] <= math.log(8)
    x_ids = data(4)
    from dsalt._monitor import _look
    from dsalt.modules import DSALTAttention

    torch.manual_seed(0)
    x = torch.randn(1, 60, 16)
    none = DSALTAttention(16, 2, n_min=2, n_max=4, k_lmk=0).eval()
    some = DSALTAttention(16, 2, n_min=2, n_max=4, k_lmk=8, landmark_block=4).eval()
    everything = DSALTAttention(16, 2, n_min=60, n_max=61, k_lmk=0).eval()
    with torch.no_grad():
        everything.q_proj.weight.zero_()
        assert _look(none, x)["landmark_share"] == 0.0
        assert 0.0 < _look(some, x)["landmark_share"] < 1.0
        uniform = sum(math.log(k + 1) for k in range(60)) / 60
        assert _look(everything, x)["attention_entropy"] == pytest.approx(uniform, rel=UNIFORM)
    padded = {"input_ids": x_ids, "attention_mask": torch.tensor([[0] * 4 + [1] * 5] * 4)}
    run = trainer(tmp_path, train=[padded], log_every=4)
    assert "window/0" in run.train() and same(run._sample, x_ids[:1, 4:8])
    packed = {"input_ids": x_ids[:1], "cu_seqlens": torch.tensor([0, 3, 9])}
    run = trainer(tmp_path, train=[packed], log_every=4)
    assert "window/0" in run.train() and same(run._sample, x_ids[:1, :3])
    quiet = trainer(tmp_path, log_every=4, health=False).train()
    assert not any("/" in key for key in quiet)
