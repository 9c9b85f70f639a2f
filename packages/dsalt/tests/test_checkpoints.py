"""Checkpoints of the trainer in one process: whole or absent, and resumed bit for bit."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dsalt import _checkpoint
from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer, main

from .runs import VOCAB, data, loader, logs, make, same, trainer


class Augmented(TensorDataset):
    """Draws from every generator while loading."""

    def __getitem__(self, index):
        (x,) = super().__getitem__(index)
        add = int(torch.randint(0, 3, ())) + random.randrange(3) + int(np.random.randint(3))
        return ((x + add) % VOCAB,)


@pytest.mark.parametrize(
    ("options", "workers", "at"),
    [
        ({"dtype": torch.bfloat16, "grad_accum": 2}, 0, 4),
        ({"dtype": torch.float32}, 0, 3),  # an epoch's end
        pytest.param(
            {"dtype": torch.float16, "window_reg_coef": 0.1}, 0, 5, marks=pytest.mark.thorough
        ),
        pytest.param({"dtype": torch.float32, "grad_accum": 2}, 2, 4, marks=pytest.mark.thorough),
    ],
)
def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path, options, workers, at):
    options = {**options, "total_steps": 8, "save_every": 1, "log_every": 3, "val_every": 2}

    def begin(name, **more):
        train = DataLoader(
            Augmented(data(12)),
            batch_size=4,
            shuffle=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(8) if workers else None,
        )
        model = make(dropout=0.2, tie_embeddings=True)
        folder = tmp_path / name
        return trainer(
            tmp_path, model, train, val_loader=loader(), save_dir=folder, **options, **more
        )

    whole = begin("whole", seed=11)
    whole.train()
    next_batches = [next(whole._stream)[0] for _ in range(5)]
    torch.manual_seed(999)  # what the new process happens to have
    again = begin("again", resume_from=tmp_path / f"whole/step-{at:08d}")
    assert again.step == at
    again.train()
    a = torch.load(tmp_path / "whole/step-00000008/trainer.pt", weights_only=True)
    b = torch.load(tmp_path / "again/step-00000008/trainer.pt", weights_only=True)
    for state in (a, b):
        state["last_logs"].pop("tokens_per_second")
        state.pop("run_id")
    assert same(a, b)
    assert same(dict(whole.model.state_dict()), dict(again.model.state_dict()))
    assert same([next(again._stream)[0] for _ in range(5)], next_batches)
    timeless = lambda rows: [  # noqa: E731
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows
    ]
    later = [row for row in logs(tmp_path / "whole") if row["step"] > at]
    assert timeless(logs(tmp_path / "again")) == timeless(later)


def test_what_lies_in_the_folder(tmp_path):
    run = trainer(tmp_path, total_steps=7, save_every=2, keep_last=2)
    run.train()
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["latest", "log.jsonl", "step-00000006", "step-00000007"]
    assert (tmp_path / "run/latest").read_text() == "step-00000007\n"
    last = tmp_path / "run/step-00000007"
    files = sorted(p.name for p in last.iterdir())
    assert files == ["config.json", "model.safetensors", "trainer.pt"]
    model = DSALTLMHeadModel.from_pretrained(last)
    assert torch.equal(model(data()).logits, run.model.eval()(data()).logits)


def test_latest_and_folders_to_resume_from(tmp_path):
    root = tmp_path / "run"
    for absent in ("latest", root, "nowhere"):
        with pytest.raises(FileNotFoundError, match="no checkpoint in .*: no such folder"):
            trainer(tmp_path, resume_from=absent)
    assert trainer(tmp_path, resume_from="auto").step == 0
    trainer(tmp_path, save_every=2).train()
    assert trainer(tmp_path, resume_from="auto", total_steps=6).step == 4
    assert trainer(tmp_path, resume_from="latest", total_steps=6).step == 4
    assert trainer(tmp_path, resume_from=root, total_steps=6).step == 4
    (root / "latest").write_text("step-00000002\n")
    assert trainer(tmp_path, resume_from="latest").step == 2
    (root / "latest").write_text("step-00000077\n")
    assert trainer(tmp_path, resume_from="latest").step == 4
    done = trainer(tmp_path, resume_from="latest")
    assert done.train()["step"] == 4
    with pytest.raises(FileNotFoundError):
        trainer(tmp_path, resume_from=tmp_path)
    with pytest.raises(ValueError, match="does not fit this model"):
        trainer(tmp_path, make(d_model=32), resume_from="latest")
    (root / "step-00000004/trainer.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"trainer\.pt is damaged"):
        trainer(tmp_path, resume_from=root / "step-00000004")


def contents(root):
    """Every file below, with its bytes."""
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("spoil", [None, "trainer.pt", "latest", "log.jsonl"])
def test_a_fresh_run_in_a_used_folder_is_refused(tmp_path, spoil):
    trainer(tmp_path, total_steps=4, save_every=2).train()
    root = tmp_path / "run"
    for path in root.rglob("*"):
        if path.name == spoil:
            path.unlink()
    before = contents(root)
    for options in ({}, {"resume_from": tmp_path / "other"}):
        if options:
            trainer(tmp_path, save_dir=tmp_path / "other", total_steps=1).train()
        fresh = trainer(tmp_path, total_steps=3, save_every=1, overwrite=False, **options)
        with pytest.raises(FileExistsError, match="another run.*resume.*overwrite=True"):
            fresh.train()
        with pytest.raises(FileExistsError, match="another run"):
            fresh.save()
        assert contents(root) == before
    trainer(tmp_path, total_steps=3, save_every=1, keep_last=2, overwrite=True).train()
    assert [step for step, _ in _checkpoint.steps(root)] == [2, 3]
    assert _checkpoint.latest(root).name == "step-00000003"
    assert [line["step"] for line in logs(root)] == [3]


def test_nothing_is_written_before_the_first_step(tmp_path):
    """To construct, to validate and to fail in the first step change no file."""
    root = tmp_path / "run"
    options = {"overwrite": False, "val_loader": loader()}
    trainer(tmp_path, **options).validate()
    assert not root.exists()

    class Fail:
        def __init__(self):
            self.folder = None

        def on_train_begin(self, trainer):
            self.folder = contents(root)
            raise RuntimeError("no")

    fail = Fail()
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, callbacks=[fail], **options).train()
    assert not root.exists() and set(map(str, fail.folder)) == {".lock"}
    trainer(tmp_path, save_every=2, log_every=1, **options).train()
    before = contents(root)
    for more in ({}, {"resume_from": "latest"}, {"resume_from": root / "step-00000002"}):
        trainer(tmp_path, **options, **more).validate()
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, callbacks=[fail], val_loader=loader(), overwrite=True).train()
    assert contents(root) == before


def test_weights_without_their_state_are_not_trained_over(tmp_path):
    trainer(tmp_path, total_steps=4, save_every=2).train()
    root = tmp_path / "run"
    for _, path in _checkpoint.steps(root):
        (path / "trainer.pt").unlink()
    before = contents(root)
    for resume_from in ("latest", "auto", root, root / "step-00000004"):
        with pytest.raises(FileNotFoundError, match=r"step-00000004 has no trainer\.pt"):
            trainer(tmp_path, resume_from=resume_from)
    assert contents(root) == before


def test_two_trainers_do_not_write_into_one_folder(tmp_path):
    """Neither in one process nor in two; a child of the first does not keep the folder."""
    import os

    root = tmp_path / "run"

    class Second:
        seen: tuple = ()

        def on_step_end(self, first):
            if first.step == 2:
                with pytest.raises(BlockingIOError, match="in use"):
                    trainer(tmp_path, overwrite=True).train()
                pid = os.fork()
                if pid == 0:
                    try:
                        trainer(tmp_path, overwrite=True).train()
                    except BlockingIOError as error:
                        os._exit(7 if str(first_process) in str(error) else 8)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

    first_process = os.getpid()
    trainer(tmp_path, callbacks=[Second()], save_every=1).train()
    assert _checkpoint.latest(root).name == "step-00000004"
    sleeper = None
    with _checkpoint.locked(root):
        sleeper = os.fork()
        if sleeper == 0:
            try:
                __import__("time").sleep(60)
            finally:
                os._exit(0)
    try:
        trainer(tmp_path, resume_from="latest", total_steps=5).train()
    finally:
        os.kill(sleeper, 9)
        os.waitpid(sleeper, 0)
    assert not (root / ".lock").exists()


def test_a_log_without_a_checkpoint_is_kept_aside(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "log.jsonl").write_text('{"step": 1}\n')
    trainer(tmp_path, overwrite=False).train()
    assert (root / "log.1.jsonl").read_text() == '{"step": 1}\n'
    assert [line["step"] for line in logs(root)] == [4]


def test_log_of_a_killed_run_is_cut_at_the_checkpoint(tmp_path):
    trainer(tmp_path, total_steps=4, save_every=2, log_every=1).train()
    path = tmp_path / "run/log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    before = path.read_text()
    run = trainer(tmp_path, total_steps=4, log_every=1, resume_from=tmp_path / "run/step-00000002")
    assert path.read_text() == before
    run.train()
    assert [line["step"] for line in logs(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("where", range(6))
def test_a_save_that_breaks_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, where):
    """The k-th rename or removal fails: what is found afterwards is whole, old or new."""
    root = tmp_path / "run"

    def fill(text):
        def write(folder):
            (folder / "trainer.pt").write_text(text)

        return write

    _checkpoint.write(root, 1, fill("old"), keep_last=1)
    calls = {"n": 0}

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*args, **kwargs):
            if calls["n"] == where:
                raise Killed
            calls["n"] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as m:
        m.setattr(_checkpoint, "recover", lambda folder: None)  # a killed process cannot clean up
        m.setattr(_checkpoint.Path, "rename", counted(_checkpoint.Path.rename))
        m.setattr(_checkpoint.os, "replace", counted(_checkpoint.os.replace))
        m.setattr(_checkpoint.shutil, "rmtree", counted(_checkpoint.shutil.rmtree))
        try:
            _checkpoint.write(root, 1, fill("new"), keep_last=1)
            _checkpoint.write(root, 2, fill("next"), keep_last=1)
        except Killed:
            pass
    _checkpoint.recover(root)
    found = _checkpoint.latest(root)
    assert (found / "trainer.pt").read_text() in ("old", "new", "next")
    assert all(p.name == "latest" or p.name.startswith("step-") for p in root.iterdir())
    _checkpoint.write(root, 3, fill("last"), keep_last=1)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000003"]


def test_a_full_disk_raises_and_leaves_no_temporary(tmp_path):
    def fill(folder):
        (folder / "trainer.pt").write_text("half")
        raise OSError(28, "No space left on device")

    _checkpoint.write(tmp_path, 1, lambda f: (f / "trainer.pt").write_text("ok"))
    with pytest.raises(OSError, match="No space"):
        _checkpoint.write(tmp_path, 2, fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("least", [64, 3_000, 30_000])
@pytest.mark.parametrize("how", ["api", "command"])
def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, capsys, least, how):
    """The limit on a file's size ends a write in the middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    import signal

    root = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 40)
    flags = (
        f"--text {text} --seq-len 8 --d-model 16 --n-layers 1 --n-heads 2 --n-min 2 --n-max 4 "
        f"--k-lmk 2 --device cpu --quiet --log-every 0 --save-dir {root} --save-every 2 "
    )
    if how == "api":
        trainer(tmp_path, save_every=2).train()
        run = trainer(tmp_path, resume_from="latest", total_steps=6)
    else:
        assert main([*flags.split(), "--total-steps", "4"]) == 0
    before = contents(root)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, limits[1]))
        if how == "api":
            with pytest.raises(OSError) as caught:
                run.train()
            assert "\n" not in str(caught.value)
        else:
            assert main([*flags.split(), "--total-steps", "8", "--resume", "--log-every", "9"]) == 1
            lines = capsys.readouterr().err.splitlines()
            assert [line for line in lines if "error" in line] == lines[-1:]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    after = contents(root)
    log = Path("log.jsonl")
    assert {k: v for k, v in after.items() if k != log} == {
        k: v for k, v in before.items() if k != log
    }
    assert after[log].startswith(before[log])
    assert trainer_goes_on(tmp_path, how, flags)


def trainer_goes_on(tmp_path, how, flags) -> bool:
    if how == "api":
        return trainer(tmp_path, resume_from="latest", total_steps=6).train()["step"] == 6
    return main([*flags.split(), "--total-steps", "8", "--resume"]) == 0


def test_saving_draws_no_random_numbers(tmp_path):
    run = trainer(tmp_path)
    run.train()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    run.save()
    assert torch.equal(before, torch.get_rng_state())


def test_documented_configuration_runs(tmp_path):
    """Every argument of the configuration block at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = DSALTTrainer(
            model=make(),
            train_loader=loader(),
            val_loader=loader(),
            lr=3e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            grad_accum=2,
            warmup_steps=2,
            total_steps=3,
            save_every=1,
            log_every=1,
            val_every=1,
            save_dir=str(tmp_path / "run"),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            ddp=False,
            fsdp=True,
            fsdp_cpu_offload=False,
            gradient_checkpointing=True,
            window_reg_coef=0.01,
        )
        run.train()
    assert run.step == 3
