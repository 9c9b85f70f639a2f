"""The optional packages themselves: TensorBoard, SwanLab (offline) and Hugging Face tokenizers."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dsalt import _cli, _data, training
from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer

pytestmark = pytest.mark.extras

TEXT = "the cat sat on a mat and saw é rat.\n" * 60
SMALL = "--seq-len 16 --d-model 16 --n-layers 1 --n-heads 2 --n-min 2 --n-max 6 --k-lmk 2 --quiet"


def trainer(folder, **options) -> DSALTTrainer:
    torch.manual_seed(0)
    model = DSALTLMHeadModel(20, 16, 1, 2, n_min=2, n_max=8, k_lmk=2)
    train = DataLoader(TensorDataset(torch.randint(0, 20, (12, 9))), batch_size=4)
    options = {"warmup_steps": 1, "total_steps": 4, "log_every": 1, "save_every": 2, **options}
    return DSALTTrainer(
        model, train, train, grad_accum=1, dtype=torch.float32, device="cpu", val_every=2,
        save_dir=folder, progress=False, **options,
    )  # fmt: skip


def numbers(folder) -> set[tuple[str, int, float]]:
    """(name, step, value) of every number in the run's own log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(k, row["step"], float(v)) for row in rows for k, v in row.items() if k != "step"}


def test_tensorboard_holds_every_number_and_a_resumed_run_replaces_its_own(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the optional tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def written() -> dict[tuple[str, int], list[float]]:
        events = EventAccumulator(str(tmp_path / "board"), size_guidance={"scalars": 0})
        events.Reload()
        found: dict[tuple[str, int], list[float]] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault((tag, event.step), []).append(event.value)
        return found

    def check() -> None:
        found, expected = written(), numbers(tmp_path / "run")
        assert found.keys() == {(name, step) for name, step, _ in expected}
        for name, step, value in expected:
            single = torch.tensor(value, dtype=torch.float32).item()  # what an event holds
            assert found[name, step] == [single], (name, step)

    trainer(tmp_path / "run", tensorboard=tmp_path / "board").train()
    check()
    again = trainer(
        tmp_path / "run", tensorboard=tmp_path / "board",
        resume_from=tmp_path / "run/step-00000002",
    )  # fmt: skip
    again.lr = 1e-5  # other numbers than the first time
    again.train()
    check()


def test_tensorboard_keeps_what_a_broken_run_had(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the optional tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Break:
        def on_step_end(self, trainer):
            if trainer.step == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        trainer(tmp_path / "run", tensorboard=tmp_path / "board", callbacks=[Break()]).train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_wandb_offline_holds_the_settings_and_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the optional wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trainer(tmp_path / "run", wandb="dsalt-tests")
    run.train()
    again = trainer(tmp_path / "run", wandb="dsalt-tests", resume_from="latest", total_steps=6)
    again.train()
    assert again.run_id == run.run_id
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run.run_id}"))
    assert folders
    content = b"".join(p.read_bytes() for f in folders for p in f.rglob("*.wandb"))
    for name in ("val_loss", "grad_norm", "window/0", "model.n_max", "weight_decay"):
        assert name.encode() in content, name


@pytest.mark.parametrize("service", ["swanlab", "wandb"])
def test_a_service_that_does_not_start_is_one_line(tmp_path, service):
    pytest.importorskip(service, reason="needs the optional services")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = f"--text text.txt {SMALL} --device cpu --total-steps 1 --{service} x"
    hidden = ("SWANLAB_", "WANDB_")
    done = subprocess.run(
        [sys.executable, "-m", "dsalt.training", *words.split()],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
            "HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("dsalt-train: error: ")]
    assert len(lines) == 1 and f"{service} does not start" in lines[0]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_model_under_lora_is_saved_for_peft_and_without_it(tmp_path, ema):
    peft = pytest.importorskip("peft", reason="needs the optional peft")

    def adapted():
        torch.manual_seed(0)
        model = DSALTLMHeadModel(20, 16, 1, 2, n_min=2, n_max=8, k_lmk=2, dropout=0.0)
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "down"], lora_dropout=0.1)
        return peft.get_peft_model(model, options)

    x = torch.randint(0, 20, (2, 9))
    runs = []
    for name, start in (("whole", None), ("again", tmp_path / "whole/step-00000002")):
        torch.manual_seed(0)
        train = DataLoader(TensorDataset(torch.randint(0, 20, (12, 9))), batch_size=4)
        runs.append(
            DSALTTrainer(
                adapted(), train, grad_accum=1, dtype=torch.float32, device="cpu", lr=0.1,
                save_dir=tmp_path / name, progress=False, warmup_steps=1, total_steps=4,
                save_every=2, log_every=1, ema=ema, resume_from=start, seed=3,
            )
        )  # fmt: skip
        runs[-1].train()
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    last = tmp_path / "whole/step-00000004"
    plain = DSALTLMHeadModel.from_pretrained(last)
    expected = runs[0].model.eval()(x).logits
    assert not torch.allclose(expected, adapted().eval()(x).logits, atol=1e-3)
    torch.testing.assert_close(plain(x).logits, expected, atol=1e-5, rtol=1e-5)
    base = DSALTLMHeadModel(20, 16, 1, 2, n_min=2, n_max=8, k_lmk=2, dropout=0.0)
    base.load_state_dict(adapted().unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, str(last / "adapter")).eval()
    torch.testing.assert_close(loaded(x).logits, expected, atol=1e-5, rtol=1e-5)
    if ema is not None:
        with runs[0]._average.instead(runs[0].model):
            averaged = runs[0].model(x).logits
        found = DSALTLMHeadModel.from_pretrained(last / "ema")(x).logits
        torch.testing.assert_close(found, averaged, atol=1e-5, rtol=1e-5)


def test_swanlab_offline_holds_every_number(tmp_path, monkeypatch):
    pytest.importorskip("swanlab", reason="needs the optional swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path / "swan"))
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    trainer(tmp_path / "run", swanlab="dsalt-tests").train()
    (stored,) = (tmp_path / "swan").rglob("*.swanlab")
    content = stored.read_bytes()
    assert b"dsalt-tests" in content
    found = numbers(tmp_path / "run")
    assert {"loss", "lr", "val_loss"} <= {name for name, _, _ in found}
    for name, _, value in found:
        stored_value = struct.pack("<d", value) if value else b""  # a zero takes no bytes
        assert name.encode() in content and stored_value in content, (name, value)


def tokenizer_file(path):
    """A byte-level BPE that also asks for what a language model must not get."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    learn = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["[CLS]", "[SEP]", "[PAD]"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], learn)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    made.enable_truncation(8)
    made.enable_padding(length=8, pad_id=2, pad_token="[PAD]")
    made.save(str(path))
    return made


def test_tokenizer_file_encodes_the_text_alone(tmp_path):
    made = tokenizer_file(tmp_path / "bpe.json")
    ours = _data.FileTokenizer((tmp_path / "bpe.json").read_text(encoding="utf-8"))
    ids = ours.encode(TEXT)
    assert ours.decode(ids) == TEXT and len(ids) > 100
    assert ours.encode("é𝄞") and ours.decode(ours.encode("é𝄞")) == "é𝄞"
    assert not {0, 1, 2} & set(ids)
    assert ours.vocab_size == made.get_vocab_size() > max(ids)
    _data.save_tokenizer(ours, tmp_path)
    assert _data.load_tokenizer(tmp_path).encode(TEXT) == ids


def test_train_resume_and_generate_with_a_tokenizer_file(tmp_path, monkeypatch, capsys):
    tokenizer_file(tmp_path / "bpe.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = f"--text text.txt --tokenizer bpe.json {SMALL} --device cpu --lr 1e-2"
    assert training.main([*flags.split(), "--total-steps", "30"]) == 0
    (tmp_path / "bpe.json").unlink()  # the checkpoint carries it
    assert training.main([*flags.split(), "--total-steps", "40", "--resume"]) == 0
    capsys.readouterr()
    words = ["--prompt", "the cat", "--max-new-tokens", "6", "--temperature", "0"]
    assert _cli.generate([*words, "--device", "cpu"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("the cat") and len(written) > len("the cat\n")
    assert "[SEP]" not in written and "\ufffd" not in written


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert training.main(["--text", "text.txt", "--tokenizer", "text.txt"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsalt-train: error: --tokenizer text.txt: not a tokenizer file")
    assert error.count("\n") == 1
