"""Where the numbers of a run go: a JSON-lines file always, TensorBoard and SwanLab on request."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import secrets
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checkpoint import LOG_NAME
from .modules import DSALTAttention

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
            # the log of a run that left no checkpoint is kept under another name
            old = (self.path.with_name(f"log.{i}.jsonl") for i in itertools.count(1))
            self.path.rename(next(path for path in old if not path.exists()))
        beside = self.path.with_name(f".{LOG_NAME}")
        try:
            beside.write_text("".join(kept), encoding="utf-8")
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)  # a full disk leaves a part of the file

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
    kinds = {"tensorboard": TensorBoard, "swanlab": SwanLab, "wandb": WandB}
    return [
        kind(getattr(config, name))
        for name, kind in kinds.items()
        if getattr(config, name) is not None
    ]


class MonitorError(RuntimeError):
    """A service for logs does not start; its text is one line."""


def new_run_id() -> str:
    """Eight letters and digits that name a run, across its resumes too; no seed decides them."""
    return secrets.token_hex(4)


SAMPLE_TOKENS = 256  # tokens of one sequence


@torch.no_grad()
def health(
    model: nn.Module, ids: Tensor, precision: AbstractContextManager[Any]
) -> dict[str, float]:
    """What each attention layer does on a sequence (1, N): three numbers per layer.

    ``window/3`` is layer 3's mean window in tokens; ``landmark_share/3`` the share of its weights
    that lies outside the windows, on landmarks; ``attention_entropy/3`` the mean entropy of a
    token's weights in nats. Empty for a model without such layers and for one in shards.
    """
    layers = [m for m in model.modules() if isinstance(m, DSALTAttention)]
    if not layers or any(hasattr(p, "device_mesh") for p in model.parameters()):
        return {}
    inputs: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(layer)] = args[0]

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        with precision:
            model(ids)
        logs: dict[str, float] = {}
        for i, layer in enumerate(layers):
            if id(layer) in inputs:
                for name, value in _look(layer, inputs[id(layer)]).items():
                    logs[f"{name}/{i}"] = value
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return logs


def _look(layer: DSALTAttention, x: Tensor) -> dict[str, float]:
    weights, windows = layer.weights(x.to(layer.q_proj.weight.dtype))  # (1, H, N, N), (1, H, N)
    weights = weights.double()
    place = torch.arange(x.shape[1], device=x.device)
    distance = place[:, None] - place
    # a key within the window and its soft edge belongs to the window
    outside = distance > windows[..., None] + layer.window_ramp
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return {
        "window": float(windows.double().mean()),
        "landmark_share": float((weights * outside).sum(-1).mean()),
        "attention_entropy": float(entropy.mean()),
    }


def _numbers(logs: dict[str, Any]) -> dict[str, float]:
    values = {k: plain(v) for k, v in logs.items() if k != "step"}
    return {k: v for k, v in values.items() if isinstance(v, (int, float))}


class TensorBoard:
    """A callback that writes every logged number as a TensorBoard scalar.

    The settings are written as a text. Flushed at each log, so that a killed run shows what it had;
    a resumed run hides what was written after its checkpoint.
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
            rows = [f"| {k} | {v} |" for k, v in trainer.hyper_parameters().items()]
            table = "\n".join(["| setting | value |", "|---|---|", *rows])
            self._writer.add_text("hyper_parameters", table, trainer.step)

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


class _Service:
    """A callback that sends every logged number, and the settings once, to a service.

    A resumed run goes on under the id that its checkpoint holds.
    """

    name = extra = ""

    def __init__(self, project: str) -> None:
        try:
            self._module = importlib.import_module(self.name)
        except ImportError as error:
            raise ImportError(
                f"{self.name}=… needs the package {self.name}: pip install 'dsalt[{self.extra}]'"
            ) from error
        self._project = project

    def on_train_begin(self, trainer: Any) -> None:
        if trainer.world.is_main:
            settings = {"id": trainer.run_id, "config": trainer.hyper_parameters()}
            try:
                self._module.init(project=self._project, resume="allow", **settings)
            except Exception as error:  # of any type: not logged in, no network, no terminal
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise MonitorError(
                    f"{self.name} does not start: {why}; log in with its own command, or set "
                    f"{self.name.upper()}_MODE=offline"
                ) from error

    def on_log(self, trainer: Any, logs: dict[str, Any]) -> None:
        if trainer.world.is_main:
            self._module.log(_numbers(logs), step=logs["step"])

    on_validation = on_log

    def on_train_end(self, trainer: Any) -> None:
        if trainer.world.is_main:
            self._module.finish()


class SwanLab(_Service):
    """SwanLab. Its own variables hold: ``SWANLAB_MODE=offline`` writes to ``SWANLAB_LOG_DIR``."""

    name, extra = "swanlab", "monitoring"


class WandB(_Service):
    """Weights & Biases. Its own variables hold: ``WANDB_MODE=offline`` writes to ``WANDB_DIR``."""

    name, extra = "wandb", "monitoring"
