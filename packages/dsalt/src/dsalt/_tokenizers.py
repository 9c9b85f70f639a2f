"""Texts as ids: characters, bytes, and any tokenizer.json; each writes a tokenizer.json itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

__all__: list[str] = []

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
UNKNOWN = "\ufffd"
_WINDOW = 256  # characters on both sides of a cut that must not change their tokens


def _byte_names() -> list[str]:
    """The printable character that stands for each byte in the ``tokenizers`` library's ByteLevel.

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256))
    names = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in names:
            names[b] = chr(256 + next(others))
    return [names[b] for b in range(256)]


def _json(
    model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
    """A tokenizer.json of the ``tokenizers`` library."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


_SPLIT_CHARACTERS = {
    "type": "Split",
    "pattern": {"Regex": "[\\s\\S]"},
    "behavior": "Isolated",
    "invert": False,
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


class ByteTokenizer:
    """UTF-8 bytes: 256 ids, with which every text can be written."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def unknown(self, text: str) -> Counter[str]:
        return Counter()

    def state(self) -> dict[str, Any]:
        vocab = {name: b for b, name in enumerate(_byte_names())}
        model: dict[str, Any] = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        }
        return _json(model, _BYTES, _BYTES)


class CharTokenizer:
    """One id per character of a text; id 0 stands for any other character."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)

    @classmethod
    def of(cls, text: str | Iterable[str]) -> CharTokenizer:
        """The characters of a text, or of its pieces; U+FFFD is the unknown one."""
        found: set[str] = set()
        for piece in [text] if isinstance(text, str) else text:
            found.update(piece)
        return cls(sorted(found - {UNKNOWN}))

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    @cached_property
    def _table(self) -> np.ndarray:
        """The id of each code point."""
        points = [ord(c) for c in self.characters]
        table = np.zeros(max(points, default=0) + 2, dtype=smallest(self.vocab_size))
        table[points] = np.arange(1, self.vocab_size)
        return table

    def encode_array(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        return self._table[np.minimum(points, len(self._table) - 1)]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(UNKNOWN if i == 0 else self.characters[i - 1] for i in ids)

    def unknown(self, text: str) -> Counter[str]:
        """Characters without an id, and how often each occurs."""
        missing = set(text).difference(self.characters, {UNKNOWN})
        return Counter({c: text.count(c) for c in sorted(missing)})

    def state(self) -> dict[str, Any]:
        name = "<unk>" if UNKNOWN in self.characters else UNKNOWN
        vocab = {c: i for i, c in enumerate([name, *self.characters])}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": name}
        return _json(model, _SPLIT_CHARACTERS, {"type": "Fuse"})


class FileTokenizer:
    """A tokenizer.json of the Hugging Face ``tokenizers`` library (an extra).

    The text alone is encoded: no [CLS] or [SEP] around it, no truncation and no padding, whatever
    the file asks for; a text is one long sequence here, and a prompt is the beginning of one.
    """

    def __init__(self, content: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                "a tokenizer file needs the tokenizers library: pip install 'dsalt[tokenizers]'"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:
            raise ValueError(f"not a tokenizer file: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content = content

    @cached_property
    def vocab_size(self) -> int:
        # ids may have gaps: the largest one determines the size
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=smallest(self.vocab_size))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoded.ids for encoded in found]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def unknown(self, text: str) -> Counter[str]:
        """Characters that become the unknown token or no token, and how often each occurs."""
        model = json.loads(self._content)["model"]
        name = model.get("unk_token")
        if isinstance(model.get("unk_id"), int):
            name = model["vocab"][model["unk_id"]][0]
        found: Counter[str] = Counter()
        if name is not None:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            for (start, end), token in zip(encoded.offsets, encoded.tokens, strict=True):
                if token == name:
                    found.update(text[start:end])
        # a tokenizer may drop white space and control characters
        for c in sorted(set(text) - found.keys()):
            if c.isprintable() and not c.isspace() and not self.encode(c):
                found[c] = text.count(c)
        return Counter({c: n for c, n in found.items() if c != UNKNOWN})

    def state(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._content)
        return content


KINDS = {ByteTokenizer: "bytes", CharTokenizer: "chars"}  # the tokenizers that need no file


def smallest(vocab_size: int) -> Any:
    """The smallest unsigned type that holds every id."""
    for kind in (np.uint8, np.uint16):
        if vocab_size <= np.iinfo(kind).max + 1:
            return kind
    return np.uint32


# --- files ---------------------------------------------------------------------------------------


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json, and the small file by which transformers' AutoTokenizer finds it.

    ``tokenizer`` has ``state()``, or is one of the ``tokenizers`` or ``transformers`` library.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(tokenizer, "to_str"):
        state = json.loads(tokenizer.to_str())
    else:
        state = tokenizer.state()
    _write(folder / TOKENIZER_NAME, state)
    model = state.get("model")
    if isinstance(model, dict):
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if isinstance(model.get("unk_token"), str):
            config["unk_token"] = model["unk_token"]
        _write(folder / CONFIG_NAME, config)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that a checkpoint carries; None without one."""
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        return None
    try:
        return read_tokenizer(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_tokenizer(content: str) -> Any:
    """The tokenizer of a tokenizer.json: ours without any library, others with ``tokenizers``.

    Raises:
        ValueError: it is not a tokenizer.json.
        ImportError: the ``tokenizers`` library is needed and not installed.
    """
    try:
        state = json.loads(content)
    except ValueError as error:
        raise ValueError(f"not a tokenizer file: {error}") from error
    if not isinstance(state, dict):
        raise ValueError("not a tokenizer file: no JSON object")
    kind = state.get("kind")  # the file of checkpoints from before they had a tokenizer.json
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer(state["characters"])
    if kind == "file":
        return FileTokenizer(state["content"])
    model = state.get("model")
    if not isinstance(model, dict):
        raise ValueError("not a tokenizer file: it has no model")
    ours = state == CharTokenizer(()).state() | {"model": model}
    if ours and model.get("type") == "WordLevel":
        names = list(model["vocab"])
        singles = all(len(name) == 1 for name in names[1:])
        if singles and list(model["vocab"].values()) == list(range(len(names))):
            if names[:1] == [model["unk_token"]] and names[0] in (UNKNOWN, "<unk>"):
                return CharTokenizer(names[1:])
    if state == ByteTokenizer().state():
        return ByteTokenizer()
    return FileTokenizer(content)


def pieces(read: Iterator[str], tokenizer: Any) -> Iterator[str]:
    """Pieces of a text whose tokens, one piece after the other, are the tokens of the whole text.

    Characters and bytes may be cut anywhere; for any other tokenizer a text is cut behind a line
    break, where the tokens of the surroundings are seen not to change, or not at all.
    """
    if isinstance(tokenizer, (ByteTokenizer, CharTokenizer)):
        yield from read
        return
    held = ""
    for piece in read:
        held += piece
        cut = _cut(held, tokenizer)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _cut(text: str, tokenizer: Any) -> int:
    """The last line break behind which a cut changes no token, as a place in the text; 0: none."""
    end = len(text) - _WINDOW
    for _ in range(8):
        end = text.rfind("\n", 0, max(end, 0)) + 1
        if not end:
            return 0
        before, after = text[max(0, end - _WINDOW) : end], text[end : end + _WINDOW]
        if tokenizer.encode(before) + tokenizer.encode(after) == tokenizer.encode(before + after):
            return end
        end -= 1
    return 0
