"""Batches of any accepted form, resumable iteration over a loader, sharding over ranks, texts."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from shared_kernels import checks

from ._checkpoint import rng_state, set_rng_state
from ._distributed import World

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


# --- loaders -------------------------------------------------------------------------------------


class RankSampler(DistributedSampler):
    """Rank r takes samples r, r + world, … of the order that one process would have had.

    The order is drawn from rank 0's random numbers, so that the ranks' batches together are the
    batches of one process with the joint batch size. Padded to equal lengths by repeating from the
    start, or cut with ``drop_last``.
    """

    def __init__(self, base: Any, dataset: Any, world: World, drop_last: bool = False) -> None:
        super().__init__(dataset, world.size, world.rank, shuffle=False, drop_last=drop_last)
        self.base = base
        self.world = world
        total = len(base)
        if drop_last:
            self.num_samples = total // world.size
        else:
            self.num_samples = -(-total // world.size)
        self.total_size = self.num_samples * world.size
        # this rank repeats a sample at its end
        self.padded = self.total_size > total and world.rank >= world.size - self.total_size + total

    def __iter__(self) -> Iterator[int]:
        own = rng_state(_CPU)
        generators = [g for g in [getattr(self.base, "generator", None)] if g is not None]
        start = (own, [g.get_state() for g in generators])
        common, states = self.world.broadcast(start)
        set_rng_state(common, _CPU)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        order = list(self.base)
        if self.world.rank != 0:
            set_rng_state(own, _CPU)
        if order and len(order) < self.total_size:
            order += (order * -(-self.total_size // len(order)))[: self.total_size - len(order)]
        return iter(order[self.world.rank : self.total_size : self.world.size])


def shard_loader(loader: Any, world: World, training: bool) -> tuple[Any, bool]:
    """(the loader of this rank, whether batches must still be dealt out round robin)."""
    if world.size == 1:
        return loader, False
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader, True
    if loader.batch_size is None or type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        return loader, True
    if isinstance(loader.sampler, DistributedSampler):
        return loader, False
    sampler = RankSampler(loader.sampler, loader.dataset, world, training and loader.drop_last)
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    ), False


class BatchStream:
    """Endless iteration over a loader that can be stopped and continued bit for bit.

    At the start of an epoch the random numbers are noted; to continue, the epoch is begun from the
    same numbers, the batches already seen are passed over, and the numbers of now are restored.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self.loader, self.dealt = shard_loader(loader, world, training=True)
        self.world = world
        self.epoch = 0
        self.offset = 0  # items taken from the loader in this epoch
        self._start: dict[str, Any] | None = None
        self._iterator: Iterator[Any] | None = None

    def _generators(self) -> list[torch.Generator]:
        sampler = getattr(self.loader, "sampler", None)
        sources = [self.loader, sampler, getattr(sampler, "base", None)]
        found = [getattr(source, "generator", None) for source in sources]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        return list(unique.values())

    def _begin(self) -> Iterator[Any]:
        sampler = getattr(self.loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.epoch)
        self._start = {
            "rng": rng_state(_CPU),
            "generators": [g.get_state() for g in self._generators()],
        }
        return iter(self.loader)

    def _items(self) -> Any:
        """The next item of this epoch; StopIteration at its end."""
        if self._iterator is None:
            self._iterator = self._begin()
        if not self.dealt:
            item = next(self._iterator)
            self.offset += 1
            return item
        mine = None
        for rank in range(self.world.size):
            item = next(self._iterator)
            self.offset += 1
            if rank == self.world.rank:
                mine = item
        return mine

    def __next__(self) -> Any:
        try:
            return self._items()
        except StopIteration:
            self.epoch, self.offset, self._iterator = self.epoch + 1, 0, None
        try:
            return self._items()
        except StopIteration:
            hint = "each rank needs one" if self.dealt else None
            checks.fail("train_loader", "yield at least one batch", "none", hint)

    def close(self) -> None:
        """Let go of the iterator, and so of its workers."""
        self._iterator = None

    def _unit(self) -> int:
        """Samples of all ranks in one item, or 1 where an item's size is not known."""
        size = getattr(self.loader, "batch_size", None) or 1
        return size * (1 if self.dealt else self.world.size)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "seen": self.offset * self._unit(), "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # counted over all ranks: another number of ranks goes on at the same place
        self.offset = state["seen"] // self._unit()
        self.epoch, self._iterator = state["epoch"], None
        if state["start"] is None:
            return
        now = rng_state(_CPU)
        set_rng_state(state["start"]["rng"], _CPU)
        for generator, saved in zip(self._generators(), state["start"]["generators"], strict=True):
            generator.set_state(saved)
        self._iterator = self._begin()
        for i in range(self.offset):
            try:
                next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"`train_loader` must be the one of the checkpoint, of which {self.offset} "
                    f"batches were used: it ended after {i}"
                ) from None
        set_rng_state(now, _CPU)


def validation_batches(loader: Any, world: World, limit: int | None) -> Iterator[tuple[Any, int]]:
    """(item, rows at its end that do not count) on this rank; every rank yields equally often.

    A sample that was repeated to make the ranks' shares equal is not counted twice.
    """
    own, dealt = shard_loader(loader, world, training=False)
    if not dealt:
        sampler = getattr(own, "sampler", None)
        last = len(own) - 1 if isinstance(sampler, RankSampler) and sampler.padded else -1
        for i, item in enumerate(own):
            if limit is not None and i >= limit:
                return
            yield item, int(i == last)
        return
    group: list[Any] = []
    for i, item in enumerate(own):
        if limit is not None and i >= limit * world.size:
            break
        group.append(item)
        if len(group) == world.size:
            yield group[world.rank], 0
            group = []
    if group:
        counts = world.rank < len(group)
        yield (group[world.rank], 0) if counts else (group[0], sys.maxsize)


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
