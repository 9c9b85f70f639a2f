"""The texts and the checkpoints that flags name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import _checkpoint, _tokenizers, _tokens
from .._distributed import pick_device
from .._files import CONFIG_NAME
from ..model import DSALTLMHeadModel
from .arguments import UsageError


@contextmanager
def named(flag: str, path: str) -> Iterator[None]:
    """An error of a file names the flag that gave it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error


def read_text(path: str, flag: str) -> str:
    with named(flag, path):
        text = "".join(_tokens.read_text(Path(path)))
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty")
    return text


def pick_tokenizer(wanted: str | None, characters: set[str] | None, folder: Path | None) -> Any:
    try:
        saved = None if folder is None else _tokenizers.load_tokenizer(folder)
        if saved is not None:
            kind = _tokenizers.KINDS.get(type(saved), "a file")
            if wanted in ("chars", "bytes") and wanted != kind:
                raise UsageError(f"--tokenizer {wanted}: {folder} was trained with another: {kind}")
            return saved
        if folder is not None:
            raise UsageError(f"{folder} carries no tokenizer: it was not written by dsalt-train")
        if wanted is None or wanted == "chars":
            if characters is None:
                raise UsageError("--tokenizer chars comes with --text")
            return _tokenizers.CharTokenizer.of(characters)
        if wanted == "bytes":
            return _tokenizers.ByteTokenizer()
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return _tokenizers.read_tokenizer(read_text(wanted, "--tokenizer"))
    except ValueError as error:
        raise UsageError(f"--tokenizer {wanted}: {error}") from error


def load_model(args: argparse.Namespace) -> tuple[DSALTLMHeadModel, Any, torch.device]:
    """(model, tokenizer, device) of ``--checkpoint`` and ``--device``."""
    path = Path(args.checkpoint)
    folder = path if (path / CONFIG_NAME).is_file() else _checkpoint.latest(path)
    if folder is None:
        raise UsageError(f"no model in {path}: neither {CONFIG_NAME} nor step folders")
    try:
        device = pick_device(args.device)
        tokenizer = _tokenizers.load_tokenizer(folder)
        model = DSALTLMHeadModel.from_pretrained(folder, device=device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    if tokenizer is None:
        raise UsageError(f"{folder} carries no tokenizer: it was not written by dsalt-train")
    return model, tokenizer, device


def unknown_characters(tokenizer: Any, text: str) -> Mapping[str, int]:
    unknown: Any = getattr(tokenizer, "unknown", None)
    return {} if unknown is None else unknown(text)


def report_unknown(program: str, found: Mapping[str, int], characters: int, flag: str) -> None:
    """Name the characters that the tokenizer cannot write; refuse a text with many of them."""
    count = sum(found.values())
    if not count:
        return
    listed = ", ".join(f"{c!r} ({n})" for c, n in list(found.items())[:8])
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    what = f"{count} of {characters} characters are unknown to the tokenizer"
    line = f"{flag}: {what}: {listed}{more}"
    if count / characters > 0.01:
        raise UsageError(f"{line}; more than 1 % cannot be left out")
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{program}: warning: {line}\n")
