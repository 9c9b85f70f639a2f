"""The settings of a run: one frozen record that the trainer and the command line share."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared_kernels import checks

__all__: list[str] = []

SCHEDULES = ("cosine", "wsd", "constant")
_COUNTS = {
    "warmup_steps": 0,
    "total_steps": 1,
    "grad_accum": 1,
    "log_every": 0,
    "val_every": 0,
    "save_every": 0,
    "keep_last": 1,
    "max_val_batches": 1,
    "early_stopping": 1,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of an optimizer step, as a factor of the highest; steps count from 0.

    (k + 1) / warmup_steps while k < warmup_steps. Then "cosine" falls from 1 to min_lr_ratio at
    total_steps along half a cosine; "wsd" (warm-up, stable, decay) stays 1 and falls in a straight
    line during the last ``decay_fraction`` of total_steps; "constant" stays 1. It depends on the
    step alone, so that a resumed run has the learning rates of one that was not interrupted.

    Args:
        kind: "cosine", "wsd" or "constant".
        warmup_steps, total_steps: in optimizer steps.
        min_lr_ratio: the last factor, in [0, 1].
        decay_fraction: of "wsd", in (0, 1].

    Example:
        >>> schedule = Schedule("wsd", warmup_steps=2, total_steps=10, min_lr_ratio=0.0)
        >>> tuple(schedule(step) for step in (0, 1, 5, 9))
        (0.5, 1.0, 1.0, 0.5)
    """

    kind: str = "cosine"
    warmup_steps: int = 0
    total_steps: int = 1
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        checks.in_set("schedule", self.kind, SCHEDULES)
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            checks.fail("min_lr_ratio", "be in [0, 1]", self.min_lr_ratio)
        if not 0.0 < self.decay_fraction <= 1.0:
            checks.fail("decay_fraction", "be in (0, 1]", self.decay_fraction)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            length = max(1, round(self.decay_fraction * self.total_steps))
            left = min(1.0, max(0, self.total_steps - step) / length)
        else:
            length = max(1, self.total_steps - self.warmup_steps)
            done = min(1.0, (step - self.warmup_steps) / length)
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is told beside its model and its data; checked when it is made.

    The arguments are those of :class:`DSALTTrainer`, where they are explained. The first nineteen
    may also be given to the trainer by position, in this order.

    Example:
        >>> config = TrainConfig(lr=1e-3, warmup_steps=10, total_steps=100)
        >>> dataclasses.replace(config, schedule="wsd").learning_rate(50)
        0.001
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    warmup_steps: int | None = 500
    total_steps: int = 100_000
    grad_accum: int = 2
    log_every: int = 50
    val_every: int = 500
    save_every: int = 1000
    save_dir: str | os.PathLike[str] = "checkpoints"
    dtype: torch.dtype = torch.bfloat16
    window_reg_coef: float = 0.0
    compute_metrics_fn: Callable[..., dict[str, Any]] | None = None
    device: torch.device | str | None = None
    resume_from: str | os.PathLike[str] | None = None
    ddp: bool = False
    fsdp: bool = False
    fsdp_cpu_offload: bool = False
    gradient_checkpointing: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    min_lr_ratio: float = 0.1
    keep_last: int | None = None
    shift_labels: bool = False
    max_val_batches: int | None = None
    callbacks: Sequence[Any] = ()
    seed: int | None = None
    tokenizer: Any = None
    progress: bool = True
    tensorboard: str | os.PathLike[str] | None = None
    swanlab: str | None = None
    find_unused_parameters: bool = False
    schedule: str | Callable[[int], float] = "cosine"
    optimizer: Any = None
    loss: str | Callable[..., Any] | None = None
    overwrite: bool = False
    init_from: str | os.PathLike[str] | None = None
    keep_best: bool = False
    early_stopping: int | None = None
    ema: float | None = None
    max_time: float | None = None
    compile: bool = False
    wandb: str | None = None
    health: bool = True
    context_parallel: int = 1

    def __post_init__(self) -> None:
        if not self.lr > 0.0:
            checks.fail("lr", "be positive", self.lr)
        if not self.weight_decay >= 0.0:
            checks.fail("weight_decay", "be at least 0", self.weight_decay)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            checks.fail("max_grad_norm", "be positive", self.max_grad_norm, "None does not clip")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and value < least:
                checks.fail(name, f"be at least {least}", value)
        checks.in_set("dtype", self.dtype, (torch.float32, torch.bfloat16, torch.float16))
        if self.ddp and self.fsdp:
            checks.fail("ddp and fsdp", "not both be True", "both", "choose one")
        if self.fsdp_cpu_offload and not self.fsdp:
            checks.fail("fsdp_cpu_offload", "come with fsdp=True", "fsdp=False")
        checks.positive_int("context_parallel", self.context_parallel)
        if self.context_parallel > 1 and self.compile:
            checks.fail(
                "compile",
                "be False with context_parallel",
                True,
                "messages between ranks are not compiled",
                NotImplementedError,
            )
        if not callable(self.schedule):
            Schedule(self.schedule, min_lr_ratio=self.min_lr_ratio)
        elif not 0.0 <= self.min_lr_ratio <= 1.0:
            checks.fail("min_lr_ratio", "be in [0, 1]", self.min_lr_ratio)
        if self.loss is not None and not callable(self.loss):
            checks.in_set("loss", self.loss, ("model", "cross_entropy"))
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            checks.fail("ema", "be in (0, 1)", self.ema)
        if self.max_time is not None and not self.max_time > 0.0:
            checks.fail("max_time", "be positive (seconds)", self.max_time)
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and self.val_every == 0:
                checks.fail(name, "come with val_every > 0", "val_every=0")
        if self.overwrite and self.resume_from is not None:
            checks.fail("overwrite and resume_from", "not both be given", "both", "choose one")

    def factor(self, step: int) -> float:
        """The schedule: the learning rate of that step as a factor of the highest."""
        if not isinstance(self.schedule, str):
            return float(self.schedule(step))
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(500, self.total_steps // 10)
        return Schedule(self.schedule, warmup, self.total_steps, self.min_lr_ratio)(step)

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step number ``step``, counted from 0."""
        return self.lr * self.factor(step)

    def schedule_settings(self) -> dict[str, Any]:
        """What the learning rate of a step depends on."""
        names = ("lr", "schedule", "warmup_steps", "total_steps", "min_lr_ratio")
        return {name: value for name, value in self.plain().items() if name in names}

    def warn(self) -> None:
        """Say what is legal and most often a mistake."""
        if isinstance(self.schedule, str) and (self.warmup_steps or 0) >= self.total_steps:
            warnings.warn(
                f"warmup_steps={self.warmup_steps} >= total_steps={self.total_steps}: "
                f"the learning rate never reaches {self.lr}",
                stacklevel=3,
            )

    def plain(self) -> dict[str, Any]:
        """The settings as values that JSON can hold, for logs and checkpoints."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (str, int, float, bool, type(None))):
                out[field.name] = value
            elif isinstance(value, (torch.dtype, torch.device, os.PathLike)):
                out[field.name] = str(value).removeprefix("torch.")
            elif field.name == "betas":
                out[field.name] = list(value)
            elif value:
                out[field.name] = getattr(value, "__name__", type(value).__name__)
        return out


NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))
_POSITIONAL = NAMES[: NAMES.index("gradient_checkpointing") + 1]


def settings(config: TrainConfig | None, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The record of a trainer's arguments, over those of ``config`` when that is given."""
    if len(given) > len(_POSITIONAL):
        raise TypeError(
            f"DSALTTrainer takes at most {3 + len(_POSITIONAL)} arguments by position, "
            f"got {3 + len(given)}"
        )
    options = dict(zip(_POSITIONAL, given, strict=False))
    for name, value in named.items():
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"DSALTTrainer has no argument {name!r}{hint}")
        if name in options:
            raise TypeError(f"DSALTTrainer got two values of {name!r}")
        options[name] = value
    return dataclasses.replace(TrainConfig() if config is None else config, **options)
