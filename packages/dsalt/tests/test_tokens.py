"""Token files: layouts, windows, the command that makes them, killed and begun again, memory."""

from __future__ import annotations

import json
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dsalt import _cli, _tokenize, _tokenizers, _tokens, training

IDS = np.random.default_rng(0).integers(0, 60_000, 1000).astype("<u2")
SMALL = "--seq-len 16 --d-model 16 --n-layers 1 --n-heads 2 --n-min 2 --n-max 6 --k-lmk 2 --quiet"


def lay(folder, layout):
    """The same 1000 tokens in every layout; the path to give."""
    folder.mkdir(exist_ok=True)
    if layout == "raw":
        IDS.tofile(folder / "tokens.bin")
        return folder / "tokens.bin", None
    if layout == "uint32":
        IDS.astype("<u4").tofile(folder / "tokens.bin")
        return folder / "tokens.bin", "uint32"
    if layout == "nanogpt":
        IDS.tofile(folder / "train.bin")
        IDS[:100].tofile(folder / "val.bin")
        return folder, None
    if layout == "shards":
        for i, part in enumerate((IDS[:1], IDS[1:400], IDS[400:400], IDS[400:])):
            part.tofile(folder / f"shard-{i:05d}.bin")
        (folder / "meta.json").write_text('{"dtype": "uint16"}')
        return folder, None
    if layout == "litgpt":
        for i, part in enumerate((IDS[:500], IDS[500:])):
            head = b"LITPKDS" + struct.pack("<QBQ", 1, 8, 500)
            (folder / f"train_{i}.bin").write_bytes(head + part.tobytes())
        return folder, None
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, len(IDS)
    (folder / "edu.bin").write_bytes(head.tobytes() + IDS.tobytes())
    return folder / "edu.bin", None


@pytest.mark.parametrize("layout", ["raw", "uint32", "nanogpt", "shards", "litgpt", "llm.c"])
def test_layouts_and_windows(tmp_path, layout):
    path, kind = lay(tmp_path / "data", layout)
    train, val = _tokens.open_tokens(path, kind)
    assert len(train) == 1000 and train[:].tolist() == IDS.tolist()
    assert (val is None) == (layout != "nanogpt")
    assert train.largest() == IDS.max()
    assert train[395:405].tolist() == IDS[395:405].tolist() and len(train[7:7]) == 0
    again = pickle.loads(pickle.dumps(train))
    assert len(pickle.dumps(train)) < 1000 and again[:].tolist() == IDS.tolist()
    data = _tokens.TokenDataset(train, 7)
    assert len(data) == 142
    joined = torch.cat([data[i][0] for i in range(len(data))])
    assert joined.tolist() == IDS[: 142 * 7].tolist() and joined.dtype == torch.int64
    assert all(torch.equal(x[1:], y[:-1]) for x, y in (data[i] for i in range(len(data))))
    part = _tokens.TokenDataset(train, 7, 500, 520)
    assert [x.tolist() for x, _ in (part[0], part[1])] == [
        IDS[500:507].tolist(),
        IDS[507:514].tolist(),
    ] and len(part) == 2
    # begins anywhere, and everywhere at last
    anywhere = _tokens.TokenDataset(train, 7, 500, 520, random=True)
    torch.manual_seed(0)
    starts = {tuple(anywhere[0][0].tolist()) for _ in range(300)}
    assert starts == {tuple(IDS[i : i + 7].tolist()) for i in range(500, 513)}
    loader = DataLoader(data, batch_size=4, num_workers=1)
    assert next(iter(loader))[0].tolist() == IDS[:28].reshape(4, 7).tolist()


def test_wrong_token_files(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        _tokens.open_tokens(tmp_path / "nowhere.bin")
    with pytest.raises(ValueError, match=r"holds no \.bin file"):
        _tokens.open_tokens(tmp_path)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes, which is no number of uint16 tokens"):
        _tokens.open_tokens(tmp_path / "odd.bin")
    (tmp_path / "lit.bin").write_bytes(b"LITPKDS" + struct.pack("<QBQ", 1, 6, 10))
    with pytest.raises(ValueError, match="type 6, which holds no token ids"):
        _tokens.open_tokens(tmp_path / "lit.bin")
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, 99
    (tmp_path / "llmc.bin").write_bytes(head.tobytes() + b"ab")
    with pytest.raises(ValueError, match="promises 99 tokens"):
        _tokens.open_tokens(tmp_path / "llmc.bin")
    data = _tokens.TokenDataset(IDS, 7, vocab_size=50)
    with pytest.raises(ValueError, match="the vocabulary has 50 ids; is it the data of another"):
        data[0]


@pytest.mark.parametrize("place", ["file", "shards", "val"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (IDS.astype("<u4").tobytes(), r"more than 16 bits: say --data-type"),
        (IDS.astype("<i8").tobytes(), r"more than 16 bits: say --data-type"),
        ((IDS + np.uint32(70_000)).astype("<u4").tobytes(), r"more than 16 bits"),
        ("the cat sat, é\n".encode() * 64, "seems to be a text: dsalt-tokenize"),
        (b"\x93NUMPY\x01\x00v\x00" + b" " * 118 + IDS.tobytes(), "numpy's format"),
        (b"", "holds no tokens"),
    ],
)
def test_what_is_no_uint16_token_file_is_refused(tmp_path, content, line, place):
    name = {"file": "tokens.bin", "shards": "shard-1.bin", "val": "val.bin"}[place]
    if place == "val":
        IDS.tofile(tmp_path / "train.bin")
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if place == "file" else tmp_path
    with pytest.raises(ValueError, match=line):
        _tokens.open_tokens(path)
    if "16 bits" in line:
        assert len(_tokens.open_tokens(path, "uint16")[0]) >= 1000  # as the user says


@pytest.mark.parametrize("top", [10, 200, 3000, 65_000])
def test_what_is_one_is_not_doubted(tmp_path, top):
    ids = np.random.default_rng(1).integers(0, top, 5000).astype("<u2")
    ids.tofile(tmp_path / "tokens.bin")
    assert _tokens.open_tokens(tmp_path / "tokens.bin")[0][:].tolist() == ids.tolist()


def test_targets_behind_a_document_can_be_left_out():
    ids = np.array([5, 6, 0, 7, 8, 0, 9], "<u2")
    x, y = _tokens.TokenDataset(ids, 6, eos=0)[0]
    assert x.tolist() == [5, 6, 0, 7, 8, 0] and y.tolist() == [6, 0, -100, 8, 0, -100]


def tokenize(flags):
    return _tokenize.main(flags.split() if isinstance(flags, str) else flags)


DOCUMENTS = ["the cat\nsat", "", "on é𝄞 a mat", "x" * 5000, "the end\n"]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "\n--\n".join(DOCUMENTS).encode())
    return tmp_path


def test_texts_and_json_lines(texts, capsys):
    assert tokenize("--text a.jsonl b.txt --out out --shard-tokens 3000 --quiet") == 0
    output = capsys.readouterr()
    assert "no end-of-text token" in output.err and "6 documents in out" in output.out
    train, _ = _tokens.open_tokens(texts / "out")
    expected = "".join(DOCUMENTS).encode() + "\n--\n".join(DOCUMENTS).encode()
    assert bytes(train[:].astype(np.uint8)) == expected  # the byte order mark is no token
    sizes = [p.stat().st_size for p in sorted((texts / "out").glob("*.bin"))]
    assert sizes == [6000, 6000, 6000, 2 * (len(expected) - 9000)]
    assert not (texts / "out/progress.json").exists()
    assert tokenize("--text a.jsonl b.txt --out out --shard-tokens 3000 --quiet") == 0
    assert "complete already" in capsys.readouterr().err
    assert tokenize("--text a.jsonl --out out --quiet") == 2
    assert "made with another --text, --shard-tokens" in capsys.readouterr().err
    assert tokenize(["--text", "b.txt", "--out", "two", "--separator", "\n--\n", "--quiet"]) == 0
    assert "5 documents in two" in capsys.readouterr().out
    train, _ = _tokens.open_tokens(texts / "two")
    assert bytes(train[:].astype(np.uint8)) == "".join(DOCUMENTS).encode()
    # characters, of the documents alone
    assert tokenize("--text a.jsonl --tokenizer chars --out chars --quiet") == 0
    tokenizer = _tokenizers.load_tokenizer(texts / "chars")
    assert set(tokenizer.characters) == set("".join(DOCUMENTS))
    assert tokenizer.decode(_tokens.open_tokens(texts / "chars")[0][:]) == "".join(DOCUMENTS)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--out x", "required: --text"),
        ("--text nowhere.txt --out x", "--text nowhere.txt: No such file"),
        ("--text a.jsonl --field body --out x", "is no JSON object with a text 'body'"),
        ("--text b.txt --eos <|endoftext|> --out x", "has no such token"),
        ("--text b.txt --tokenizer a.jsonl --out x", "not a tokenizer file"),
        ("--text b.txt --out b.txt", "--out b.txt is not a folder"),
        ("--text b.txt --out used", "token files of another origin"),
        ("--text bad.txt --out x", "is not UTF-8 text"),
    ],
)
def test_wrong_flags_are_one_line(texts, capsys, flags, line):
    (texts / "used").mkdir()
    (texts / "used/train.bin").write_bytes(b"ab")
    (texts / "bad.txt").write_bytes(b"abc\xff\xfe")
    assert tokenize(f"{flags} --quiet") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dsalt-tokenize: error: ") and line in error


@pytest.mark.thorough
def test_killed_at_any_moment_it_makes_the_same_files(texts, monkeypatch):
    """Every place where it could be killed, by an error there; then killed for good."""
    monkeypatch.setattr(_tokenize, "_NOTE_EVERY", 0.0)
    monkeypatch.setattr(_tokenize, "_ENCODED_AT_ONCE", 40)
    monkeypatch.setattr(_tokenize, "_READ", 100)
    chance = random.Random(1)
    lines = [json.dumps({"text": "".join(chance.choices("abcé \n", k=60))}) for _ in range(40)]
    (texts / "long.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (texts / "long.txt").write_text("".join(chance.choices("abcé \n", k=3000)), encoding="utf-8")
    flags = "--text long.jsonl long.txt --shard-tokens 999 --quiet --out"
    assert tokenize(f"{flags} whole") == 0
    whole = {p.name: p.read_bytes() for p in (texts / "whole").glob("*.bin")}
    assert len(whole) == 7
    flush = _tokenize._Shards.flush
    for moment in (0, 1, 5, 17, 40):
        calls = {"n": 0}

        def killed(shards, calls=calls, moment=moment):
            flush(shards)
            calls["n"] += 1
            if calls["n"] > moment:
                raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(_tokenize._Shards, "flush", killed)
            m.setattr(_tokenize._Shards, "close", flush)
            assert tokenize(f"{flags} cut{moment}") == 130
        with pytest.raises(ValueError, match="is not complete: run dsalt-tokenize again"):
            _tokens.open_tokens(texts / f"cut{moment}")
        assert tokenize(f"{flags} cut{moment}") == 0
        found = {p.name: p.read_bytes() for p in (texts / f"cut{moment}").glob("*.bin")}
        assert found == whole, moment


@pytest.mark.system
@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_a_killed_process_goes_on(texts):
    (texts / "big.txt").write_bytes(b"0123456789abcdef" * 400_000)
    program = (
        "from dsalt import _tokenize as t; t._NOTE_EVERY = 0.0; t._ENCODED_AT_ONCE = 4096; t.main()"
    )
    command = [sys.executable, "-c", program, "--text", "big.txt", "--out", "out", "--quiet"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((texts / "out").glob("shard-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert (texts / "out/progress.json").is_file()
    assert tokenize("--text big.txt --out out --quiet") == 0
    train, _ = _tokens.open_tokens(texts / "out")
    assert bytes(train[:].astype(np.uint8)) == b"0123456789abcdef" * 400_000


def test_train_on_token_files_and_generate(texts, capsys):
    chance = random.Random(0)
    (texts / "text.txt").write_text("".join(chance.choices("abcdefgh \n", k=4000)))
    assert tokenize("--text text.txt --tokenizer chars --out data --quiet") == 0
    base = f"{SMALL} --device cpu --lr 1e-2 --save-every 2 --batch-size 4"
    runs = {"text": "--text text.txt", "data": "--data data", "file": "--data data/shard-00000.bin"}
    losses = {}
    for name, flags in runs.items():
        flags = f"{flags} {base} --total-steps 4 --save-dir {name}"
        assert training.main(flags.split()) == 0
        rows = [json.loads(row) for row in (texts / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [row[k] for row in rows for k in ("loss", "val_loss") if k in row]
    assert losses["text"] == losses["data"] == losses["file"]  # the same ids, the same order
    more = f"--data data {base} --total-steps 6 --save-dir data --resume"
    assert training.main(more.split()) == 0
    ask = "--checkpoint data --prompt abc --max-new-tokens 3 --device cpu"
    capsys.readouterr()
    assert _cli.generate(ask.split()) == 0
    assert capsys.readouterr().out.startswith("abc")
    # random windows and a part of its own, resumed; files without a tokenizer
    IDS[:600].__mod__(30).astype("<u2").tofile(texts / "train.bin")
    IDS[600:].__mod__(30).astype("<u2").tofile(texts / "val.bin")
    flags = f"--data . {base} --windows random --save-dir bin"
    assert training.main(f"{flags} --total-steps 6".split()) == 0
    whole = (texts / "bin/step-00000006/model.safetensors").read_bytes()
    again = f"--data . {base} --windows random --save-dir again --total-steps 6"
    assert training.main(f"{again} --resume bin/step-00000002".split()) == 0
    assert (texts / "again/step-00000006/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--data nowhere.bin", "nowhere.bin: no such file or folder"),
        ("--text b.txt --data data", "got both"),
        ("--data data --val-text b.txt", "--val-text comes with --text"),
        ("--data data --tokenizer chars", "--tokenizer chars comes with --text"),
        ("--data data --separate-documents", "needs --data with an end-of-text token"),
        ("--data data --seq-len 9999", "the data has 900 tokens to train on"),
    ],
)
def test_wrong_data_flags(texts, capsys, flags, line):
    lay(texts / "data", "shards")
    assert training.main(f"{flags} --device cpu --quiet".split()) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_data_file_larger_than_what_is_read_stays_on_the_disk(tmp_path):
    """64 MB of tokens: opening and reading windows keeps nothing of it."""
    with open(tmp_path / "tokens.bin", "wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    train, _ = _tokens.open_tokens(tmp_path / "tokens.bin")
    data = _tokens.TokenDataset(train, 512, random=True)
    for _ in range(50):
        data[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(train) == 32 * 2**20 and peak < 2**20


@pytest.mark.parametrize("letters", ["abcdefghij klmnop\n", "абвгд éжз𝄞\n", None])
@pytest.mark.parametrize("kind", ["chars", "bytes"])
@pytest.mark.thorough
def test_memory_per_character_of_a_text(tmp_path, letters, kind):
    """The ids of a text take at most two bytes per character, and the way to them no more."""
    count = 4_000_000
    if letters is None:  # 2000 different characters
        letters = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    chance = np.random.default_rng(0)
    text = "".join(np.array(list(letters))[chance.integers(0, len(letters), count)])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    size = len(text.encode())
    reads = list(map(len, (text,)))
    del text
    tracemalloc.start()
    n, characters, _ = _tokens.measure(tmp_path / "text.txt")
    make = {"chars": lambda: _tokenizers.CharTokenizer.of(characters)}
    tokenizer = make.get(kind, _tokenizers.ByteTokenizer)()
    ids, unknown = _tokens.encode_file(tmp_path / "text.txt", tokenizer, n)
    data = _tokens.TokenDataset(ids, 256)
    data[len(data) - 1]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == count == reads[0] and not unknown
    pieces = 8 * 2**18  # of one piece of the text that is read at a time
    if kind == "chars":
        assert len(ids) == count and held <= 2 * count + 2**20 and peak <= 2 * count + pieces
    else:
        assert len(ids) == size and held <= size + 2**20 and peak <= 2 * size + pieces
