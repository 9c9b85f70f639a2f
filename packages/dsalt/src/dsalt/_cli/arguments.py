"""Flags: how they are written, which values they take, and what is said of a wrong one."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .._version import __version__

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class UsageError(Exception):
    """What the user gave cannot be used; its text is the one line that they see."""


class _Help(argparse.HelpFormatter):
    """Defaults are shown where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


class Parser(argparse.ArgumentParser):
    """Errors are one line; ``--batch-size`` and ``--batch_size`` are the same flag.

    Args:
        program: the command's name.
        needs: the flags that it cannot do without, as its usage shows them.
        description, epilog: what stands above and below the list of flags.
    """

    def __init__(self, program: str, needs: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=program,
            usage=f"{program} {needs} [flags]",
            description=description,
            epilog=epilog,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"dsalt {__version__}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")

    def flag(self, name: str, also: Sequence[str] = (), **options: Any) -> None:
        kind = options.get("type")
        if kind is truth:
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


def truth(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
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


def real(
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


def duration(text: str) -> float:
    parts = text.split(":")
    try:
        seconds = sum(float(part) * 60.0**i for i, part in enumerate(reversed(parts)))
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < math.inf or len(parts) > 3 or "-" in text:
        raise argparse.ArgumentTypeError(f"expected seconds or HH:MM:SS, got {text!r}")
    return seconds
