"""The command lines: a run, resuming, generating, and one line for everything that is wrong."""

from __future__ import annotations

import json
import random
import signal

import pytest
import torch

from dsalt import _cli, _data, training
from dsalt.model import DSALTLMHeadModel

TEXT = " ".join(random.Random(0).choices("the cat sat on a mat and saw é rat".split(), k=900))
SMALL = "--seq_len 16 --d-model 16 --n_layers 1 --n_heads 2 --n-min 2 --n_max 6 --k_lmk 2 --quiet"


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def train(flags: str) -> int:
    return training.main(flags.split())


def test_train_resume_generate(at, capsys):
    base = f"--text text.txt {SMALL} --lr 1e-2 --save_every 10 --val-every 20 --device cpu"
    assert train(f"{base} --total_steps 20 --fsdp false --batch_size=4") == 0
    out = capsys.readouterr().out
    assert out.startswith("step 20: loss ") and "val_loss" in out
    assert sorted(p.name for p in (at / "checkpoints").iterdir()) == [
        "latest", "log.jsonl", "step-00000010", "step-00000020",
    ]  # fmt: skip
    last = at / "checkpoints/step-00000020"
    assert json.loads((last / "tokenizer.json").read_text())["kind"] == "chars"
    # a resumed run takes its model from the checkpoint; the flags of the model may be left out
    again = "--text text.txt --seq-len 16 --total-steps 25 --resume --quiet --device cpu"
    assert train(again) == 0
    assert capsys.readouterr().out.startswith("step 25: ")
    assert _cli.generate(["--prompt", "the ", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("the ") and len(written) == 4 + 12 + 1
    greedy = ["--checkpoint", str(last), "--prompt", "a", "--temperature", "0", "--device", "cpu"]
    assert _cli.generate([*greedy, "--max_new_tokens=5"]) == 0
    model = DSALTLMHeadModel.from_pretrained(last)
    tokenizer = _data.load_tokenizer(last)
    ids = model.generate(torch.tensor([tokenizer.encode("a")]), 5, temperature=0.0)
    assert capsys.readouterr().out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_ctrl_c_saves_and_the_run_goes_on(at, monkeypatch, capsys):
    one_step = training.DSALTTrainer._one_step

    def interrupted(trainer):
        one_step(trainer)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)

    base = f"--text text.txt {SMALL} --device cpu --total-steps 6 --seed 4"
    assert train(f"{base} --save-dir whole") == 0
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(training.DSALTTrainer, "_one_step", interrupted)
        assert train(f"{base} --save-dir broken") == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "--resume goes on" in capsys.readouterr().err
    assert (at / "broken/latest").read_text() == "step-00000003\n"
    assert train(f"{base} --save-dir broken --resume") == 0
    assert "6 steps, from step 3" in capsys.readouterr().err
    models = [
        DSALTLMHeadModel.from_pretrained(at / name / "step-00000006").state_dict()
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_flags_reach_the_trainer(at, monkeypatch):
    seen = {}

    class StopError(Exception):
        pass

    def catch(model, train_loader, val_loader, **options):
        seen.update(options, model=model.config, loader=train_loader)
        raise StopError

    monkeypatch.setattr(training, "DSALTTrainer", catch)
    with pytest.raises(StopError):
        train(
            f"--text text.txt {SMALL} --batch_size 3 --grad_accum 2 --fsdp true --dtype bfloat16 "
            "--fsdp_cpu_offload --ddp no --gradient-checkpointing --tie_embeddings --keep-last 2 "
            "--tokenizer bytes --dropout 0.2 --total-steps 50"
        )
    assert seen["fsdp"] and seen["fsdp_cpu_offload"] and seen["gradient_checkpointing"]
    assert not seen["ddp"] and not seen["progress"]
    assert seen["dtype"] == torch.bfloat16 and seen["grad_accum"] == 2 and seen["keep_last"] == 2
    assert seen["model"]["tie_embeddings"] and seen["model"]["dropout"] == 0.2
    assert seen["model"]["vocab_size"] == 256 and seen["model"]["n_max"] == 6
    assert seen["loader"].batch_size == 3 and seen["warmup_steps"] == 5


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "required: --text"),
        ("--text nowhere.txt", "--text nowhere.txt: No such file"),
        ("--text empty.txt", "--text empty.txt is empty"),
        ("--text binary.txt", "is not UTF-8 text"),
        ("--text .", "--text .: Is a directory"),
        ("--text text.txt --lr fast", "--lr: expected a number, got 'fast'"),
        ("--text text.txt --lr 0", "--lr: must be in (0, inf), got 0"),
        ("--text text.txt --batch_size 0", "--batch-size: must be at least 1, got 0"),
        ("--text text.txt --fsdp perhaps", "--fsdp: expected true or false, got 'perhaps'"),
        ("--text text.txt --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--text text.txt --colour red", "unrecognized arguments: --colour red"),
        ("--text text.txt --seq-len 99999", "--seq-len 99999 needs 100000"),
        ("--text text.txt --d_model 33 --seq_len 8", "`d_model` must be divisible by n_heads"),
        ("--text text.txt --n_min 9 --n_max 3", "n_min"),
        ("--text text.txt --device gpu", "gpu"),
        ("--text text.txt --device meta --seq_len 8", "`device` must be one that computes"),
        ("--text text.txt --ddp --fsdp", "choose one"),
        ("--text text.txt --seed 9223372036854775808", "--seed: must be at most 92233720368547758"),
        ("--text text.txt --val_text short.txt --seq_len 8", "2 tokens to validate on"),
        ("--text text.txt --resume nowhere", "no checkpoint in nowhere"),
        ("--text text.txt --tokenizer nowhere.json", "--tokenizer nowhere.json: No such file"),
        ("--text text.txt --save_dir text.txt", "--save-dir text.txt is not a folder"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(at, capsys, flags, line):
    (at / "empty.txt").write_text(" \n")
    (at / "short.txt").write_text("ab")
    (at / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(at.iterdir())
    assert train(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsalt-train: error: ") and line in error
    assert error.count("\n") == 1
    assert sorted(p for p in at.iterdir() if p.name != "checkpoints") == before


def test_a_checkpoint_of_another_shape(at, capsys):
    base = f"--text text.txt {SMALL} --total_steps 1 --device cpu"
    assert train(base) == 0
    capsys.readouterr()
    assert train(f"{base} --resume --d-model 32") == 2
    error = capsys.readouterr().err
    assert "does not fit this model" in error and error.count("\n") == 1


def _other_state(path):
    torch.save({"step": 3}, path)


@pytest.mark.parametrize(
    ("name", "spoil", "line"),
    [
        ("trainer.pt", lambda path: path.write_bytes(b""), "trainer.pt is damaged: EOFError"),
        ("trainer.pt", _other_state, "is not the state of a DSALTTrainer"),
        ("config.json", lambda path: path.write_bytes(b"\x00"), "config.json is not JSON"),
        ("config.json", lambda path: path.write_text("[1]"), "config.json is not a dsalt model"),
        ("config.json", lambda path: path.unlink(), "no config.json in"),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors"),
        ("tokenizer.json", lambda path: path.unlink(), "carries no tokenizer"),
    ],
)
def test_a_spoilt_checkpoint(at, capsys, name, spoil, line):
    base = f"--text text.txt {SMALL} --total_steps 1 --device cpu"
    assert train(base) == 0
    capsys.readouterr()
    spoil(at / "checkpoints/step-00000001" / name)
    commands = [(training.main, f"{base} --resume")]
    if name != "trainer.pt":  # dsalt-generate does not read it
        commands.append((_cli.generate, "--prompt a --device cpu"))
    for command, flags in commands:
        assert command(flags.split()) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


def test_generate_errors(at, capsys):
    for flags, line in (
        ("--checkpoint nowhere", "no model in nowhere"),
        ("--temperature -1", "--temperature: must be in [0, inf), got -1"),
        ("--top-p 0", "--top-p: must be in (0, 1], got 0"),
        ("--seed 9223372036854775808", "--seed: must be at most"),
    ):
        assert _cli.generate(flags.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith("dsalt-generate: error: ") and line in error
        assert error.count("\n") == 1
    DSALTLMHeadModel(9, 16, 1, 2, 2, 4, 2).save_pretrained(at / "bare")
    assert _cli.generate(["--checkpoint", "bare", "--device", "cpu"]) == 2
    assert "carries no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", [training.main, _cli.generate])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        command(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "_" not in text.split("nproc_per_node")[0].replace("nproc_per_node", "")
    assert "default: None" not in text and max(map(len, text.splitlines())) <= 100


def test_tokenizers():
    text = "aé\n𝄞"
    for tokenizer in (_data.ByteTokenizer(), _data.CharTokenizer.of(text)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    assert _data.CharTokenizer.of("ab").decode([0, 1]) == "\ufffda"
    assert _data.CharTokenizer.of("ab").encode("bx") == [2, 0]


def test_token_dataset():
    data = _data.TokenDataset(torch.arange(10), 3)
    assert [tuple(map(torch.Tensor.tolist, pair)) for pair in data] == [
        ([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([6, 7, 8], [7, 8, 9]),
    ]  # fmt: skip
    assert len(_data.TokenDataset(torch.arange(9), 3)) == 2
    assert len(_data.TokenDataset(torch.arange(2), 3)) == 0
