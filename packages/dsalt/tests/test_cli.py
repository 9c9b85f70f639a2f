"""The command lines: a run, resuming, generating, and one line for everything that is wrong."""

from __future__ import annotations

import json
import math
import random
import signal

import pytest
import torch

from dsalt import _cli, _tokenizers, _tokens, training
from dsalt._cli import generation
from dsalt._cli import training as command_line
from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)

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
        "latest",
        "log.jsonl",
        "step-00000010",
        "step-00000020",
    ]
    last = at / "checkpoints/step-00000020"
    assert json.loads((last / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"
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
    tokenizer = _tokenizers.load_tokenizer(last)
    ids = model.generate(torch.tensor([tokenizer.encode("a")]), 5, temperature=0.0)
    assert capsys.readouterr().out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_a_text_is_shown_as_it_is_made(at, monkeypatch, capsys):
    assert train(f"--text text.txt {SMALL} --total-steps 1 --device cpu") == 0
    shown = []

    def step(self, token, add=generation._Continuation.add):
        add(self, token)
        shown.append(capsys.readouterr().out)

    monkeypatch.setattr(generation._Continuation, "add", step)
    capsys.readouterr()
    assert _cli.generate(["--prompt", "the ", "--max-new-tokens", "6", "--device", "cpu"]) == 0
    assert len(shown) == 6 and shown[0].startswith("the ")
    assert [len(part) for part in shown] == [5, 1, 1, 1, 1, 1]


class _Words:
    """As SentencePiece's: a token begins with a space, but not at the begin of a text."""

    def decode(self, ids):
        return (
            "".join(["\u2581the", "\u2581cat", "s"][i] for i in ids)
            .replace("\u2581", " ")
            .lstrip(" ")
        )


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "new", "parts"),
    [
        (_tokenizers.ByteTokenizer(), b"a", "é€b".encode(), ["", "é", "", "", "€", "b", ""]),
        (_tokenizers.ByteTokenizer(), b"a", "bé".encode()[:-1], ["b", "", "\ufffd"]),
        (_tokenizers.ByteTokenizer(), b"a", b"\xff\xffb", ["", "", "\ufffd\ufffdb", ""]),
        (_Words(), [0], [1, 2, 0], [" cat", "s", " the", ""]),
    ],
)
def test_what_a_token_adds_to_the_text(tokenizer, prompt, new, parts, capsys):
    shown, found = generation._Continuation(tokenizer, list(prompt)), []
    for token in new:
        shown.add(token)
        found.append(capsys.readouterr().out)
    shown.end()
    assert [*found, capsys.readouterr().out.removesuffix("\n")] == parts


def test_ctrl_c_saves_and_the_run_goes_on(at, monkeypatch, capsys):
    one_step = training.DSALTTrainer._one_step

    def interrupted(trainer):
        one_step(trainer)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)

    base = f"--text text.txt {SMALL} --device cpu --total-steps 6 --seed 4"
    assert train(f"{base} --save-dir whole") == 0
    before = signal.default_int_handler  # not so in a shell's background, where SIGINT is ignored
    inherited = signal.signal(signal.SIGINT, before)
    try:
        with monkeypatch.context() as m:
            m.setattr(training.DSALTTrainer, "_one_step", interrupted)
            assert train(f"{base} --save-dir broken") == 130
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)
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

    monkeypatch.setattr(command_line, "DSALTTrainer", catch)
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
    (at / "short.txt").write_text("at")
    (at / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(at.iterdir())
    assert train(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsalt-train: error: ") and line in error
    assert error.count("\n") == 1
    assert sorted(p for p in at.iterdir() if p.name != "checkpoints") == before


def test_an_old_run_is_neither_lost_nor_changed_by_mistake(at, capsys):
    base = f"--text text.txt {SMALL} --device cpu --save-every 2"
    assert train(f"{base} --total-steps 4") == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in at.rglob("*") if p.is_file()}
    for flags, line in (
        (f"{base} --total-steps 6", "holds checkpoints of another run (up to step 4)"),
        (f"{base} --total-steps 3 --resume", "`total_steps` must be at least step-00000004's 4"),
        (f"{base} --total-steps 6 --resume --n-max 5", "--n-max 5 (the checkpoint has 6)"),
        (f"{base} --total-steps 6 --resume --k-lmk 1", "--k-lmk 1 (the checkpoint has 2)"),
        (f"{base} --total-steps 6 --resume --save-dir checkpoint", "no such folder"),
        (f"{base} --total-steps 6 --resume chekpoints", "no checkpoint in chekpoints"),
        (f"{base} --total-steps 6 --resume --overwrite", "choose one"),
        (f"{base} --total-steps 6 --resume --tokenizer bytes", "--tokenizer bytes"),
    ):
        assert train(flags) == 2, flags
        error = capsys.readouterr().err.splitlines()
        assert line in error[-1] and sum("error: " in x for x in error) == 1, error
        assert {p: p.read_bytes() for p in at.rglob("*") if p.is_file()} == before
    for state in at.rglob("trainer.pt"):
        state.unlink()
    assert train(f"{base} --total-steps 6 --resume") == 2
    assert "step-00000004 has no trainer.pt" in capsys.readouterr().err
    assert train(f"{base} --total-steps 1 --overwrite") == 0
    assert [p.name for p in sorted((at / "checkpoints").glob("step-*"))] == ["step-00000001"]


@pytest.mark.thorough
def test_a_longer_run_keeps_its_warm_up_and_says_what_changes(at, capsys):
    base = f"--text text.txt {SMALL} --device cpu --log-every 1"
    assert train(f"{base} --total-steps 20") == 0  # two steps of warm-up
    assert train(f"{base} --total-steps 200 --resume") == 0
    error = capsys.readouterr().err
    assert "warning: the schedule has changed since the checkpoint (total_steps 20 -> 200)" in error
    rows = [json.loads(x) for x in (at / "checkpoints/log.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    almost_all = 0.95e-3  # of --lr: there is no second warm-up
    assert rates[21] > almost_all > rates[100] > rates[200]
    assert train(f"{base} --total-steps 200 --resume") == 0  # done: nothing to do, nothing to say
    assert "warning" not in capsys.readouterr().err


def test_time_early_stopping_best_and_average(at, capsys):
    base = f"--text text.txt {SMALL} --device cpu --total-steps 100000 --log-every 1"
    flags = "--max-time 0:01 --ema 0.9 --keep-best --val-every 5 --schedule wsd"
    assert train(f"{base} {flags}") == 0
    out = capsys.readouterr()
    assert "step 100000:" not in out.out and "--resume goes on" in out.err
    folder = at / "checkpoints" / (at / "checkpoints/best").read_text().strip()
    assert (folder / "ema/model.safetensors").is_file()
    for source in ("checkpoints", str(folder), str(folder / "ema")):
        assert _cli.generate(["--checkpoint", source, "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert (
        train(
            f"--text text.txt --seq-len 16 --quiet --device cpu --total-steps 2 "
            f"--init-from {folder} --n-max 5 --save-dir second"
        )
        == 0
    )
    shape = json.loads((at / "second/step-00000002/config.json").read_text())
    assert shape["n_max"] == 5 and shape["d_model"] == 16
    for wrong, line in (("-5", "expected"), ("1:2:3:4", "expected"), ("soon", "expected")):
        assert train(f"{base} --max-time={wrong}") == 2
        assert line in capsys.readouterr().err
    assert train(f"{base} --init-from nowhere --save-dir third") == 2
    assert "--init-from nowhere" in capsys.readouterr().err


def test_eval_is_the_mean_of_every_token_after_the_first(at, capsys):
    assert train(f"--text text.txt {SMALL} --device cpu --total-steps 3") == 0
    capsys.readouterr()
    (at / "other.txt").write_text(TEXT[100:170], encoding="utf-8")
    last = at / "checkpoints/step-00000003"
    model, tokenizer = DSALTLMHeadModel.from_pretrained(last), _tokenizers.load_tokenizer(last)
    ids = torch.tensor([tokenizer.encode(TEXT[100:170])])
    n = ids.shape[1] - 1

    def score(flags):
        words = f"--text other.txt --device cpu --json {flags}"
        assert _cli.evaluate(words.split()) == 0
        return json.loads(capsys.readouterr().out)

    whole = score("--seq-len 1000")
    loss = model(ids[:, :-1], labels=ids[:, 1:]).loss.item()
    assert whole["tokens"] == n and whole["bytes"] == len(TEXT[100:170].encode())
    assert whole["loss"] == pytest.approx(loss, abs=FLOAT32 / 2)
    assert whole["perplexity"] == pytest.approx(math.exp(loss), rel=FLOAT32 / 2)
    assert whole["bits_per_byte"] == pytest.approx(loss * n / math.log(2) / whole["bytes"])
    # pieces of 16; and one token at a time, each with the 16 before it
    logits = [model(ids[:, max(0, t + 1 - 16) : t + 1])[0, -1].log_softmax(-1) for t in range(n)]
    slow = -sum(float(row[ids[0, t + 1]].detach()) for t, row in enumerate(logits)) / n
    assert score("--seq-len 16 --stride 1")["loss"] == pytest.approx(slow, abs=FLOAT32 / 2)
    total = 0.0
    for start in range(0, n, 16):  # the last piece sees 16 tokens as well
        end = min(start + 16, n)
        begin = max(0, end - 16)
        rows = model(ids[:, begin:end])[0, start - begin :].log_softmax(-1)
        total -= float(rows.gather(1, ids[0, start + 1 : end + 1, None]).detach().sum())
    assert score("--seq-len 16")["loss"] == pytest.approx(total / n, abs=FLOAT32 / 2)
    assert _cli.evaluate("--text other.txt --device cpu".split()) == 0
    assert capsys.readouterr().out.startswith("loss ")
    (at / "one.txt").write_text("t")
    for flags, line in (
        ("--text one.txt", "has 1 tokens"),
        ("--text nowhere.txt", "No such file"),
        ("--text other.txt --seq-len 4 --stride 5", "leaves tokens out"),
        ("--text other.txt --checkpoint nowhere", "no model in nowhere"),
    ):
        assert _cli.evaluate(flags.split()) == 2
        error = capsys.readouterr().err
        assert line in error and error.startswith("dsalt-eval: error: ") and error.count("\n") == 1


def test_characters_that_the_tokenizer_cannot_write_are_named(at, capsys):
    base = f"--text text.txt {SMALL} --device cpu"
    (at / "few.txt").write_text(TEXT[:400] + "xéx")
    (at / "many.txt").write_text(TEXT[:400] + "xyzx" * 5)
    assert train(f"{base} --total-steps 1 --val-text few.txt") == 0
    error = capsys.readouterr().err
    assert "warning: --val-text: 2 of 403 characters are unknown to the tokenizer: 'x' (2)" in error
    again = f"{base} --total-steps 2 --resume"
    for flags in (
        f"{base} --total-steps 2 --save-dir other --val-text many.txt",
        again.replace("text.txt", "many.txt"),
    ):
        assert train(flags) == 2
        assert "'x' (10), 'y' (5), 'z' (5); more than 1 %" in capsys.readouterr().err
    few = ["--prompt", "the cat sat on " * 20 + "x", "--max-new-tokens", "2", "--device", "cpu"]
    assert _cli.generate(few) == 0
    assert "dsalt-generate: warning: --prompt: 1 of 301 characters" in capsys.readouterr().err
    assert _cli.generate(["--prompt", "Xthe", "--device", "cpu"]) == 2
    assert "'X' (1); more than 1 %" in capsys.readouterr().err
    assert _cli.evaluate(["--text", "many.txt", "--device", "cpu"]) == 2
    assert "dsalt-eval: error: --text: 20 of 420" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", [training.main, _cli.generate, _cli.evaluate])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        command(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "_" not in text.split("nproc_per_node")[0].replace("nproc_per_node", "")
    assert "default: None" not in text and max(map(len, text.splitlines())) <= 100


def test_tokenizers():
    text = "aé\n𝄞"
    for tokenizer in (_tokenizers.ByteTokenizer(), _tokenizers.CharTokenizer.of(text)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    assert _tokenizers.CharTokenizer.of("ab").decode([0, 1]) == "\ufffda"
    assert _tokenizers.CharTokenizer.of("ab").encode("bx") == [2, 0]


def test_token_dataset():
    data = _tokens.TokenDataset(torch.arange(10), 3)
    assert [tuple(map(torch.Tensor.tolist, pair)) for pair in data] == [
        ([0, 1, 2], [1, 2, 3]),
        ([3, 4, 5], [4, 5, 6]),
        ([6, 7, 8], [7, 8, 9]),
    ]
    assert len(_tokens.TokenDataset(torch.arange(9), 3)) == 2
    assert len(_tokens.TokenDataset(torch.arange(2), 3)) == 0
