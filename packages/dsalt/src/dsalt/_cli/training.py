"""``dsalt-train``: train a language model on a text or on files of token ids."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import _checkpoint, _tokenizers, _tokens
from .._config import NAMES, SCHEDULES
from .._files import read_config
from .._trainer import DSALTTrainer, weights_folder
from ..model import DSALTLMHeadModel
from .arguments import DTYPES, Parser, UsageError, at_least, duration, real, truth
from .exit import run
from .files import named, pick_tokenizer, report_unknown

_MODEL_DEFAULTS: dict[str, Any] = {
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "n_min": 16,
    "n_max": 128,
    "k_lmk": 16,
    "dropout": 0.1,
    "landmark_block": 32,
    "tie_embeddings": False,
}


def _train_parser() -> Parser:
    parser = Parser(
        "dsalt-train",
        "(--text FILE | --data PATH)",
        "Train a language model with window + landmark attention on a text file, or "
        "on files of token ids.",
        epilog="several GPUs: torchrun --nproc_per_node=2 -m dsalt.training --text FILE --fsdp",
    )
    positive = at_least(1)
    parser.section("data")
    parser.flag("text", metavar="FILE", default=None, help="UTF-8 text to learn")
    parser.flag("val_text", metavar="FILE", default=None, help="text to validate on")
    parser.flag(
        "data",
        metavar="PATH",
        default=None,
        help="in place of --text: a file of token ids, or a folder of them (dsalt-tokenize makes "
        "one); they are mapped, not read into memory",
    )
    parser.flag("val_data", metavar="PATH", default=None, help="token ids to validate on")
    parser.flag(
        "data_type",
        choices=sorted(_tokens.DTYPES),
        default=None,
        help="type of token files that do not say it themselves; default uint16",
    )
    parser.flag(
        "windows",
        choices=("sequential", "random"),
        default="sequential",
        help="sequences of --data: each token once per epoch, or beginning anywhere",
    )
    parser.flag(
        "separate_documents",
        type=truth,
        help="of --data: do not learn to predict the first token of the next document",
    )
    parser.flag(
        "val_fraction",
        type=real(0.0, 0.5),
        default=0.1,
        help="without --val-text, --val-data or a val.bin: this last part",
    )
    parser.flag(
        "tokenizer",
        default=None,
        metavar="chars|bytes|FILE",
        help="characters of the text (default), UTF-8 bytes, or any tokenizer.json, a checkpoint's "
        "too; of --data: the one in its folder; when resuming: the checkpoint's",
    )
    parser.flag("seq_len", type=positive, default=256, help="tokens per sequence")
    parser.flag("batch_size", type=positive, default=8, help="sequences per micro-batch")
    parser.flag("num_workers", type=at_least(0), default=0, help="data loading processes")

    parser.section("model (when resuming: from the checkpoint)")
    texts = {
        "d_model": "width",
        "n_layers": "blocks",
        "n_heads": "heads per block",
        "n_min": "smallest window",
        "n_max": "largest window",
        "k_lmk": "landmarks per head",
        "dropout": "dropout",
        "landmark_block": "tokens between refreshes of the landmarks",
        "tie_embeddings": "head and embedding share a matrix",
    }
    for name, default in _MODEL_DEFAULTS.items():
        kind: Any = at_least(0 if name in ("n_min", "k_lmk") else 1)
        options: dict[str, Any] = {}
        if name == "dropout":
            kind = real(0.0, 0.999)
        elif name == "tie_embeddings":
            kind = truth
        options["default"] = argparse.SUPPRESS
        parser.flag(name, type=kind, help=f"{texts[name]} (default: {default})", **options)

    parser.section("optimisation")
    parser.flag("lr", type=real(0.0, open_low=True), default=1e-3, help="highest learning rate")
    parser.flag("min_lr_ratio", type=real(0.0, 1.0), default=0.1, help="last lr / highest lr")
    parser.flag("weight_decay", type=real(0.0), default=0.1, help="AdamW's, on matrices")
    parser.flag("max_grad_norm", type=real(0.0, open_low=True), default=1.0, help="clip to")
    parser.flag("grad_accum", type=positive, default=1, help="micro-batches per step")
    parser.flag(
        "warmup_steps",
        type=at_least(0),
        default=None,
        help="default: a tenth of the steps, at most 500",
    )
    parser.flag("total_steps", type=positive, default=1000, help="optimizer steps in all")
    parser.flag(
        "schedule",
        choices=SCHEDULES,
        default="cosine",
        help="of the learning rate; wsd: stable, then down in the last fifth of the steps",
    )
    parser.flag("ema", type=real(0.0, 1.0, True), default=None, help="average the weights by this")
    parser.flag("window_reg_coef", type=real(), default=0.0, help="window regulariser's weight")
    parser.flag("seed", type=at_least(0), default=0, help="of every random number")

    parser.section("output")
    parser.flag("save_dir", default="checkpoints", metavar="DIR", help="checkpoints and log.jsonl")
    parser.flag("overwrite", type=truth, help="replace the run that --save-dir holds")
    parser.flag("save_every", type=at_least(0), default=500, help="steps between checkpoints")
    parser.flag("log_every", type=at_least(0), default=50, help="steps between log lines")
    parser.flag("val_every", type=at_least(0), default=250, help="steps between validations")
    parser.flag("keep_best", type=truth, help="keep the checkpoint of the lowest validation loss")
    parser.flag(
        "early_stopping",
        type=positive,
        default=None,
        help="end after so many validations without a lower loss",
    )
    parser.flag(
        "max_time",
        type=duration,
        default=None,
        metavar="TIME",
        help="save and end after so many seconds, or HH:MM:SS",
    )
    parser.flag("keep_last", type=positive, default=None, help="checkpoints to keep; default all")
    parser.flag(
        "resume",
        also=("--resume-from",),
        nargs="?",
        const="latest",
        default=None,
        metavar="DIR|auto",
        help="go on from a checkpoint folder; alone: from the latest; auto: if there is one",
    )
    parser.flag(
        "init_from",
        default=None,
        metavar="DIR",
        help="begin with the weights, the shape and the tokenizer of a checkpoint or a saved model",
    )
    parser.flag("tensorboard", default=None, metavar="DIR", help="TensorBoard events go there")
    parser.flag("wandb", default=None, metavar="PROJECT", help="Weights & Biases project")
    parser.flag("swanlab", default=None, metavar="PROJECT", help="SwanLab project")
    parser.flag("quiet", type=truth, help="no progress bar")

    parser.section("machine")
    parser.flag("device", default=None, help="cpu, cuda, cuda:1; default: the GPU if there is one")
    parser.flag("dtype", choices=sorted(DTYPES), default="float32", help="autocast precision")
    parser.flag("compile", type=truth, help="torch.compile the model")
    parser.flag("ddp", type=truth, help="one copy of the model per process (torchrun)")
    parser.flag("fsdp", type=truth, help="shards of the model per process (torchrun)")
    parser.flag("fsdp_cpu_offload", type=truth, help="shards live in host memory")
    parser.flag(
        "context_parallel", type=positive, default=1, help="processes that share each sequence"
    )
    parser.flag("gradient_checkpointing", type=truth, help="recompute blocks in the backward pass")
    return parser


def train(argv: Sequence[str] | None = None) -> int:
    return run("dsalt-train", _train, argv)


def _train(argv: Sequence[str] | None) -> None:
    parser = _train_parser()
    args = parser.read(argv)
    save_dir = Path(args.save_dir)
    if save_dir.exists() and not save_dir.is_dir():
        raise UsageError(f"--save-dir {save_dir} is not a folder")
    folder = None
    if args.resume is not None:
        folder = _checkpoint.resolve(args.resume, save_dir)
    source = folder
    if folder is None and args.init_from is not None:
        source = weights_folder(Path(args.init_from))
        if source is None:
            raise UsageError(f"--init-from {args.init_from}: neither weights nor step folders")
    tokenizer, vocab_size, parts = _sources(args, source)
    shape = _model_shape(args, source, resumed=folder is not None)
    if vocab_size != shape.setdefault("vocab_size", vocab_size):
        raise UsageError(
            f"the tokenizer has {vocab_size} ids, the checkpoint's model {shape['vocab_size']}"
        )
    warmup = args.warmup_steps
    if warmup is None and folder is None:
        warmup = min(500, args.total_steps // 10)
    torch.manual_seed(args.seed)
    train_set, val_set = _datasets(args, parts, vocab_size, tokenizer)
    loaders = [
        torch.utils.data.DataLoader(
            data, batch_size=args.batch_size, shuffle=shuffle, num_workers=args.num_workers
        )
        for data, shuffle in ((train_set, True), (val_set, False))
    ]
    # everything that the user's flags can get wrong is found before the first step
    options = {name: value for name, value in vars(args).items() if name in NAMES}
    options |= {
        "warmup_steps": warmup,
        "save_dir": save_dir,
        "dtype": DTYPES[args.dtype],
        "resume_from": folder,
        "tokenizer": tokenizer,
        "progress": not args.quiet,
    }
    try:
        with _warnings_as_lines():
            trainer = DSALTTrainer(
                DSALTLMHeadModel(**shape),
                loaders[0],
                loaders[1] if len(val_set) else None,
                **options,
            )
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    if trainer.world.is_main:
        _introduce(trainer, train_set, val_set, vocab_size)
    logs = trainer.train()
    if trainer.step < trainer.total_steps:
        say(f"ended at step {trainer.step} of {trainer.total_steps}; --resume goes on")
    if trainer.world.is_main:
        ready = {k: logs[k] for k in ("loss", "val_loss") if k in logs}
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in ready.items())
        where = save_dir / _checkpoint.step_name(trainer.step)
        sys.stdout.write(f"step {trainer.step}: {numbers} nats/token; checkpoint in {where}\n")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show the trainer's warnings as lines, without the place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(f"warning: {warning.message}")


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"dsalt-train: {line}\n")


def _introduce(trainer: Any, train_set: Sized, val_set: Sized, vocab_size: int) -> None:
    """One line on stderr: what is about to happen."""
    done = f", from step {trainer.step}" if trainer.step else ""
    sys.stderr.write(
        f"dsalt-train: {len(train_set)} + {len(val_set)} sequences to train on and validate, "
        f"{vocab_size} ids; {trainer.model.num_parameters() / 1e6:.2f} M parameters on "
        f"{trainer.device}; {trainer.total_steps} steps{done} into {trainer.save_dir}\n"
    )


_Part = tuple[Any, int, int]  # a sequence of ids, where a part of it begins and ends


def _sources(args: argparse.Namespace, folder: Path | None) -> tuple[Any, int, list[_Part]]:
    """(tokenizer or None, size of the vocabulary, what to train and what to validate on)."""
    if (args.text is None) == (args.data is None):
        got = "neither" if args.text is None else "both"
        raise UsageError(f"required: --text or --data, got {got} (--help lists the flags)")
    for flag, needs in (("val_text", "text"), ("val_data", "data")):
        if getattr(args, flag) is not None and getattr(args, needs) is None:
            raise UsageError(f"--{flag.replace('_', '-')} comes with --{needs}")
    tokenizer, vocab_size, train, val = (_from_text if args.data is None else _from_data)(
        args, folder
    )
    if val is None:
        cut = len(train) - int(len(train) * args.val_fraction)
        return tokenizer, vocab_size, [(train, 0, cut), (train, cut, len(train))]
    return tokenizer, vocab_size, [(train, 0, len(train)), (val, 0, len(val))]


def _from_text(args: argparse.Namespace, folder: Path | None) -> tuple[Any, int, Any, Any]:
    count, characters = _measure(args.text, "--text")
    tokenizer = pick_tokenizer(args.tokenizer, characters, folder)
    train = _encode(args.text, "--text", tokenizer, count)
    val = None
    if args.val_text is not None:
        count, _ = _measure(args.val_text, "--val-text")
        val = _encode(args.val_text, "--val-text", tokenizer, count)
    return tokenizer, tokenizer.vocab_size, train, val


def _from_data(args: argparse.Namespace, folder: Path | None) -> tuple[Any, int, Any, Any]:
    path = Path(args.data)
    try:
        train, val = _tokens.open_tokens(path, args.data_type)
        if args.val_data is not None:
            val, _ = _tokens.open_tokens(Path(args.val_data), args.data_type)
        meta = _tokens.read_meta(path)
        if folder is not None:
            tokenizer = _tokenizers.load_tokenizer(folder)
        elif args.tokenizer is not None:
            tokenizer = pick_tokenizer(args.tokenizer, None, None)
        else:
            tokenizer = _tokenizers.load_tokenizer(path if path.is_dir() else path.parent)
        if tokenizer is not None:
            return tokenizer, tokenizer.vocab_size, train, val
        if folder is not None:
            size = read_config(folder)["vocab_size"]
        else:
            size = meta.get("vocab_size") or 1 + max(t.largest() for t in (train, val) if t)
    except OSError as error:
        raise UsageError(f"--data {args.data}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--data: {error}") from error
    return None, size, train, val


def _datasets(
    args: argparse.Namespace, parts: list[_Part], vocab_size: int, tokenizer: Any
) -> list[_tokens.TokenDataset]:
    flag, own = ("data", args.val_data) if args.text is None else ("text", args.val_text)
    eos = None
    if args.separate_documents:
        eos = _tokens.read_meta(Path(args.data)).get("eos_id") if args.data else None
        if eos is None:
            raise UsageError(
                "--separate-documents needs --data with an end-of-text token, from dsalt-tokenize"
            )
    for (_, start, stop), use in zip(parts, ("train", "validate"), strict=True):
        # a last part of the text that is too short is left out; a text of its own is not
        if stop - start <= args.seq_len and (use == "train" or own is not None):
            raise UsageError(
                f"the {flag} has {stop - start} tokens to {use} on, --seq-len {args.seq_len} needs "
                f"{args.seq_len + 1}"
            )
    random = args.windows == "random"
    return [
        _tokens.TokenDataset(ids, args.seq_len, start, stop, chosen, vocab_size, eos)
        for (ids, start, stop), chosen in zip(parts, (random, False), strict=True)
    ]


def _measure(path: str, flag: str) -> tuple[int, set[str]]:
    """(number of characters, which ones) of a text that is not empty."""
    with named(flag, path):
        count, characters, written = _tokens.measure(Path(path))
    if not written:
        raise UsageError(f"{flag} {path} is empty")
    return count, characters


def _encode(path: str, flag: str, tokenizer: Any, count: int) -> Any:
    with named(flag, path):
        ids, unknown = _tokens.encode_file(Path(path), tokenizer, count)
    report_unknown("dsalt-train", unknown, count, flag)
    return ids


def _model_shape(args: argparse.Namespace, folder: Path | None, resumed: bool) -> dict[str, Any]:
    """Constructor arguments: the flags, over the checkpoint's configuration, over the defaults."""
    given = {k: v for k, v in vars(args).items() if k in _MODEL_DEFAULTS}
    if folder is None:
        return {**_MODEL_DEFAULTS, **given}
    try:
        config = read_config(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    changed = [
        f"--{name.replace('_', '-')} {value} (the checkpoint has {config[name]})"
        for name, value in given.items()
        if name in config and config[name] != value
    ]
    if resumed and changed:
        raise UsageError(
            f"does not fit this model: {', '.join(changed)}; a resumed run keeps its model, "
            f"--init-from begins another run from its weights"
        )
    return {**config, **given}
