"""Train a language model: the trainer, its settings, and ``python -m dsalt.training``."""

from __future__ import annotations

from collections.abc import Sequence

from ._cli import train
from ._config import Schedule, TrainConfig
from ._trainer import DSALTTrainer, TrainerCallback

__all__ = ["DSALTTrainer", "Schedule", "TrainConfig", "TrainerCallback", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line ``dsalt-train``: returns the exit code, 2 for bad arguments."""
    return train(argv)


if __name__ == "__main__":
    raise SystemExit(main())
