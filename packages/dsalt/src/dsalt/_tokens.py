"""Sequences of token ids: in memory, in files that are mapped, and the datasets of their pieces."""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._labels import IGNORE_INDEX
from ._tokenizers import CharTokenizer, pieces

__all__: list[str] = []

META_NAME = "meta.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_PIECE = 1 << 16  # characters that are read at a time

# headers of token files that other programs write: (magic, what follows it)
_LITGPT = b"LITPKDS"  # version u64, code of the type u8, tokens per block u64
_LITGPT_TYPES = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLMC: dict[int, np.dtype[Any]] = {
    20240520: DTYPES["uint16"],
    20240801: DTYPES["uint32"],
}  # version i32, tokens i32, …
_LLMC_BYTES = 1024


# --- texts ---------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[str]:
    """Pieces of a UTF-8 text; a byte order mark is no character of it."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            while piece := file.read(_PIECE):
                yield piece
        except UnicodeDecodeError as error:
            # counted from the begin of the file, not of the buffer
            error.start += os.lseek(file.fileno(), 0, os.SEEK_CUR) - len(error.object)
            raise


def measure(path: Path) -> tuple[int, set[str], bool]:
    """(characters, which ones there are, whether one is not white space) of a text."""
    found: set[str] = set()
    count, written = 0, False
    for piece in read_text(path):
        count += len(piece)
        found.update(piece)
        written = written or not piece.isspace()
    return count, found, written


def encode_file(path: Path, tokenizer: Any, count: int) -> tuple[np.ndarray, Counter[str]]:
    """(ids, unknown characters) of a text of ``count`` characters, read piece by piece.

    With a character tokenizer the ids are one array of one or two bytes each, and nothing else is
    held. The other tokenizers give what they give for the whole text.
    """
    unknown: Counter[str] = Counter()
    parts: list[np.ndarray] = []
    whole: np.ndarray | None = None
    done = 0
    for piece in pieces(read_text(path), tokenizer):
        if hasattr(tokenizer, "unknown"):
            unknown.update(tokenizer.unknown(piece))
        ids = encode(tokenizer, piece)
        if isinstance(tokenizer, CharTokenizer):
            whole = np.empty(count, ids.dtype) if whole is None else whole
            whole[done : done + len(ids)] = ids
            done += len(ids)
        else:
            parts.append(ids)
    if whole is not None:
        return whole[:done], unknown
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8), unknown


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """The ids of a text as a small array, for any tokenizer."""
    if hasattr(tokenizer, "encode_array"):
        ids: np.ndarray = tokenizer.encode_array(text)
        return ids
    return np.asarray(tokenizer.encode(text), dtype=np.uint32)


# --- token files ---------------------------------------------------------------------------------


class TokenFiles:
    """Token ids of one file or of several, one after the other, mapped and not read.

    Args:
        paths: files of the layouts that :func:`open_tokens` knows.
        dtype: "uint16" or "uint32" of files without a header.
    """

    def __init__(self, paths: Sequence[Path], dtype: str = "uint16") -> None:
        self.paths, self.dtype = [Path(p) for p in paths], dtype
        self.parts = [_map(path, dtype) for path in self.paths]
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, places: slice) -> np.ndarray:
        """The tokens of ``start:stop``, over the borders of files too."""
        start, stop, _ = places.indices(len(self))
        found = []
        while start < stop:
            k = bisect_right(self.ends, start)
            first = self.ends[k] - len(self.parts[k])
            end = min(stop, self.ends[k])
            found.append(self.parts[k][start - first : end - first])
            start = end
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.uint16)])

    def largest(self) -> int:
        """The largest id, found by reading every file once."""
        step = 1 << 24
        maxima = (int(p[i : i + step].max()) for p in self.parts for i in range(0, len(p), step))
        return max(maxima, default=-1)

    def __getstate__(self) -> dict[str, Any]:
        # each worker process maps the files itself
        return {"paths": self.paths, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"], state["dtype"])  # type: ignore[misc]


def _map(path: Path, dtype: str) -> np.ndarray:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_LLMC_BYTES)
    kind: np.dtype[Any] = DTYPES[dtype]
    begin = 0
    if head.startswith(_LITGPT):
        code = head[15]
        if code not in _LITGPT_TYPES:
            raise ValueError(f"{path}: its header names type {code}, which holds no token ids")
        kind, begin = np.dtype(_LITGPT_TYPES[code]), 24
    elif (named := _llmc(head)) is not None:
        count = struct.unpack_from("<iii", head)[2]
        kind, begin = named, _LLMC_BYTES
        if begin + count * kind.itemsize != size:
            raise ValueError(f"{path}: its header promises {count} tokens, its size does not")
    if (size - begin) % kind.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, which is no number of {kind.name} tokens; is it a token "
            f"file, and is the type right?"
        )
    if size == begin:
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r", begin)


def open_tokens(path: Path, dtype: str | None = None) -> tuple[TokenFiles, TokenFiles | None]:
    """(tokens to train on, tokens to validate on or None) of a file or a folder.

    A folder with ``train.bin`` (and ``val.bin``) is nanoGPT's; of any other folder the ``.bin``
    files are shards, in the order of their names, and those that begin with ``val`` validate. The
    type of raw files is that of ``meta.json`` in the folder, or ``dtype``, or uint16; headers of
    litgpt's packed files and of llm.c's are understood.

    Raises:
        ValueError: there is no token file, or its size or header is wrong.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    stated = dtype or read_meta(path).get("dtype")
    kind = stated or "uint16"
    if kind not in DTYPES:
        raise ValueError(f"{path}: the type of tokens must be uint16 or uint32, got {kind}")
    if path.is_file():
        beside = path.with_name("val.bin")
        with_val = path.name == "train.bin" and beside.is_file()
        return _opened([path], [beside] if with_val else [], kind, stated is not None)
    files = sorted(path.glob("*.bin"))
    if not files:
        raise ValueError(f"{path} holds no .bin file of tokens")
    if (path / "progress.json").is_file():
        raise ValueError(f"{path} is not complete: run dsalt-tokenize again, it goes on")
    val = [p for p in files if p.name.startswith("val")]
    train = [p for p in files if p not in val]
    if not train:
        raise ValueError(f"{path} holds no .bin file to train on, only {val[0].name}")
    return _opened(train, val, kind, stated is not None)


def _opened(
    train: list[Path], val: list[Path], kind: str, stated: bool
) -> tuple[TokenFiles, TokenFiles | None]:
    for path in [*train, *val]:
        _check_raw(path, stated)
    opened = [TokenFiles(paths, kind) if paths else None for paths in (train, val)]
    for paths, tokens in zip((train, val), opened, strict=True):
        if tokens is not None and not len(tokens):
            raise ValueError(f"{paths[0]} holds no tokens")
    return opened[0], opened[1]  # type: ignore[return-value]


def _check_raw(path: Path, stated: bool) -> None:
    """Refuse a file that is no uint16 token file by all appearances, unless its type is stated.

    Ids of 32 or 64 bits, read as uint16, are every second time a small number: their upper halves.
    """
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path} is numpy's format with a header; write the ids with array.tofile")
    if stated or len(head) < 128 or head.startswith(_LITGPT) or _llmc(head) is not None:
        return
    halves = np.frombuffer(head[: len(head) // 4 * 4], DTYPES["uint16"])
    if halves[1::2].max() < 16 <= halves[::2].max():
        raise ValueError(
            f"{path} seems to hold ids of more than 16 bits: say --data-type (uint16 or uint32)"
        )
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        raise ValueError(f"{path} seems to be a text: dsalt-tokenize makes token files of it")


def _llmc(head: bytes) -> np.dtype[Any] | None:
    """The type that a header of llm.c's names."""
    return _LLMC.get(struct.unpack_from("<i", head)[0]) if len(head) >= _LLMC_BYTES else None


def read_meta(path: Path) -> dict[str, Any]:
    """What dsalt-tokenize noted about a folder of tokens, or about the folder of a file."""
    meta = (path if path.is_dir() else path.parent) / META_NAME
    if not meta.is_file():
        return {}
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{meta} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


# --- datasets ------------------------------------------------------------------------------------


class TokenDataset(Dataset[Any]):
    """Pieces (x, y) of one long sequence of ids, y is x moved by one, as int64.

    Args:
        ids: a tensor, an array, or TokenFiles.
        length: tokens of x.
        start, stop: the part of ``ids`` that is used.
        random: a piece begins anywhere, drawn from torch's global generator; else piece i begins
            at i * length.
        vocab_size: an id that is not below it is an error.
        eos: targets behind this id, the first tokens of documents, are ignored (-100).
    """

    def __init__(
        self,
        ids: Any,
        length: int,
        start: int = 0,
        stop: int | None = None,
        random: bool = False,
        vocab_size: int | None = None,
        eos: int | None = None,
    ) -> None:
        self.ids = ids.numpy() if isinstance(ids, Tensor) else ids
        self.length, self.start, self.random = length, start, random
        self.stop = len(ids) if stop is None else stop
        self.vocab_size, self.eos = vocab_size, eos

    def __len__(self) -> int:
        return max(0, (self.stop - self.start - 1) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.random:
            start = int(torch.randint(self.start, self.stop - self.length, ()))
        else:
            start = self.start + index * self.length
        piece = torch.from_numpy(self.ids[start : start + self.length + 1].astype(np.int64))
        if self.vocab_size is not None and int(piece.max()) >= self.vocab_size:
            raise ValueError(
                f"the data holds token {int(piece.max())} and the vocabulary has {self.vocab_size} "
                f"ids; is it the data of another tokenizer, or of another type (uint16, uint32)?"
            )
        x, y = piece[:-1], piece[1:]
        if self.eos is not None:
            y = y.masked_fill(x == self.eos, IGNORE_INDEX)
        return x, y
