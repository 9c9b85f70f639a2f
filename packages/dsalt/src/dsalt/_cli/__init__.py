"""The command lines ``dsalt-train``, ``dsalt-generate`` and ``dsalt-eval``."""

from __future__ import annotations

from .evaluation import evaluate
from .generation import generate
from .training import train

__all__ = ["evaluate", "generate", "train"]
