"""The trainer in one process: arithmetic of a step, data forms, logs, checkpoints, exact resume."""

from __future__ import annotations

import doctest
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dsalt import _checkpoint, _data, _trainer
from dsalt import model as model_module
from dsalt._optimizer import decay_groups
from dsalt.training import DSALTTrainer, TrainerCallback
from shared_kernels.testing.tolerances import tolerance

from .runs import VOCAB, data, loader, logs, make, same, trainer

FLOAT32 = tolerance(torch.float32)
ROUNDING32 = tolerance(torch.float32, "rounding")


def test_examples_in_docstrings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, least in ((_trainer, 4), (model_module, 2)):
        failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
        assert tried >= least and not failed


# --- the arithmetic of a step --------------------------------------------------------------------


def test_it_is_the_loop_one_would_write(tmp_path):
    """Warm-up, cosine, decay groups, clipping and next-token targets, against a plain loop."""
    run = trainer(tmp_path, total_steps=7, warmup_steps=3, max_grad_norm=0.3, weight_decay=0.5)
    run.train()
    model, step = make(), 0
    decayed = [p for p in model.parameters() if p.ndim == 2]
    decayed = [p for p in decayed if p is not model.embedding.weight]
    plain = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    while step < 7:
        for (x,) in loader():
            if step == 7:
                break
            lr = 1e-2 * (step + 1) / 3
            if step >= 3:
                lr = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 4)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            model(x[:, :-1], labels=x[:, 1:]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for a, b in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=ROUNDING32, rtol=FLOAT32 / 2)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_region_of_autocast_around_it_changes_nothing(tmp_path, dtype, options):
    """Such a region keeps its casts of the weights, whatever becomes of the weights; off, too."""
    found = []
    regions = [nullcontext(), *(torch.autocast("cpu", torch.bfloat16, x) for x in (True, False))]
    for region in regions:
        val = {"val_loader": loader(), "val_every": 1, "health": False}
        run = trainer(tmp_path, total_steps=3, dtype=dtype, **val, **options)
        with region:
            run.train()
        found.append((run.model.state_dict(), run.last_logs["val_loss"]))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_shuffled_order_is_the_loaders_own(tmp_path):
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Embedding(VOCAB, VOCAB)

        def forward(self, x):
            seen.append(x.clone())
            return self.head(x)

    train = loader(shuffle=True)
    torch.manual_seed(5)
    expected = [x[:, :-1] for _ in range(2) for (x,) in train]
    model = Watch()
    torch.manual_seed(5)
    trainer(tmp_path, model, train, total_steps=6).train()
    assert same(seen, expected)


def test_accumulation_weights_by_valid_tokens(tmp_path):
    """Two micro-batches of 4 with unequal padding give the step of one batch of 8."""
    y = data(8)
    y[:3, 2:] = -100
    y[5, :] = -100
    pairs = TensorDataset(data(8, seed=4), y)
    results = []
    for batch_size, grad_accum in ((8, 1), (4, 2), (2, 4)):
        run = trainer(
            tmp_path,
            make(),
            DataLoader(pairs, batch_size=batch_size),
            grad_accum=grad_accum,
            total_steps=3,
            window_reg_coef=0.0,
        )
        results.append((run.train()["loss"], [p.detach().clone() for p in run.model.parameters()]))
    for loss, parameters in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=ROUNDING32)
        for a, b in zip(parameters, results[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=FLOAT32, rtol=5 * FLOAT32)


def test_a_step_without_valid_labels_changes_nothing_but_decay(tmp_path):
    model, ids = make(), data(4)
    none = (ids, torch.full((4, 9), -100))
    start, states = [p.detach().clone() for p in model.parameters()], []

    class Watch:
        def on_step_end(self, trainer):
            states.append([p.detach().clone() for p in trainer.model.parameters()])

    train = [none, none, (ids, data(4, seed=4))]
    options = {"weight_decay": 0.0, "total_steps": 3, "log_every": 1}
    trainer(tmp_path, model, train, callbacks=[Watch()], **options).train()
    assert same(states[0], start) and same(states[1], start) and not same(states[2], start)
    lines = logs(tmp_path / "run")
    assert [line["loss"] is None for line in lines] == [True, True, False]
    assert [line["tokens"] for line in lines] == [0, 0, 36]


def _no_labels():
    return [(data(4), torch.full((4, 9), -100))] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "train",
    [
        _no_labels(),
        [data(4, 1)] * 3,
        [{"input_ids": data(4), "attention_mask": torch.eye(4, 9)}] * 3,
        [{"input_ids": data(1, 5), "cu_seqlens": torch.arange(6)}] * 3,
    ],
    ids=["-100", "one token", "one token and padding", "packed single tokens"],
)
@pytest.mark.parametrize("total_steps", [2, 200])
def test_data_without_a_label_that_counts_is_an_error(tmp_path, train, dtype, total_steps):
    run = trainer(tmp_path, train=train, total_steps=total_steps, dtype=dtype)
    with pytest.raises(ValueError, match="yield labels that count in the loss"):
        run.train()
    assert not _checkpoint.steps(tmp_path / "run")


def test_window_regulariser_moves_the_windows(tmp_path):
    lengths = {}
    for coef in (0.0, 3.0):
        model = make(window_reg="length")
        run = trainer(tmp_path, model, window_reg_coef=coef, total_steps=20, max_grad_norm=None)
        run.train()
        lengths[coef] = float(model.eval()(data()).window_reg.detach())
    assert lengths[3.0] < 0.8 * lengths[0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_used_and_learns(tmp_path, dtype):
    used = set()
    model = make()
    model.lm_head.register_forward_hook(lambda m, args, out: used.add(out.dtype))
    first = trainer(tmp_path, total_steps=1).train()["loss"]
    logs = trainer(tmp_path, model, dtype=dtype, total_steps=25).train()
    assert used == {dtype}
    assert logs["loss"] < first - 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    results = []
    for on in (False, True):
        run = trainer(tmp_path, make(dropout=0.3), gradient_checkpointing=on, seed=1)
        run.train()
        assert run.model.transformer.gradient_checkpointing == on
        results.append(list(run.model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=ROUNDING32, rtol=FLOAT32 / 2)


def test_each_block_is_recomputed_once_and_in_training_only(tmp_path):
    for on, times in ((False, 1), (True, 2)):
        model = make(n_layers=2, gradient_checkpointing=on)
        calls: list[int] = []
        for i, block in enumerate(model.transformer.blocks):
            block.register_forward_pre_hook(lambda m, args, i=i, calls=calls: calls.append(i))
        model(data(), labels=data()).loss.backward()
        assert sorted(calls) == sorted([0, 1] * times)
        calls.clear()
        model.eval()(data(), labels=data()).loss.backward()
        assert calls == [0, 1]


def test_a_float16_step_that_overflows_is_left_out(tmp_path):
    """The scale is halved and no weight moves; the next steps are taken."""
    model, seen, overflow = make(), [], {1}

    class Watch:
        def on_step_end(self, trainer):
            seen.append((trainer.scaler.get_scale(), model.lm_head.weight.detach().clone()))

    run = trainer(tmp_path, model, dtype=torch.float16, total_steps=3, callbacks=[Watch()])
    before = model.lm_head.weight.detach().clone()
    scale = run.scaler.get_scale()
    assert run.scaler.is_enabled() and scale > 1
    model.lm_head.weight.register_hook(
        lambda grad: grad * math.inf if len(seen) in overflow else None
    )
    run.train()
    assert [s for s, _ in seen] == [scale, scale / 2, scale / 2]
    assert not torch.equal(seen[0][1], before)
    assert torch.equal(seen[1][1], seen[0][1])
    assert not torch.equal(seen[2][1], seen[1][1]) and bool(seen[2][1].isfinite().all())
    saved = torch.load(tmp_path / "run/step-00000003/trainer.pt", weights_only=True)
    assert saved["scaler"]["scale"] == scale / 2


def test_decay_groups():
    model = make(tie_embeddings=True, bias=True)
    decay, rest = decay_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    free = {names[id(p)] for p in rest["params"]}
    assert "embedding.weight" in free and not decayed & free
    assert "transformer.blocks.0.attention.q_proj.weight" in decayed
    assert all("bias" in n or "norm" in n or n == "embedding.weight" or "scorer" in n for n in free)
    assert len(decayed | free) == len(names)


# --- what may be trained on ----------------------------------------------------------------------


def test_batch_forms():
    x = data(2, 5)
    shifted = (x[:, :-1], x[:, 1:])
    for item in (x, (x,), [x], {"input_ids": x}):
        batch = _data.as_batch(item)
        assert same(tuple(batch)[:2], shifted) and not batch.extras
    y = data(2, 5, seed=9)
    for item in ((x, y), [x, y], {"input_ids": x, "labels": y}):
        assert same(tuple(_data.as_batch(item))[:2], (x, y))
    assert same(tuple(_data.as_batch((x, x), shift_labels=True))[:2], shifted)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = _data.as_batch({"input_ids": x, "attention_mask": mask})
    assert batch.valid() == 6 and batch.extras["attention_mask"].shape == (2, 4)
    assert _data.as_batch({"input_ids": x, "attention_mask": mask.flip(1)}).valid() == 6
    batch = _data.as_batch({"input_ids": x, "labels": y, "attention_mask": mask})
    assert batch.valid() == 8
    packed = {"input_ids": x[:1], "cu_seqlens": torch.tensor([0, 2, 5])}
    batch = _data.as_batch(packed)
    assert (batch.labels == -100).tolist() == [[False, True, False, False, True]]
    assert same(x, data(2, 5))
    for bad in ("text", (x, x, x), {"ids": x}, x.float(), x[0]):
        with pytest.raises((TypeError, ValueError), match="`batch` must"):
            _data.as_batch(bad)


def test_loaders_of_other_kinds(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data())

    for train in ([data(4), data(4)], DataLoader(Stream(), batch_size=3)):
        assert trainer(tmp_path, train=train).train()["step"] == 4
    with pytest.raises(ValueError, match="`train_loader` must yield at least one batch"):
        trainer(tmp_path, train=[]).train()
    with pytest.raises(ValueError, match="`train_loader` must yield at least one batch"):
        trainer(tmp_path, train=iter([(data(4),)])).train()


def test_labels_that_equal_the_inputs_are_pointed_out(tmp_path):
    x = data(4)
    with pytest.warns(UserWarning, match="learns to copy"):
        trainer(tmp_path, train=[(x, x)], total_steps=3).train()


@pytest.mark.parametrize("kind", ["logits", "tuple"])
def test_any_module_that_gives_logits_or_a_loss(tmp_path, kind):
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids, **labels):
            logits = self.table(input_ids)
            if kind == "logits":
                return logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten()), 0

    torch.manual_seed(0)
    model = Bigram()
    first = trainer(tmp_path, model, total_steps=1, warmup_steps=0).train()["loss"]
    folder = tmp_path / "run/step-00000030"
    last = trainer(tmp_path, model, total_steps=30, lr=0.1).train()["loss"]
    assert last < first - 0.5
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "trainer.pt"]


# --- validation, logs, callbacks -----------------------------------------------------------------


def test_validation_is_exact_and_changes_nothing(tmp_path):
    x = data(10)
    metrics = lambda model, ids: {"rows": ids.shape[0], "noise": torch.rand(1)}  # noqa: E731
    options = {"seed": 3, "total_steps": 4, "log_every": 1}
    bare = trainer(tmp_path / "a", make(dropout=0.4), loader(shuffle=True), **options)
    bare.train()
    val = loader(x, shuffle=True, batch_size=4)
    run = trainer(
        tmp_path / "b",
        make(dropout=0.4),
        loader(shuffle=True),
        val_loader=val,
        val_every=1,
        compute_metrics_fn=metrics,
        **options,
    )
    result = run.train()
    assert same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    assert run.model.training
    exact = run.model.eval()(x[:, :-1], labels=x[:, 1:]).loss.detach()
    assert result["val_loss"] == pytest.approx(float(exact), abs=FLOAT32 / 2)
    assert result["val_perplexity"] == pytest.approx(math.exp(float(exact)), rel=5 * FLOAT32)
    assert result["rows"] == 4 and "noise" in result
    lines = logs(tmp_path / "b/run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [1, 2, 3, 4]
    assert isinstance(lines[-1]["noise"], float)
    few = trainer(tmp_path, val_loader=loader(x), max_val_batches=1).validate()["val_loss"]
    start = make()(x[:4, :-1], labels=x[:4, 1:]).loss.item()
    assert few == pytest.approx(start, abs=FLOAT32 / 2)


def test_log_line(tmp_path):
    run = trainer(tmp_path, log_every=2, total_steps=6, lr=1e-3)
    run.train()
    lines = logs(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["lr"] == run.learning_rate(1) == 1e-3
    assert lines[-1]["tokens"] == 6 * 4 * 8
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
    layer = {"window/0", "landmark_share/0", "attention_entropy/0"}
    assert keys | layer | {"window_reg"} == set(lines[0])


def test_callbacks_are_called_and_may_stop(tmp_path):
    calls = []

    class Watch(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                calls.append(name)
            return super().__getattribute__(name)

        def on_step_end(self, trainer):
            if trainer.step == 3:
                trainer.stop()

    run = trainer(
        tmp_path, total_steps=9, callbacks=[Watch(), object()], val_loader=loader(), log_every=2
    )
    assert run.train()["step"] == 3
    steps = ["on_step_end", "on_step_end", "on_log", "on_step_end"]
    end = ["on_log", "on_validation", "on_checkpoint", "on_train_end"]
    assert calls == ["on_train_begin", *steps, *end]
    assert _checkpoint.latest(tmp_path / "run").name == "step-00000003"
    assert run.train()["step"] == 9  # goes on where it stopped


def test_monitors_are_extras(tmp_path, monkeypatch):
    for name in ("swanlab", "torch.utils.tensorboard"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'dsalt\[monitoring\]'"):
        trainer(tmp_path, tensorboard=tmp_path / "tb")
    with pytest.raises(ImportError, match=r"pip install 'dsalt\[monitoring\]'"):
        trainer(tmp_path, swanlab="project")


def test_monitors_get_every_number(tmp_path, monkeypatch):
    import sys
    import types

    got = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *a: got.append(("tb", *a)),
        add_text=lambda name, table, step: got.append(("text", table)),
        flush=lambda: got.append("flushed"),
        close=lambda: got.append("closed"),
    )
    board = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name in ("swanlab", "wandb"):
        service = types.SimpleNamespace(
            init=lambda name=name, **settings: got.append((name, settings)),
            log=lambda values, step, name=name: got.append((name, step, *values)),
            finish=lambda name=name: got.append((name, "finished")),
        )
        monkeypatch.setitem(sys.modules, name, service)
    services = {"swanlab": "mine", "wandb": "ours"}
    run = trainer(tmp_path, tensorboard=tmp_path / "tb", total_steps=1, **services)
    run.train()
    assert all(done in got for done in ("flushed", "closed"))
    assert ("tb", "lr", 0.01, 1) in got
    (table,) = (g[1] for g in got if g[0] == "text")
    assert "| lr | 0.01 |" in table and "| model.n_max | 8 |" in table
    for name, project in services.items():
        settings, *lines, end = (g[1:] for g in got if g[0] == name)
        (settings,) = settings
        assert settings["project"] == project and settings["id"] == run.run_id
        assert settings["config"]["lr"] == 0.01 and settings["config"]["model.n_max"] == 8
        assert any("loss" in line for line in lines) and end == ("finished",)
    again = trainer(tmp_path, total_steps=2, resume_from="latest", wandb="ours")
    again.train()
    assert got[-1] == ("wandb", "finished")
    assert [g[1]["id"] for g in got if g[0] == "wandb" and isinstance(g[1], dict)] == [
        run.run_id,
        run.run_id,
    ]
    assert trainer(tmp_path).run_id != run.run_id


def test_a_gradient_that_is_not_finite_ends_the_run_unsaved(tmp_path):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    before = model.embedding.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        trainer(tmp_path, model).train()
    assert torch.equal(model.embedding.weight, before)
    assert not _checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be positive"),
        ({"min_lr_ratio": 2.0}, "`min_lr_ratio` must be in"),
        ({"total_steps": 0, "warmup_steps": 0}, "`(warmup|total)_steps` must be at least"),
        ({"grad_accum": 0}, "`grad_accum` must be at least 1"),
        ({"keep_last": 0}, "`keep_last` must be at least 1"),
        ({"dtype": torch.int8}, "`dtype` must be one of"),
        ({"ddp": True, "fsdp": True}, "not both"),
        ({"fsdp_cpu_offload": True}, "`fsdp_cpu_offload` must come with fsdp=True"),
        ({"model": 3}, "`model` must be a torch.nn.Module"),
        ({"resume_from": "/nowhere"}, "no checkpoint in /nowhere"),
        ({"device": "cuda:77"}, "`device` must be a device of this machine|`device`|ordinal"),
    ],
)
def test_errors(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError, RuntimeError), match=message):
        trainer(tmp_path, **options)


def test_defaults_and_a_warm_up_that_never_ends(tmp_path):
    with pytest.warns(UserWarning, match="never reaches"):
        run = DSALTTrainer(make(), loader(), total_steps=400, save_dir=tmp_path)
    assert (run.lr, run.weight_decay, run.max_grad_norm, run.grad_accum) == (3e-4, 0.1, 1.0, 2)
    assert (run.warmup_steps, run.save_every, run.log_every, run.val_every) == (500, 1000, 50, 500)
    assert run.dtype == torch.bfloat16 and run.window_reg_coef == 0
