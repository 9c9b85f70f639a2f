"""The command line ``dsalt-tokenize``: texts and JSON lines become folders of token files."""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from . import _tokenizers, _tokens
from ._cli.arguments import Parser, UsageError, at_least, truth
from ._cli.exit import run
from ._cli.files import named, pick_tokenizer, report_unknown

__all__: list[str] = []

PROGRESS_NAME = "progress.json"
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_READ = 1 << 18  # bytes
_ENCODED_AT_ONCE = 1 << 20  # characters
_NOTE_EVERY = 1.0  # seconds between two notes of how far it came


class _Piece(NamedTuple):
    """Characters of a document, whether the document ends after them, and where reading goes on."""

    text: str
    ends: bool
    offset: int


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 after one line that says what cannot be used; 130 after Ctrl-C."""
    try:
        return run("dsalt-tokenize", _tokenize, argv)
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser(
        "dsalt-tokenize",
        "--text FILE [FILE ...] --out DIR",
        "Turn texts or JSON lines into files of token ids, for dsalt-train --data. A "
        "run that was ended in the middle goes on when it is called again.",
    )
    parser.section("what")
    parser.flag(
        "text",
        metavar="FILE",
        nargs="+",
        required=True,
        help="UTF-8 texts, or JSON lines (.jsonl), in this order",
    )
    parser.flag("field", default="text", metavar="NAME", help="the text of a JSON line")
    parser.flag(
        "separator",
        default=None,
        metavar="TEXT",
        help="what stands between the documents of a text; default: a file is one document",
    )
    parser.section("how")
    parser.flag(
        "tokenizer",
        default="bytes",
        metavar="bytes|chars|FILE",
        help="UTF-8 bytes, the characters of the texts, or any tokenizer.json",
    )
    parser.flag(
        "eos",
        default=None,
        metavar="TOKEN",
        help=f"the token behind each document; default: the tokenizer's of {', '.join(_ENDS)}",
    )
    parser.section("output")
    parser.flag("out", default=None, required=True, metavar="DIR", help="folder of the token files")
    parser.flag("shard_tokens", type=at_least(1), default=10**8, help="tokens of one file")
    parser.flag("quiet", type=truth, help="no progress bar")
    return parser


def _tokenize(argv: Sequence[str] | None) -> None:
    args = _parser().read(argv)
    out, inputs = Path(args.out), [Path(name) for name in args.text]
    for path in inputs:
        with named("--text", str(path)), open(path, "rb"):
            pass
    settings = _settings(args, inputs)
    progress = _begun(out, settings)
    if progress is None:
        sys.stderr.write(f"dsalt-tokenize: {out} is complete already\n")
        return
    if not progress:
        tokenizer = pick_tokenizer(args.tokenizer, _characters(args, inputs), None)
        _end_id(tokenizer, args.eos)  # refused before anything is written
        out.mkdir(parents=True, exist_ok=True)
        progress = {
            "settings": settings,
            "input": 0,
            "offset": 0,
            "tokens": 0,
            "documents": 0,
            "characters": 0,
            "unknown": {},
        }
        _tokenizers.save_tokenizer(tokenizer, out)
        _write_json(out / PROGRESS_NAME, progress)
    tokenizer = _tokenizers.load_tokenizer(out)
    eos = _end_id(tokenizer, args.eos)
    if eos is None:
        sys.stderr.write(
            "dsalt-tokenize: the tokenizer has no end-of-text token, so that documents follow each "
            "other without a mark; --eos names one\n"
        )
    kind = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    shards = _Shards(out, _tokens.DTYPES[kind], args.shard_tokens, progress["tokens"])
    with shards, _bar(args, inputs, progress) as bar:
        _convert(args, inputs, tokenizer, eos, shards, progress, bar)
    meta = {
        "dtype": kind,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": eos,
        "tokens": progress["tokens"],
        "documents": progress["documents"],
        "settings": settings,
    }
    _write_json(out / _tokens.META_NAME, meta)
    (out / PROGRESS_NAME).unlink()
    sys.stdout.write(
        f"{meta['tokens']} tokens of {meta['documents']} documents in {out}; "
        f"dsalt-train --data {out}\n"
    )


def _convert(
    args: argparse.Namespace,
    inputs: list[Path],
    tokenizer: Any,
    eos: int | None,
    shards: _Shards,
    progress: dict[str, Any],
    bar: Any,
) -> None:
    """Read, encode and write, and note every second how much is safely on the disk."""
    unknown, noted = Counter(progress["unknown"]), time.monotonic()
    for number in range(progress["input"], len(inputs)):
        path = inputs[number]
        start, progress["offset"] = progress["offset"], 0
        with named("--text", str(path)):
            for group in _groups(_pieces(args, path, start, tokenizer)):
                texts = [piece.text for piece in group]
                for piece, ids in zip(group, _encoded(tokenizer, texts), strict=True):
                    shards.write(ids)
                    if piece.ends and eos is not None:
                        shards.write(np.array([eos]))
                    unknown.update(tokenizer.unknown(piece.text))
                bar.update(group[-1].offset - start)
                start = group[-1].offset
                progress |= {
                    "input": number,
                    "offset": start,
                    "tokens": shards.tokens,
                    "documents": progress["documents"] + sum(piece.ends for piece in group),
                    "characters": progress["characters"] + sum(map(len, texts)),
                    "unknown": dict(unknown),
                }
                if time.monotonic() - noted >= _NOTE_EVERY:
                    shards.flush()
                    _write_json(shards.out / PROGRESS_NAME, progress)
                    noted = time.monotonic()
        progress |= {"input": number + 1, "offset": 0}
    shards.flush()
    _write_json(shards.out / PROGRESS_NAME, progress)
    report_unknown("dsalt-tokenize", unknown, max(1, progress["characters"]), "--text")


def _encoded(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    if hasattr(tokenizer, "encode_batch"):
        return [np.asarray(ids, np.uint32) for ids in tokenizer.encode_batch(texts)]
    return [_tokens.encode(tokenizer, text) for text in texts]


# --- reading -------------------------------------------------------------------------------------


def _pieces(args: argparse.Namespace, path: Path, offset: int, tokenizer: Any) -> Iterator[_Piece]:
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, offset, args.field)
    elif args.separator is not None:
        yield from _separated(path, offset, args.separator)
    else:
        for text in _tokenizers.pieces(_decoded(path, offset), tokenizer):
            offset = (offset or _mark_size(path)) + len(text.encode("utf-8"))
            yield _Piece(text, False, offset)
        yield _Piece("", True, path.stat().st_size)


def _json_lines(path: Path, offset: int, field: str) -> Iterator[_Piece]:
    with open(path, "rb") as file:
        file.seek(offset or _mark_size(path))
        while line := file.readline():
            end = file.tell()
            if line.strip():
                yield _Piece(_field(path, line, field, end), True, end)


def _field(path: Path, line: bytes, field: str, end: int) -> str:
    try:
        found = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        found = error
    if not isinstance(found, str):
        why = f": {found!r}" if isinstance(found, Exception) else ""
        where = f"the line that ends at byte {end}"
        raise UsageError(f"--text {path}: {where} is no JSON object with a text {field!r}{why}")
    return found


def _separated(path: Path, offset: int, separator: str) -> Iterator[_Piece]:
    held, offset = "", offset or _mark_size(path)
    for text in _decoded(path, offset):
        *documents, held = (held + text).split(separator)
        for document in documents:
            offset += len((document + separator).encode("utf-8"))
            yield _Piece(document, True, offset)
    if held:
        yield _Piece(held, True, path.stat().st_size)


def _decoded(path: Path, offset: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        file.seek(offset or _mark_size(path))
        while data := file.read(_READ):
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)


def _mark_size(path: Path) -> int:
    """Bytes of the byte order mark at the begin of a file."""
    with open(path, "rb") as file:
        return len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0


def _groups(found: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that are encoded together."""
    group: list[_Piece] = []
    size = 0
    for piece in found:
        group.append(piece)
        size += len(piece.text)
        if size >= _ENCODED_AT_ONCE or len(group) == 1024:
            yield group
            group, size = [], 0
    if group:
        yield group


def _characters(args: argparse.Namespace, inputs: list[Path]) -> set[str] | None:
    """The characters of every document, where they make the vocabulary."""
    if args.tokenizer != "chars":
        return None
    found: set[str] = set()
    for path in inputs:
        with named("--text", str(path)):
            for piece in _pieces(args, path, 0, _tokenizers.ByteTokenizer()):
                found.update(piece.text)
    return found


# --- writing -------------------------------------------------------------------------------------


class _Shards:
    """Token files of one size, the last one shorter, written after ``tokens`` tokens."""

    def __init__(self, out: Path, kind: np.dtype, size: int, tokens: int) -> None:
        self.out, self.kind, self.size, self.tokens = out, kind, size, tokens
        for path in sorted(out.glob("shard-*.bin")):
            # tokens that were written after the last note are written again
            keep = min(max(0, tokens - int(path.stem.split("-")[1]) * size), size)
            if keep:
                os.truncate(path, keep * kind.itemsize)
            else:
                path.unlink()
        self.file: Any = None

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            number, inside = divmod(self.tokens, self.size)
            if self.file is None or (inside == 0 and self.file.tell()):
                self.close()
                self.file = open(self.out / f"shard-{number:05d}.bin", "ab")  # noqa: SIM115
            part, ids = ids[: self.size - inside], ids[self.size - inside :]
            self.file.write(part.astype(self.kind).tobytes())
            self.tokens += len(part)

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()
        self.file = None

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole at any moment."""
    beside = path.with_suffix(".part")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _settings(args: argparse.Namespace, inputs: list[Path]) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    kind = args.tokenizer
    if kind not in ("bytes", "chars"):
        with named("--tokenizer", kind):
            kind = hashlib.blake2b(Path(kind).read_bytes(), digest_size=16).hexdigest()
    return {
        "text": [[str(path), path.stat().st_size] for path in inputs],
        "tokenizer": kind,
        "field": args.field,
        "separator": args.separator,
        "eos": args.eos,
        "shard_tokens": args.shard_tokens,
    }


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The note of an earlier run: {} if there was none, None if that run is complete."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a folder")
    for name in (_tokens.META_NAME, PROGRESS_NAME):
        if not (out / name).is_file():
            continue
        try:
            found = json.loads((out / name).read_text(encoding="utf-8"))
            before = found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--out {out}: {name} is damaged or not ours") from error
        changed = [k for k, v in settings.items() if before.get(k) != v]
        if changed:
            flags = ", ".join(f"--{k.replace('_', '-')}" for k in changed)
            raise UsageError(f"--out {out} holds tokens made with another {flags}; choose another")
        return None if name == _tokens.META_NAME else found
    if out.is_dir() and any(out.glob("*.bin")):
        raise UsageError(f"--out {out} holds token files of another origin; choose another folder")
    return {}


def _end_id(tokenizer: Any, wanted: str | None) -> int | None:
    """The id of the token that ends a document."""
    find: Callable[[str], int | None] = getattr(tokenizer, "token_id", lambda token: None)
    if wanted is None:
        return next((i for i in map(find, _ENDS) if i is not None), None)
    found = find(wanted)
    if found is None:
        raise UsageError(f"--eos {wanted}: the tokenizer has no such token")
    return found


def _bar(args: argparse.Namespace, inputs: list[Path], progress: dict[str, Any]) -> Any:
    sizes = [path.stat().st_size for path in inputs]
    done = sum(sizes[: progress["input"]]) + progress["offset"]
    return tqdm(
        total=sum(sizes),
        initial=done,
        disable=args.quiet,
        unit="B",
        unit_scale=True,
        desc="tokenize",
        dynamic_ncols=True,
    )
