"""``dsalt-generate``: continue a text, and show it as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .arguments import Parser, UsageError, at_least, real
from .exit import run
from .files import load_model, report_unknown, unknown_characters


def generate(argv: Sequence[str] | None = None) -> int:
    return run("dsalt-generate", _generate, argv)


def _generate(argv: Sequence[str] | None) -> None:
    parser = Parser(
        "dsalt-generate",
        "--checkpoint DIR --prompt TEXT",
        "Continue a text with a model that dsalt-train has trained.",
    )
    parser.section("what")
    parser.flag(
        "checkpoint",
        default="checkpoints",
        metavar="DIR",
        help="a checkpoint, or the folder of a run (its latest)",
    )
    parser.flag(
        "prompt", default=None, metavar="TEXT", help="text to continue; default: a new line"
    )
    parser.flag("max_new_tokens", type=at_least(1), default=200, help="tokens to add")
    parser.section("how")
    parser.flag("temperature", type=real(0.0), default=0.8, help="0: always the likeliest token")
    parser.flag("top_k", type=at_least(1), default=None, help="sample among the k likeliest")
    parser.flag("top_p", type=real(0.0, 1.0, True), default=None, help="sample within this mass")
    parser.flag("seed", type=at_least(0), default=0, help="of the sampling")
    parser.flag("device", default=None, help="cpu, cuda, …; default: the GPU if there is one")
    args = parser.read(argv)
    model, tokenizer, device = load_model(args)
    prompt = args.prompt
    if prompt is None:
        prompt = tokenizer.decode([1]) if unknown_characters(tokenizer, "\n") else "\n"
    if not prompt or not (ids := tokenizer.encode(prompt)):
        raise UsageError("--prompt is empty")
    report_unknown("dsalt-generate", unknown_characters(tokenizer, prompt), len(prompt), "--prompt")
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
