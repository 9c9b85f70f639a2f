"""Where the numbers of a run go: a JSON-lines file always, TensorBoard and SwanLab on request."""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from torch import Tensor

from ._checkpoint import LOG_NAME

__all__: list[str] = []


class JsonLog:
    """One JSON object per line. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME

    def begin(self, step: int | None) -> None:
        """Keep the lines up to ``step``, of the run that goes on there; None: a run of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a killed process was writing
        elif self.path.is_file() and self.path.stat().st_size:
            # of a run that left no checkpoint
            old = (self.path.with_name(f"log.{i}.jsonl") for i in itertools.count(1))
            self.path.rename(next(path for path in old if not path.exists()))
        beside = self.path.with_name(f".{LOG_NAME}")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self.path)

    def write(self, logs: dict[str, Any]) -> None:
        line = json.dumps({k: plain(v) for k, v in logs.items()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)


def monitors(config: Any) -> list[Any]:
    """The callbacks that were asked for by name."""
    kinds = {"tensorboard": TensorBoard, "swanlab": SwanLab}
    return [
        kind(getattr(config, name))
        for name, kind in kinds.items()
        if getattr(config, name) is not None
    ]


def new_run_id() -> str:
    """Eight letters and digits that name a run, across its resumes too; no seed decides them."""
    return secrets.token_hex(4)


def _numbers(logs: dict[str, Any]) -> dict[str, float]:
    values = {k: plain(v) for k, v in logs.items() if k != "step"}
    return {k: v for k, v in values.items() if isinstance(v, (int, float))}


class TensorBoard:
    """A callback that writes every logged number as a TensorBoard scalar.

    Flushed at each log, so that a killed run shows what it had; a resumed run hides what was
    written after its checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard=… needs TensorBoard: pip install 'dsalt[monitoring]'"
            ) from error
        self._open = lambda step: SummaryWriter(os.fspath(folder), purge_step=step)
        self._writer: Any = None

    def on_train_begin(self, trainer: Any) -> None:
        if trainer.world.is_main:
            self._writer = self._open(trainer.step + 1 if trainer.step else None)

    def on_log(self, trainer: Any, logs: dict[str, Any]) -> None:
        if trainer.world.is_main:
            for name, value in _numbers(logs).items():
                self._writer.add_scalar(name, value, logs["step"])
            self._writer.flush()

    on_validation = on_log

    def on_train_end(self, trainer: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class SwanLab:
    """A callback that sends every logged number to a SwanLab project.

    SwanLab's own variables hold: ``SWANLAB_MODE=offline`` writes to ``SWANLAB_LOG_DIR`` only.
    """

    def __init__(self, project: str) -> None:
        try:
            import swanlab
        except ImportError as error:
            raise ImportError("swanlab=… needs SwanLab: pip install 'dsalt[monitoring]'") from error
        self._swanlab, self._project = swanlab, project

    def on_train_begin(self, trainer: Any) -> None:
        if trainer.world.is_main:
            self._swanlab.init(project=self._project)

    def on_log(self, trainer: Any, logs: dict[str, Any]) -> None:
        if trainer.world.is_main:
            self._swanlab.log(_numbers(logs), step=logs["step"])

    on_validation = on_log

    def on_train_end(self, trainer: Any) -> None:
        if trainer.world.is_main:
            self._swanlab.finish()
