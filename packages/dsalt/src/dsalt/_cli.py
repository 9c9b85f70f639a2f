"""The command lines ``dsalt-train``, ``dsalt-generate`` and ``dsalt-eval``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import _checkpoint, _tokenizers, _tokens
from ._config import NAMES, SCHEDULES
from ._files import CONFIG_NAME, read_config
from ._monitor import MonitorError
from ._version import __version__
from .model import DSALTLMHeadModel

__all__: list[str] = []

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
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


class UsageError(Exception):
    """What the user gave cannot be used; its text is the one line that they see."""


class _Help(argparse.HelpFormatter):
    """Defaults are shown where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


class _Parser(argparse.ArgumentParser):
    """Errors are one line; ``--batch-size`` and ``--batch_size`` are the same flag."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")

    def flag(self, name: str, also: Sequence[str] = (), **options: Any) -> None:
        kind = options.get("type")
        if kind is _truth:
            switch = {"nargs": "?", "const": True, "default": False, "metavar": "true|false"}
            options = {**switch, **options}
        elif kind is not None:
            options.setdefault("metavar", "N" if kind.__qualname__.startswith("_at") else "X")
        self._group.add_argument(f"--{name.replace('_', '-')}", *also, dest=name, **options)

    def section(self, title: str) -> None:
        self._group = self.add_argument_group(title)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                word = flag.replace("_", "-") + equals + value
            words.append(word)
        return self.parse_args(words)


def _truth(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return number


def _real(
    low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        inside = low <= value <= high and math.isfinite(value) and not (open_low and value == low)
        if not inside:
            bounds = (
                f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
            )
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return number


def _duration(text: str) -> float:
    parts = text.split(":")
    try:
        seconds = sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < math.inf or len(parts) > 3 or "-" in text:
        raise argparse.ArgumentTypeError(f"expected seconds or HH:MM:SS, got {text!r}")
    return seconds


def _train_parser() -> _Parser:
    parser = _Parser(
        prog="dsalt-train",
        usage="dsalt-train (--text FILE | --data PATH) [flags]",
        description="Train a language model with window + landmark attention on a text file, or "
        "on files of token ids.",
        epilog="several GPUs: torchrun --nproc_per_node=2 -m dsalt.training --text FILE --fsdp",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsalt {__version__}")
    positive = _at_least(1)
    parser.section("data")
    parser.flag("text", metavar="FILE", default=None, help="UTF-8 text to learn")
    parser.flag("val_text", metavar="FILE", default=None, help="text to validate on")
    parser.flag(
        "data", metavar="PATH", default=None,
        help="in place of --text: a file of token ids, or a folder of them (dsalt-tokenize makes "
        "one); they are mapped, not read into memory",
    )  # fmt: skip
    parser.flag("val_data", metavar="PATH", default=None, help="token ids to validate on")
    parser.flag(
        "data_type", choices=sorted(_tokens.DTYPES), default=None,
        help="type of token files that do not say it themselves; default uint16",
    )  # fmt: skip
    parser.flag(
        "windows", choices=("sequential", "random"), default="sequential",
        help="sequences of --data: each token once per epoch, or beginning anywhere",
    )  # fmt: skip
    parser.flag(
        "separate_documents", type=_truth,
        help="of --data: do not learn to predict the first token of the next document",
    )  # fmt: skip
    parser.flag(
        "val_fraction", type=_real(0.0, 0.5), default=0.1,
        help="without --val-text, --val-data or a val.bin: this last part",
    )  # fmt: skip
    parser.flag(
        "tokenizer", default=None, metavar="chars|bytes|FILE",
        help="characters of the text (default), UTF-8 bytes, or any tokenizer.json, a checkpoint's "
        "too; of --data: the one in its folder; when resuming: the checkpoint's",
    )  # fmt: skip
    parser.flag("seq_len", type=positive, default=256, help="tokens per sequence")
    parser.flag("batch_size", type=positive, default=8, help="sequences per micro-batch")
    parser.flag("num_workers", type=_at_least(0), default=0, help="data loading processes")

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
        kind: Any = _at_least(0 if name in ("n_min", "k_lmk") else 1)
        options: dict[str, Any] = {}
        if name == "dropout":
            kind = _real(0.0, 0.999)
        elif name == "tie_embeddings":
            kind = _truth
        options["default"] = argparse.SUPPRESS
        parser.flag(name, type=kind, help=f"{texts[name]} (default: {default})", **options)

    parser.section("optimisation")
    parser.flag("lr", type=_real(0.0, open_low=True), default=1e-3, help="highest learning rate")
    parser.flag("min_lr_ratio", type=_real(0.0, 1.0), default=0.1, help="last lr / highest lr")
    parser.flag("weight_decay", type=_real(0.0), default=0.1, help="AdamW's, on matrices")
    parser.flag("max_grad_norm", type=_real(0.0, open_low=True), default=1.0, help="clip to")
    parser.flag("grad_accum", type=positive, default=1, help="micro-batches per step")
    parser.flag(
        "warmup_steps",
        type=_at_least(0),
        default=None,
        help="default: a tenth of the steps, at most 500",
    )
    parser.flag("total_steps", type=positive, default=1000, help="optimizer steps in all")
    parser.flag(
        "schedule", choices=SCHEDULES, default="cosine",
        help="of the learning rate; wsd: stable, then down in the last fifth of the steps",
    )  # fmt: skip
    parser.flag("ema", type=_real(0.0, 1.0, True), default=None, help="average the weights by this")
    parser.flag("window_reg_coef", type=_real(), default=0.0, help="window regulariser's weight")
    parser.flag("seed", type=_at_least(0), default=0, help="of every random number")

    parser.section("output")
    parser.flag("save_dir", default="checkpoints", metavar="DIR", help="checkpoints and log.jsonl")
    parser.flag("overwrite", type=_truth, help="replace the run that --save-dir holds")
    parser.flag("save_every", type=_at_least(0), default=500, help="steps between checkpoints")
    parser.flag("log_every", type=_at_least(0), default=50, help="steps between log lines")
    parser.flag("val_every", type=_at_least(0), default=250, help="steps between validations")
    parser.flag("keep_best", type=_truth, help="keep the checkpoint of the lowest validation loss")
    parser.flag(
        "early_stopping", type=positive, default=None,
        help="end after so many validations without a lower loss",
    )  # fmt: skip
    parser.flag(
        "max_time", type=_duration, default=None, metavar="TIME",
        help="save and end after so many seconds, or HH:MM:SS",
    )  # fmt: skip
    parser.flag("keep_last", type=positive, default=None, help="checkpoints to keep; default all")
    parser.flag(
        "resume", also=("--resume-from",), nargs="?", const="latest",
        default=None, metavar="DIR|auto",
        help="go on from a checkpoint folder; alone: from the latest; auto: if there is one",
    )  # fmt: skip
    parser.flag(
        "init_from", default=None, metavar="DIR",
        help="begin with the weights, the shape and the tokenizer of a checkpoint or a saved model",
    )  # fmt: skip
    parser.flag("tensorboard", default=None, metavar="DIR", help="TensorBoard events go there")
    parser.flag("wandb", default=None, metavar="PROJECT", help="Weights & Biases project")
    parser.flag("swanlab", default=None, metavar="PROJECT", help="SwanLab project")
    parser.flag("quiet", type=_truth, help="no progress bar")

    parser.section("machine")
    parser.flag("device", default=None, help="cpu, cuda, cuda:1; default: the GPU if there is one")
    parser.flag("dtype", choices=sorted(_DTYPES), default="float32", help="autocast precision")
    parser.flag("compile", type=_truth, help="torch.compile the model")
    parser.flag("ddp", type=_truth, help="one copy of the model per process (torchrun)")
    parser.flag("fsdp", type=_truth, help="shards of the model per process (torchrun)")
    parser.flag("fsdp_cpu_offload", type=_truth, help="shards live in host memory")
    parser.flag("gradient_checkpointing", type=_truth, help="recompute blocks in the backward pass")
    return parser


def train(argv: Sequence[str] | None = None) -> int:
    return _run("dsalt-train", _train, argv)


def generate(argv: Sequence[str] | None = None) -> int:
    return _run("dsalt-generate", _generate, argv)


def _run(program: str, command: Callable[[Any], None], argv: Sequence[str] | None) -> int:
    """0; 2 after one line that says what cannot be used; 1 if it diverged or the disk is full.

    130 after Ctrl-C, 128 + number after another signal.
    """
    try:
        command(argv)
    except BrokenPipeError:
        return 0
    except (
        UsageError,
        FileNotFoundError,
        FileExistsError,
        BlockingIOError,
        ImportError,
        MonitorError,
    ) as error:
        return _complain(program, error)
    except (FloatingPointError, OSError) as error:
        return _complain(program, error, code=1)
    except (KeyboardInterrupt, SystemExit) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if code == 130 or (isinstance(code, int) and code > 128):
            line = "interrupted; --resume goes on from the last checkpoint"
            sys.stderr.write(f"\n{program}: {line}\n")
            return code
        raise
    return 0


def _complain(program: str, error: Exception, code: int = 2) -> int:
    if os.environ.get("RANK", "0") == "0":
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {text}"
        sys.stderr.write(f"{program}: error: {' '.join(text.split())}\n")
    return code


def _train(argv: Sequence[str] | None) -> None:
    from .training import DSALTTrainer, weights_folder

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
        "dtype": _DTYPES[args.dtype],
        "resume_from": folder,
        "tokenizer": tokenizer,
        "progress": not args.quiet,
    }
    try:
        with _warnings_as_lines():
            trainer = DSALTTrainer(
                DSALTLMHeadModel(**shape), loaders[0], loaders[1] if len(val_set) else None,
                **options,
            )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    if trainer.world.is_main:
        _introduce(trainer, train_set, val_set, vocab_size)
    logs = trainer.train()
    if trainer.step < trainer.total_steps:
        _say(f"ended at step {trainer.step} of {trainer.total_steps}; --resume goes on")
    if trainer.world.is_main:
        ready = {k: logs[k] for k in ("loss", "val_loss") if k in logs}
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in ready.items())
        where = save_dir / _checkpoint.step_name(trainer.step)
        sys.stdout.write(f"step {trainer.step}: {numbers} nats/token; checkpoint in {where}\n")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the trainer warns of is a line for the user, not a place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            _say(f"warning: {warning.message}")


def _say(line: str) -> None:
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
    tokenizer = _pick_tokenizer(args.tokenizer, characters, folder)
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
            tokenizer = _pick_tokenizer(args.tokenizer, None, None)
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


@contextmanager
def _named(flag: str, path: str) -> Iterator[None]:
    """What cannot be read is said by the name of its flag."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error


def _measure(path: str, flag: str) -> tuple[int, set[str]]:
    """(number of characters, which ones) of a text that is not empty."""
    with _named(flag, path):
        count, characters, written = _tokens.measure(Path(path))
    if not written:
        raise UsageError(f"{flag} {path} is empty")
    return count, characters


def _encode(path: str, flag: str, tokenizer: Any, count: int) -> Any:
    with _named(flag, path):
        ids, unknown = _tokens.encode_file(Path(path), tokenizer, count)
    _report_unknown("dsalt-train", unknown, count, flag)
    return ids


def _read(path: str, flag: str) -> str:
    with _named(flag, path):
        text = "".join(_tokens.read_text(Path(path)))
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty")
    return text


def _pick_tokenizer(wanted: str | None, characters: set[str] | None, folder: Path | None) -> Any:
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
        return _tokenizers.read_tokenizer(_read(wanted, "--tokenizer"))
    except ValueError as error:
        raise UsageError(f"--tokenizer {wanted}: {error}") from error


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


def _generate(argv: Sequence[str] | None) -> None:
    parser = _Parser(
        prog="dsalt-generate",
        usage="dsalt-generate --checkpoint DIR --prompt TEXT [flags]",
        description="Continue a text with a model that dsalt-train has trained.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsalt {__version__}")
    parser.section("what")
    parser.flag(
        "checkpoint", default="checkpoints", metavar="DIR",
        help="a checkpoint, or the folder of a run (its latest)",
    )  # fmt: skip
    parser.flag(
        "prompt", default=None, metavar="TEXT", help="text to continue; default: a new line"
    )
    parser.flag("max_new_tokens", type=_at_least(1), default=200, help="tokens to add")
    parser.section("how")
    parser.flag("temperature", type=_real(0.0), default=0.8, help="0: always the likeliest token")
    parser.flag("top_k", type=_at_least(1), default=None, help="sample among the k likeliest")
    parser.flag("top_p", type=_real(0.0, 1.0, True), default=None, help="sample within this mass")
    parser.flag("seed", type=_at_least(0), default=0, help="of the sampling")
    parser.flag("device", default=None, help="cpu, cuda, …; default: the GPU if there is one")
    args = parser.read(argv)
    model, tokenizer, device = _load_model(args)
    prompt = args.prompt
    if prompt is None:
        prompt = tokenizer.decode([1]) if _unknown(tokenizer, "\n") else "\n"
    if not prompt or not (ids := tokenizer.encode(prompt)):
        raise UsageError("--prompt is empty")
    _report_unknown("dsalt-generate", _unknown(tokenizer, prompt), len(prompt), "--prompt")
    generator = torch.Generator(device=device).manual_seed(args.seed)
    shown = _Continuation(tokenizer, ids)
    sys.stdout.write(prompt)
    model.generate(
        torch.tensor([ids], device=device),
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        generator=generator,
        streamer=lambda token: shown.add(int(token)),
    )
    shown.end()


class _Continuation:
    """Writes the text that new tokens add to a prompt, each as soon as it comes.

    A token is decoded together with those before it, because some tokenizers drop the space at the
    begin of a text; one that ends inside a character waits for the rest of its bytes.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.context, self.written = 0, len(prompt)  # ids[written:] are not on the screen

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._write(final=False)

    def end(self) -> None:
        self._write(final=True)
        sys.stdout.write("\n")

    def _write(self, final: bool) -> None:
        before = self.tokenizer.decode(self.ids[self.context : self.written])
        text = self.tokenizer.decode(self.ids[self.context :])
        if len(text) > len(before) and (final or not text.endswith("\ufffd")):
            sys.stdout.write(text[len(before) :])
            sys.stdout.flush()
            self.context, self.written = self.written, len(self.ids)


def _eval_parser() -> _Parser:
    parser = _Parser(
        prog="dsalt-eval",
        usage="dsalt-eval --checkpoint DIR --text FILE [flags]",
        description="Perplexity and bits per byte of a model on a text.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsalt {__version__}")
    parser.section("what")
    parser.flag(
        "checkpoint", default="checkpoints", metavar="DIR",
        help="a checkpoint, or the folder of a run (its latest)",
    )  # fmt: skip
    parser.flag("text", metavar="FILE", required=True, help="UTF-8 text to score")
    parser.flag("seq_len", type=_at_least(1), default=256, help="tokens that a token may see")
    parser.flag(
        "stride", type=_at_least(1), default=None,
        help="tokens scored at a time; less than --seq-len gives them more to see",
    )  # fmt: skip
    parser.flag("json", type=_truth, help="print one JSON object")
    parser.section("machine")
    parser.flag("device", default=None, help="cpu, cuda, …; default: the GPU if there is one")
    parser.flag("dtype", choices=sorted(_DTYPES), default="float32", help="autocast precision")
    return parser


def _evaluate(argv: Sequence[str] | None) -> None:
    args = _eval_parser().read(argv)
    stride = args.seq_len if args.stride is None else args.stride
    if stride > args.seq_len:
        raise UsageError(f"--stride {stride} leaves tokens out: at most --seq-len {args.seq_len}")
    text = _read(args.text, "--text")
    model, tokenizer, device = _load_model(args)
    _report_unknown("dsalt-eval", _unknown(tokenizer, text), len(text), "--text")
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    if len(ids) < 2:
        raise UsageError(f"--text {args.text} has {len(ids)} tokens: the first has none before it")
    with torch.autocast(
        device.type, dtype=_DTYPES[args.dtype], enabled=args.dtype not in ("float32", "fp32")
    ):
        total = _total_loss(model, ids.to(device), args.seq_len, stride)
    tokens, size = len(ids) - 1, len(text.encode("utf-8"))
    loss = total / tokens
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2.0) / size,
        "tokens": tokens,
        "bytes": size,
    }
    line = (
        f"loss {loss:.4f} nats/token, perplexity {result['perplexity']:.4g}, "
        f"{result['bits_per_byte']:.4f} bits/byte over {tokens} tokens ({size} bytes)"
    )
    sys.stdout.write((json.dumps(result) if args.json else line) + "\n")


@torch.no_grad()
def _total_loss(model: DSALTLMHeadModel, ids: torch.Tensor, length: int, stride: int) -> float:
    """Sum of -log p(token | up to ``length`` tokens before it) of every token but the first."""
    total = 0.0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + stride, len(ids) - 1)
        begin = max(0, end - length)
        labels = ids[begin + 1 : end + 1].clone()
        labels[: start - begin] = -100  # scored before
        given = (ids[None, begin:end], labels[None])
        loss, _ = model(*given, return_logits=False, return_dict=False)
        total += float(loss.double()) * (end - start)
    return total


def evaluate(argv: Sequence[str] | None = None) -> int:
    return _run("dsalt-eval", _evaluate, argv)


def _load_model(args: argparse.Namespace) -> tuple[DSALTLMHeadModel, Any, torch.device]:
    """(model, tokenizer, device) of ``--checkpoint`` and ``--device``."""
    from ._distributed import pick_device

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


def _unknown(tokenizer: Any, text: str) -> Mapping[str, int]:
    unknown: Any = getattr(tokenizer, "unknown", None)
    return {} if unknown is None else unknown(text)


def _report_unknown(program: str, found: Mapping[str, int], characters: int, flag: str) -> None:
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
