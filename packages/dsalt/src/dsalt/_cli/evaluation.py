"""``dsalt-eval``: how well a model predicts a text."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import torch

from .._labels import IGNORE_INDEX
from ..model import DSALTLMHeadModel
from .arguments import DTYPES, Parser, UsageError, at_least, truth
from .exit import run
from .files import load_model, read_text, report_unknown, unknown_characters


def _eval_parser() -> Parser:
    parser = Parser(
        "dsalt-eval",
        "--checkpoint DIR --text FILE",
        "Perplexity and bits per byte of a model on a text.",
    )
    parser.section("what")
    parser.flag(
        "checkpoint",
        default="checkpoints",
        metavar="DIR",
        help="a checkpoint, or the folder of a run (its latest)",
    )
    parser.flag("text", metavar="FILE", required=True, help="UTF-8 text to score")
    parser.flag("seq_len", type=at_least(1), default=256, help="tokens that a token may see")
    parser.flag(
        "stride",
        type=at_least(1),
        default=None,
        help="tokens scored at a time; less than --seq-len gives them more to see",
    )
    parser.flag("json", type=truth, help="print one JSON object")
    parser.section("machine")
    parser.flag("device", default=None, help="cpu, cuda, …; default: the GPU if there is one")
    parser.flag("dtype", choices=sorted(DTYPES), default="float32", help="autocast precision")
    return parser


def _evaluate(argv: Sequence[str] | None) -> None:
    args = _eval_parser().read(argv)
    stride = args.seq_len if args.stride is None else args.stride
    if stride > args.seq_len:
        raise UsageError(f"--stride {stride} leaves tokens out: at most --seq-len {args.seq_len}")
    text = read_text(args.text, "--text")
    model, tokenizer, device = load_model(args)
    report_unknown("dsalt-eval", unknown_characters(tokenizer, text), len(text), "--text")
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    if len(ids) < 2:
        raise UsageError(f"--text {args.text} has {len(ids)} tokens: the first has none before it")
    with torch.autocast(
        device.type, dtype=DTYPES[args.dtype], enabled=args.dtype not in ("float32", "fp32")
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
        labels[: start - begin] = IGNORE_INDEX  # scored before
        given = (ids[None, begin:end], labels[None])
        loss, _ = model(*given, return_logits=False, return_dict=False)
        total += float(loss.double()) * (end - start)
    return total


def evaluate(argv: Sequence[str] | None = None) -> int:
    return run("dsalt-eval", _evaluate, argv)
