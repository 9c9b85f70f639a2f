"""Batches of any accepted form, resumable iteration over a loader, sharding over ranks, texts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared_kernels import checks

__all__: list[str] = []

IGNORE_INDEX = -100
_CPU = torch.device("cpu")


# --- batches -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    input_ids: Tensor  # (B, N)
    labels: Tensor  # (B, N), aligned with the logits, -100 is ignored
    extras: dict[str, Any]  # further keyword arguments of the model

    def valid(self) -> int:
        """How many labels count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        extras = {k: move(v) for k, v in self.extras.items()}
        return Batch(move(self.input_ids), move(self.labels), extras)


def as_batch(item: Any, shift_labels: bool = False) -> Batch:
    """A loader's item as a Batch: ids, (x,), (x, y) or a dict; without labels, the next token.

    With ``shift_labels`` given labels are the inputs themselves and are moved by one here.
    """
    extras: dict[str, Any] = {}
    labels = None
    if isinstance(item, Tensor):
        ids = item
    elif isinstance(item, Mapping):
        extras = dict(item)
        if "input_ids" not in extras:
            checks.fail("batch", 'have the key "input_ids"', sorted(map(str, extras)))
        ids, labels = extras.pop("input_ids"), extras.pop("labels", None)
    elif isinstance(item, Sequence) and 1 <= len(item) <= 2:
        ids, labels = item[0], item[1] if len(item) == 2 else None
    else:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sequence) else type(item)
        checks.fail("batch", "be ids, (ids,), (ids, labels) or a dict", got, error=TypeError)
    checks.integer("batch", ids)
    checks.shape("batch", ids, (None, None), "(B, N)")
    # token files hold uint16, in which -100 is a token and nothing is computed
    ids = ids.long()
    if labels is not None:
        checks.integer("labels", labels)
        labels = labels.long()
    mask = extras.get("attention_mask")
    if labels is None or shift_labels:
        targets = ids if labels is None else labels
        if mask is not None:
            targets = targets.masked_fill(mask == 0, IGNORE_INDEX)
        cu_seqlens = extras.get("cu_seqlens")
        if cu_seqlens is not None:
            # the first token of a packed sequence is nobody's next token
            inner = cu_seqlens.long()
            targets = targets.clone()
            targets[:, inner[inner < targets.shape[1]]] = IGNORE_INDEX
            labels = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)
        else:
            # the last position has no next token: it need not be computed
            ids, labels = ids[:, :-1], targets[:, 1:]
            if mask is not None:
                # padding in front does not predict the first token
                extras["attention_mask"] = mask = mask[:, :-1]
                labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    else:
        if labels.shape != ids.shape:
            checks.fail("labels", f"have the ids' shape {tuple(ids.shape)}", tuple(labels.shape))
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return Batch(ids, labels, extras)


def warn_if_copy(batch: Batch) -> None:
    """Labels that equal the inputs teach copying: most often a missing shift."""
    counted = batch.labels != IGNORE_INDEX
    if bool(counted.any()) and bool((batch.labels == batch.input_ids)[counted].all()):
        warnings.warn(
            "the labels equal the inputs at every position, so the model learns to copy; "
            "give next-token labels, or shift_labels=True",
            stacklevel=4,
        )


# --- texts ---------------------------------------------------------------------------------------


class ByteTokenizer:
    """UTF-8 bytes: 256 ids, every text can be written."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def state(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class CharTokenizer:
    """One id per character of a text; id 0 stands for any other character."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self._ids = {c: i + 1 for i, c in enumerate(self.characters)}

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(c, 0) for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join("\ufffd" if i == 0 else self.characters[i - 1] for i in ids)

    def state(self) -> dict[str, Any]:
        return {"kind": "chars", "characters": "".join(self.characters)}


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

    @property
    def vocab_size(self) -> int:
        # ids may have gaps: the largest decides
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def state(self) -> dict[str, Any]:
        return {"kind": "file", "content": self._content}


TOKENIZER_NAME = "tokenizer.json"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    text = json.dumps(tokenizer.state(), ensure_ascii=False)
    (folder / TOKENIZER_NAME).write_text(text, encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that a checkpoint carries; None without one."""
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        kind = state["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        return (
            CharTokenizer(state["characters"])
            if kind == "chars"
            else FileTokenizer(state["content"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class TokenDataset(Dataset):
    """Consecutive pieces (x, y) of one long sequence of ids; y is x moved by one."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        piece = self.ids[start : start + self.length + 1]
        return piece[:-1], piece[1:]
