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

from dsalt import _cli, _tokenizers, training
from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer
from shared_kernels.testing import others_thorough
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
DIFFERENT = 1e-3  # trained weights move the logits by more than this

pytestmark = pytest.mark.extras

TEXT = "the cat sat on a mat and saw é rat.\n" * 60
SMALL = "--seq-len 16 --d-model 16 --n-layers 1 --n-heads 2 --n-min 2 --n-max 6 --k-lmk 2 --quiet"


def trainer(folder, **options) -> DSALTTrainer:
    torch.manual_seed(0)
    model = DSALTLMHeadModel(20, 16, 1, 2, n_min=2, n_max=8, k_lmk=2)
    train = DataLoader(TensorDataset(torch.randint(0, 20, (12, 9))), batch_size=4)
    options = {"warmup_steps": 1, "total_steps": 4, "log_every": 1, "save_every": 2, **options}
    return DSALTTrainer(
        model,
        train,
        train,
        grad_accum=1,
        dtype=torch.float32,
        device="cpu",
        val_every=2,
        save_dir=folder,
        progress=False,
        **options,
    )


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
        tmp_path / "run",
        tensorboard=tmp_path / "board",
        resume_from=tmp_path / "run/step-00000002",
    )
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
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        | {"HOME": str(tmp_path)},
        check=False,
    )
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
                adapted(),
                train,
                grad_accum=1,
                dtype=torch.float32,
                device="cpu",
                lr=0.1,
                save_dir=tmp_path / name,
                progress=False,
                warmup_steps=1,
                total_steps=4,
                save_every=2,
                log_every=1,
                ema=ema,
                resume_from=start,
                seed=3,
            )
        )
        runs[-1].train()
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    last = tmp_path / "whole/step-00000004"
    plain = DSALTLMHeadModel.from_pretrained(last)
    expected = runs[0].model.eval()(x).logits
    assert not torch.allclose(expected, adapted().eval()(x).logits, atol=DIFFERENT)
    torch.testing.assert_close(plain(x).logits, expected, atol=FLOAT32 / 2, rtol=FLOAT32 / 2)
    base = DSALTLMHeadModel(20, 16, 1, 2, n_min=2, n_max=8, k_lmk=2, dropout=0.0)
    base.load_state_dict(adapted().unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, str(last / "adapter")).eval()
    torch.testing.assert_close(loaded(x).logits, expected, atol=FLOAT32 / 2, rtol=FLOAT32 / 2)
    if ema is not None:
        with runs[0]._average.swapped_in(runs[0].model):
            averaged = runs[0].model(x).logits
        found = DSALTLMHeadModel.from_pretrained(last / "ema")(x).logits
        torch.testing.assert_close(found, averaged, atol=FLOAT32 / 2, rtol=FLOAT32 / 2)


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
    ours = _tokenizers.FileTokenizer((tmp_path / "bpe.json").read_text(encoding="utf-8"))
    ids = ours.encode(TEXT)
    assert ours.decode(ids) == TEXT and len(ids) > 100
    assert ours.encode("é𝄞") and ours.decode(ours.encode("é𝄞")) == "é𝄞"
    assert not {0, 1, 2} & set(ids)
    assert ours.vocab_size == made.get_vocab_size() > max(ids)
    _tokenizers.save_tokenizer(ours, tmp_path)
    assert _tokenizers.load_tokenizer(tmp_path).encode(TEXT) == ids


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


def our_tokenizers():
    text = "the cat\tsaw é 𝄞\r\n日本 \u00a0x"
    return text, (_tokenizers.CharTokenizer.of(text), _tokenizers.ByteTokenizer())


def test_our_tokenizer_files_are_read_by_tokenizers_and_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    transformers = pytest.importorskip("transformers", reason="needs the optional transformers")
    text, made = our_tokenizers()
    for ours in made:
        folder = tmp_path / type(ours).__name__
        folder.mkdir()
        _tokenizers.save_tokenizer(ours, folder)
        path = str(folder / "tokenizer.json")
        theirs = tokenizers.Tokenizer.from_file(path)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.get_vocab_size() == fast.vocab_size == ours.vocab_size
        for case in (text, "a", "", "unknown: ŵ", "  two  spaces \n\n", "can't .stop ."):
            ids = ours.encode(case)
            assert theirs.encode(case).ids == ids
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
            for hf in (fast, auto):
                assert hf(case)["input_ids"] == ids
                kept = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
                assert hf.decode(ids, **kept) == ours.decode(ids)
        # what the library writes is ours again, without the library's help in reading it
        theirs.save(path)
        again = _tokenizers.load_tokenizer(folder)
        assert type(again) is type(ours) and again.encode(text) == ours.encode(text)


def test_a_run_gives_its_tokenizer_to_another(tmp_path, monkeypatch, capsys):
    tokenizer_file(tmp_path / "bpe.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, kind in (("chars", "chars"), ("bytes", "bytes"), ("bpe", "bpe.json")):
        flags = f"--text text.txt {SMALL} --device cpu --total-steps 1 --save-dir"
        assert training.main(f"{flags} {name} --tokenizer {kind}".split()) == 0
        given = f"{name}/step-00000001/tokenizer.json"
        assert training.main(f"{flags} {name}2 --tokenizer {given}".split()) == 0
        one, two = (tmp_path / f"{n}/step-00000001/tokenizer.json" for n in (name, f"{name}2"))
        assert json.loads(one.read_text()) == json.loads(two.read_text())
    capsys.readouterr()


def test_what_other_tokenizers_cannot_write_is_named(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = _tokenizers.read_tokenizer(words.to_str()).unknown("the dog cat")
    assert found == {"d": 1, "o": 1, "g": 1}
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))  # drops the rest
    assert _tokenizers.read_tokenizer(bare.to_str()).unknown("abzaz") == {"z": 2}
    tokenizer_file(tmp_path / "bpe.json")
    every = _tokenizers.read_tokenizer((tmp_path / "bpe.json").read_text(encoding="utf-8"))
    assert not every.unknown("é𝄞 \n anything")


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(tmp_path, monkeypatch, kind):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the optional tokenizers")
    from dsalt import _tokenize, _tokens

    tokenizer_file(tmp_path / "t.json")
    if kind == "metaspace":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        learn = tokenizers.trainers.BpeTrainer(
            vocab_size=60, special_tokens=["[SEP]", "[X]"], show_progress=False
        )
        made.train_from_iterator([TEXT, "x  indented\n\n"], learn)
        made.save(str(tmp_path / "t.json"))
    ours = _tokenizers.read_tokenizer((tmp_path / "t.json").read_text(encoding="utf-8"))
    text = "\n".join([TEXT, "  indented\n\n\n", "x" * 3000, TEXT])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(_tokens, "_PIECE", 700)
    monkeypatch.setattr(_tokenize, "_READ", 700)
    ids, _ = _tokens.encode_file(tmp_path / "text.txt", ours, len(text))
    assert ids.tolist() == ours.encode(text)
    monkeypatch.chdir(tmp_path)
    assert _tokenize.main("--text text.txt --tokenizer t.json --out o --quiet".split()) == 0
    assert _tokens.open_tokens(tmp_path / "o")[0][:].tolist() == ours.encode(text)
    # documents end with the tokenizer's own token
    (tmp_path / "d.jsonl").write_text('{"text": "the cat"}\n{"text": "rat"}\n')
    flags = "--text d.jsonl --tokenizer t.json --eos [SEP] --out d --quiet"
    assert _tokenize.main(flags.split()) == 0
    end = ours.token_id("[SEP]")
    expected = [*ours.encode("the cat"), end, *ours.encode("rat"), end]
    assert _tokens.open_tokens(tmp_path / "d")[0][:].tolist() == expected
    assert _tokens.read_meta(tmp_path / "d")["eos_id"] == end


# --- torchdata's StatefulDataLoader --------------------------------------------------------------


@pytest.mark.parametrize("workers", others_thorough(["0", "2", "1", "2 persistent"], plain=2))
@pytest.mark.parametrize(
    "kind", ["shuffle", "generator", "iterable", "own sampler", "own numbers", "state", "buffer"]
)
def test_stateful_loaders_go_on(kind, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    from dsalt import _loading

    from . import test_loading as t

    def make():
        options = dict(t.WORKERS[workers])
        if workers != "0":  # Python 3.14 sends a dataset, and PyTorch can send no torch.Generator
            options["multiprocessing_context"] = "fork"
        if kind == "iterable":
            return stateful.StatefulDataLoader(t.StatefulStream(), t.BATCH, **options)
        if kind == "buffer":
            return stateful.StatefulDataLoader(t.Shuffled(), t.BATCH, **options)
        if kind == "own sampler":
            return stateful.StatefulDataLoader(t.Plain(), t.BATCH, sampler=t.Lazy(), **options)
        if kind == "generator":
            options["generator"] = torch.Generator().manual_seed(8)
        dataset = {"own numbers": t.EpochNoise, "state": t.Stateful}.get(kind, t.Plain)()
        return stateful.StatefulDataLoader(dataset, t.BATCH, shuffle=True, **options)

    asked = type(_loading.BatchStream(make(), t.world()).source).__name__
    if kind == "buffer":
        assert asked == ("Replayed" if workers == "0" else "Stateful")
    else:
        assert asked == ("Stateful" if kind in ("iterable", "state") else "Indexed")
    if kind in ("shuffle", "generator", "own numbers", "state"):
        # torchdata seeds its sampler when the loader is made
        inner = make

        def make():
            torch.manual_seed(3)
            return inner()

    if kind == "buffer" and workers == "2 persistent":
        with pytest.raises(ValueError, match="cannot resume exactly: the iterable dataset lives"):
            t.compare(make, {t.N}, t.N + 2)
        return
    t.compare(make, {0, 3, 8, 11, 16}, 20)
    if kind == "shuffle" and workers == "0":
        loader = make()
        stream = _loading.BatchStream(loader, t.world())
        t.draw(stream, 5)
        state = t.written(stream.state_dict())
        loader = make()
        again = _loading.BatchStream(loader, t.world())
        again.load_state_dict(state)
        t.draw(again, 1)
        assert len(loader.dataset.read) == t.BATCH  # what was seen is not read
