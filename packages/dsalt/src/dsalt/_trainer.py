"""The trainer: schedule, accumulation, precision, processes, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shared_kernels import checks, ops
from shared_kernels.calls import replaced

from . import _adapters, _checkpoint, _data, _distributed, _loading, _monitor, _tokenizers
from ._average import Average
from ._config import NAMES, SCHEDULES, TrainConfig, settings
from ._files import WEIGHTS_NAME, check_config, load_weights, save_weights, unwrap
from ._labels import IGNORE_INDEX
from ._objective import Objective
from ._optimizer import make_optimizer, plain_options
from ._precision import double
from ._signals import Signals, end, quiet_workers

EMA_NAME = "ema"
_MAX_SKIPPED = 20  # float16 steps in a row without an update: the loss scale falls by 2^20
_MAX_UNLABELLED = 50  # steps in a row without a valid label

__all__ = ["DSALTTrainer", "TrainerCallback"]


class TrainerCallback:
    """What happens during training, as methods to override; each is called on every rank.

    ``logs`` is a dict of numbers. ``trainer.stop()`` inside any of them ends the training after
    the current step, with a checkpoint.
    """

    def on_train_begin(self, trainer: DSALTTrainer) -> None:
        """Before the first step."""

    def on_step_end(self, trainer: DSALTTrainer) -> None:
        """After each optimizer step; ``trainer.step`` counts them."""

    def on_log(self, trainer: DSALTTrainer, logs: dict[str, Any]) -> None:
        """Every ``log_every`` steps."""

    def on_validation(self, trainer: DSALTTrainer, logs: dict[str, Any]) -> None:
        """After each validation."""

    def on_checkpoint(self, trainer: DSALTTrainer, folder: Path) -> None:
        """After each checkpoint."""

    def on_train_end(self, trainer: DSALTTrainer) -> None:
        """After the last step, before ``train`` returns."""


class DSALTTrainer:
    """Train a language model until ``total_steps`` optimizer steps are done.

    Step k uses lr times the schedule's factor (:class:`Schedule`). Loss = mean cross-entropy of
    all valid tokens of the step (every micro-batch and rank together) + window_reg_coef · mean
    window regulariser.

    The model is any module whose ``forward(input_ids, labels=…)`` returns an object or a dict with
    ``loss`` (mean over valid labels), a tuple (loss, logits), or logits; it is trained in place.

    Args:
        model: the model.
        train_loader: yields ids (B, N), (ids,), (ids, labels) or a dict with "input_ids" and
            perhaps "labels", "attention_mask", "cu_seqlens". Without labels the targets are the
            next tokens; labels are aligned with the logits, −100 is ignored.
        val_loader: the same, for validation; None: no validation.
        lr, weight_decay, betas: of AdamW; biases, norms and embeddings do not decay.
        optimizer: in the place of AdamW: an optimizer over the model's parameters, or a function
            (groups) -> optimizer; the schedule scales the learning rates that it has.
        schedule: "cosine", "wsd" (stable, then down in the last fifth), "constant", or a function
            of the step that gives a factor of the learning rate.
        loss: None: the model's own where it takes labels, else the cross-entropy of its logits.
            "cross_entropy": of its logits in any case, for a module that shifts labels itself.
            A function (hidden (T, d), weight (V, d), labels (T,), -100 where none is) -> mean over
            the valid labels, for a model with an attribute ``loss`` that calls it, as
            :class:`DSALTLMHeadModel` has. The attribute is set during the trainer's calls only.
        max_grad_norm: gradients are scaled down to this norm; None: not.
        grad_accum: micro-batches per optimizer step.
        warmup_steps, total_steps, min_lr_ratio: of the schedule; warmup_steps=None: those of the
            checkpoint, or a tenth of the steps and at most 500.
        save_every, log_every, val_every: in optimizer steps; 0: only at the end.
        save_dir: gets ``step-00000100/`` folders, ``latest`` and ``log.jsonl``.
        keep_last: keep that many checkpoints; None: all.
        keep_best: save where the validation loss is lowest, keep it, and name it in ``best``.
        early_stopping: end after so many validations without a lower loss.
        ema: keep a moving average of the weights with this decay, in (0, 1); it is what is
            validated, and saved as a model in the checkpoint's folder ``ema``.
        max_time: save and end after so many seconds of ``train``.
        init_from: begin with the weights of a checkpoint, of a run's latest or of a saved model.
        resume_from: "latest" (of save_dir) or a folder: the run goes on bit for bit as if it had
            not been interrupted. "auto": the latest, a fresh run where there is none yet.
        overwrite: a fresh run replaces the run whose checkpoints ``save_dir`` holds; False: it is
            refused. Nothing is written before the first step is done.
        dtype: float32, or bfloat16/float16 by autocast, on CPU and GPU; parameters stay float32.
        device: default the GPU of this process, or the CPU.
        ddp, fsdp: the process group of torchrun is used; at most one of the two.
        context_parallel: so many ranks in a row share each sequence, and the rest of the number of
            processes are data parallel. A rank computes consecutive tokens, as many as the others
            (the last one may have fewer), of whole or of packed sequences, without padding.
        fsdp_cpu_offload: sharded parameters and optimizer state live in host memory.
        gradient_checkpointing: recompute each block in the backward pass.
        compile: run the model through torch.compile.
        window_reg_coef: weight of the model's ``window_reg`` in the loss.
        shift_labels: given labels are the inputs themselves; the trainer moves them.
        max_val_batches: validate on that many batches per rank only.
        compute_metrics_fn: (model, input_ids of the first validation batch) → dict of numbers that
            joins the validation log; called on every rank.
        callbacks: objects with methods of TrainerCallback.
        seed: seeds every random number at the start of a fresh run; None: as they are.
        tokenizer: has ``state()``; saved into each checkpoint.
        progress: show a bar.
        tensorboard: folder for TensorBoard events (``pip install "dsalt[monitoring]"``).
        swanlab, wandb: project name for SwanLab, Weights & Biases (the same extra).
        health: three numbers of each DSALT layer in the log: mean window, share of the weights on
            landmarks outside it, entropy of the weights in nats.
        find_unused_parameters: DDP's, for a model whose loss does not reach every parameter.
        config: a :class:`TrainConfig` in the place of these settings; those given as well are put
            over it.

    Raises:
        ValueError: an argument out of its range, a device that is not there, a checkpoint that
            does not fit, data without a label that counts.
        FileNotFoundError: ``resume_from`` names no checkpoint.
        FileExistsError: ``save_dir`` holds another run.
        BlockingIOError: another process trains into ``save_dir``.
        FloatingPointError: a gradient or a weight is not finite (raised before it is written to a
            checkpoint), or 20 float16 steps in a row were left out.
        OSError: a checkpoint could not be written; those before it are whole.

    Example:
        >>> model = torch.nn.Embedding(9, 9)  # ids to logits: a table of pairs
        >>> batches = [torch.randint(0, 9, (4, 17))]
        >>> options = {"warmup_steps": 1, "save_dir": "run", "progress": False}
        >>> DSALTTrainer(model, batches, total_steps=2, **options).train()["step"]
        2
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *values: Any,
        config: TrainConfig | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            checks.fail("model", "be a torch.nn.Module", type(model).__name__, error=TypeError)
        self.config: TrainConfig = settings(config, values, options)
        self.config.warn()
        config = self.config
        self.callbacks = [*config.callbacks, *_monitor.monitors(config)]
        self.device = _distributed.pick_device(config.device)
        parallel = config.ddp or config.fsdp or config.context_parallel > 1
        self.world = _distributed.World(parallel, self.device, config.context_parallel)
        self.step = 0
        self.tokens = 0.0
        self.run_id = _monitor.new_run_id()
        self.last_logs: dict[str, Any] = {}
        self.train_loader, self.val_loader = train_loader, val_loader
        self._stopping = self._owned = self._begun = self._owes_validation = False
        self._first_batch = True
        self._sample: Tensor | None = None  # the beginning of a sequence, to look at the layers
        self._skipped: Any = 0  # steps in a row with a gradient that is not finite; on the device
        self._best: dict[str, Any] = {"val_loss": math.inf, "step": None, "since": 0}
        self._average: Average | None = None
        self._started = time.monotonic()
        self._empty = 0  # steps in a row without a valid label
        self._norm = torch.tensor(0.0)
        self._meters: dict[str, Any] = {"loss": 0.0, "reg": 0.0, "tokens": 0, "places": 0}

        self.model = unwrap(model)
        _check_parameters(self.model)
        _checkpoint.check_extra_state(self.model)
        for name in ("keep_best", "early_stopping"):
            if getattr(config, name) and val_loader is None:
                checks.fail(name, "come with a val_loader", "None")
        if config.gradient_checkpointing:
            _enable_checkpointing(self.model)
        sharded = config.fsdp and (self.world.size > 1 or config.fsdp_cpu_offload)
        if sharded and _adapters.is_adapted(self.model):
            checks.fail("fsdp", "be False for a model with adapters", True, "ddp=True trains it")
        # sharding moves block by block: the whole model need not fit on one device
        if not sharded:
            self.model.to(self.device)
        if self.world.team is not None:
            _check_takes_group(self.model)
        self._objective = Objective(self.model, config)
        folder = None
        if self.resume_from is not None:
            folder = _checkpoint.resolve(self.resume_from, self.save_dir)
        self._resumed = folder
        if folder is not None:
            check_config(self.model, folder)
            state = _checkpoint.read_state(folder)
            path = _adapters.weights_file(folder, WEIGHTS_NAME, self.model)
            load_weights(self.model, path, state.get("other_state"))
        else:
            if config.seed is not None:
                _seed_everything(config.seed)
            if config.init_from is not None:
                _begin_from(self.model, Path(config.init_from))
        self._run: nn.Module = model
        if sharded:
            _distributed.shard(self.model, self.world, config.fsdp_cpu_offload)
        elif parallel and self.world.size > 1 and not _distributed.is_ddp(model):
            self._run = _distributed.wrap_ddp(model, self.device, config.find_unused_parameters)
        self._parallel = self._run if _distributed.is_ddp(self._run) else self.model
        if config.compile:
            self._run = cast(nn.Module, torch.compile(self._run))
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.model, config, sharded)
        # an optimizer of the user's has learning rates of its own, which the schedule scales
        self._own_rates: list[float] | None = None
        if config.optimizer is not None:
            self._own_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if config.ema is not None:
            self._average = Average(self.model, config.ema)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == torch.float16)
        for loader in (train_loader, val_loader):
            quiet_workers(loader)
        _loading.check_validation(val_loader, self.world.data)
        self._stream = _loading.BatchStream(train_loader, self.world.data)
        if folder is None:
            self._part_random_numbers()
        else:
            self._load(folder, state)
        self._first = self.step
        self._log_from = None if self.resume_from is None else self.step
        self._log_file = _monitor.JsonLog(self.save_dir)

    def __getattr__(self, name: str) -> Any:
        # the settings read as attributes: trainer.lr, trainer.total_steps
        if name in NAMES and "config" in self.__dict__:
            value = getattr(self.config, name)
            return Path(value) if name == "save_dir" else value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # and may be changed between steps; the new value is checked as the first one was
        if name in NAMES and name not in ("callbacks", "device", "optimizer"):
            object.__setattr__(self, "config", dataclasses.replace(self.config, **{name: value}))
        else:
            object.__setattr__(self, name, value)

    # --- the loop --------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run until ``total_steps``, or until ``stop()``; returns the last logged numbers.

        The last step is validated (with a val_loader) and saved in any case. SIGINT, SIGTERM and
        SIGUSR1 end the run after its step, with a checkpoint and without a validation; then
        KeyboardInterrupt or SystemExit is raised. A handler of the program's own stays.
        """
        signals = Signals(patient=self.world.size > 1)
        with self._writing(), self.world.naming_the_lost(), signals:
            self._signals = signals
            self._started = time.monotonic()
            self.model.train()
            self._call("on_train_begin")
            if self._owes_validation:
                self._log_validation()
            if self.step < self.total_steps and not (self._owes_validation and self._should_end()):
                self._loop()
            self._stopping = self._owes_validation = False
            self._call("on_train_end")
            ended = self._signal_of_any_rank()
        if ended is not None:
            self._stream.close()  # workers end here, not while the interpreter is taken apart
            end(ended)
        return self.last_logs

    def _loop(self) -> None:
        clock = _Clock(self.tokens)
        done = False
        with self._bar() as bar:
            while not done:
                self._one_step()
                self._begin_writing()
                self._call("on_step_end")
                bar.update()
                done = self._should_end()
                logs = done or _due(self.step, self.log_every)
                validates = self.val_loader is not None and (
                    done or _due(self.step, self.val_every)
                )
                if validates and done and self._signal_of_any_rank() is not None:
                    # who sent it may not wait that long: the checkpoint first
                    validates, self._owes_validation = False, _due(self.step, self.val_every)
                if logs:
                    self._log_step(clock.rate(self.tokens))
                    bar.set_postfix(self._shown())
                if validates:
                    bar.set_description("validate")
                    self._log_validation()
                    bar.set_description("train")
                    bar.set_postfix(self._shown())
                    clock = _Clock(self.tokens)
                if (logs or validates) and not done:
                    done = self._should_end()  # a callback may have asked for it
                best = validates and self.keep_best and self._best["step"] == self.step
                if done or best or _due(self.step, self.save_every):
                    self.save()

    def _signal_of_any_rank(self) -> int | None:
        own = self._signals.received
        total, count = self.world.sum(float(own or 0), float(own is not None))
        return own if own is not None or not count else round(total / count)

    def _bar(self) -> Any:
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not (self.progress and self.world.is_main),
            desc="train",
            unit="step",
            dynamic_ncols=True,
        )

    def stop(self) -> None:
        """End the training after the current step, on all ranks, with a checkpoint."""
        self._stopping = True

    def _should_end(self) -> bool:
        """Whether this step is the last: all ranks agree, whichever of them was asked."""
        late = self.max_time is not None and time.monotonic() - self._started >= self.max_time
        asked = self._stopping or late or self._signals.received is not None
        return self.step >= self.total_steps or self.world.sum(float(asked))[0] > 0

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step number ``step``, counted from 0."""
        return self.config.learning_rate(step)

    def _one_step(self) -> None:
        """One optimizer step: grad_accum micro-batches weighted by their valid tokens."""
        batches = [self._next_batch() for _ in range(self.grad_accum)]
        counts = [batch.valid() for batch in batches]
        places = sum(batch.input_ids.numel() for batch in batches)
        total, total_places = self.world.sum(float(sum(counts)), float(places))
        self._check_labels(total)
        factor = self.config.factor(self.step)
        for group, base in zip(self.optimizer.param_groups, self._base_rates(), strict=True):
            group["lr"] = base * factor
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            # the loss is a mean over valid labels, the regulariser over places; DDP and FSDP
            # average over ranks: times the number of ranks makes it the sum
            weight = count * self.world.size / max(total, 1.0)
            place_weight = batch.input_ids.numel() * self.world.size / max(total_places, 1.0)
            last = i + 1 == self.grad_accum
            with _distributed.synchronised(self._parallel, last):
                loss, reg = self._loss(self._run, batch.to(self.device), count)
                objective = loss * weight
                if self.window_reg_coef and reg is not None:
                    objective = objective + self.window_reg_coef * place_weight * reg
                with ops.full_precision(self.device.type):  # off again in a region around us
                    self.scaler.scale(objective).backward()
            self._meters["loss"] += double(loss.detach()) * count
            if reg is not None:
                self._meters["reg"] += double(reg.detach()) * batch.input_ids.numel()
            self._meters["tokens"] += count
            self._meters["places"] += batch.input_ids.numel()
        self._sample = _first_tokens(batches[-1])
        self._update()
        self.step += 1
        self.tokens += total

    def _update(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._skipped = torch.where(self._norm.isfinite(), 0, self._skipped + 1)
        if self.device.type == "cpu" or self.step % _MAX_SKIPPED == 0:
            self._check_finite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch.clear_autocast_cache()  # a region around the training keeps casts of old weights
        self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.model, self.step)

    def _base_rates(self) -> list[float]:
        """The highest learning rate of each group: our own, or those of the user's optimizer."""
        return self._own_rates or [self.lr] * len(self.optimizer.param_groups)

    def _next_batch(self) -> _data.Batch:
        batch = _data.as_batch(next(self._stream), self.shift_labels)
        if self._first_batch:
            self._first_batch = False
            _data.warn_if_copy(batch)
        return _data.chunk_of(batch, self.world.team)

    def _check_labels(self, total: float) -> None:
        self._empty = 0 if total else self._empty + 1
        never = not self.tokens and not total
        last = self._stream.epoch > 0 or self.step + 1 >= self.total_steps
        if self._empty >= _MAX_UNLABELLED or (never and last):
            checks.fail(
                "train_loader",
                "yield labels that count in the loss",
                f"none in the last {self._empty} steps",
                "-100 is ignored, and a sequence of one token has no next token",
            )

    def _check_finite(self) -> None:
        """FloatingPointError unless the gradients are numbers; float16 may leave out some steps."""
        skipped = int(self._skipped)
        if skipped and not self.scaler.is_enabled():
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step}; nothing was saved since the last "
                f"checkpoint; try a smaller lr or a longer warm-up"
            )
        # a run that ends without having taken any step has learnt nothing: float16 may overflow in
        # its first steps, but then the loss is a number
        none_taken = self.step >= self.total_steps and skipped >= max(1, self.step - self._first)
        short = none_taken and (
            skipped >= 3 or not math.isfinite(self.world.sum(float(self._meters["loss"]))[0])
        )
        if skipped >= _MAX_SKIPPED or short:
            raise FloatingPointError(
                f"the last {skipped} steps until step {self.step} were left out because the "
                f"gradient is not finite in float16; checkpoints of these steps hold the weights "
                f"from before them; the loss may be NaN: try dtype=torch.bfloat16 or a smaller lr"
            )

    def _check_weights(self) -> None:
        """FloatingPointError unless every weight is a number, on every rank."""
        if self.world.sum(float(not _finite(self.model)))[0]:
            raise FloatingPointError(self._diverged())

    def _diverged(self) -> str:
        return (
            f"the weights are not finite or too large to compute with after step {self.step}; "
            f"nothing was saved since the last checkpoint; try a smaller lr or a longer warm-up"
        )

    @contextmanager
    def _overflow_named(self) -> Iterator[None]:
        """Raise a FloatingPointError where a layer refuses hidden states that have overflowed."""
        try:
            yield
        except ValueError as error:
            if not _finite(self.model) or "`window_sizes` must be finite" in str(error):
                raise FloatingPointError(self._diverged()) from error
            raise

    def _autocast(self) -> torch.autocast:
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=half)

    def _loss(
        self, model: nn.Module, batch: _data.Batch, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """(mean loss over the ``count`` valid labels, window regulariser or None)."""
        with self._overflow_named(), self._autocast():
            return self._objective(model, batch, count, self.config)

    # --- validation and logs ---------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Mean loss over the validation tokens of all ranks, its exponential, and the metrics.

        With ``ema`` it is the averaged model that is validated.
        Random numbers afterwards are those from before: validating changes nothing.
        """
        if self.val_loader is None:
            checks.fail("val_loader", "be given to validate", None)
        if self._average is None:
            return self._validate(self.val_loader)
        with self._average.swapped_in(self.model):
            return self._validate(self.val_loader)

    def _validate(self, loader: Iterable[Any]) -> dict[str, Any]:
        before = _checkpoint.rng_state(self.device)
        was_training = self.model.training
        self.model.eval()
        total: Any = 0.0
        tokens, first = 0, None
        try:
            batches = _loading.validation_batches(loader, self.world.data, self.max_val_batches)
            for item, repeated in batches:
                batch = _data.as_batch(item, self.shift_labels)
                if repeated:
                    labels = batch.labels.clone()
                    labels[-min(repeated, len(labels)) :] = IGNORE_INDEX
                    batch = replaced(batch, labels=labels)
                first = batch.input_ids.to(self.device) if first is None else first
                batch = _data.chunk_of(batch, self.world.team)
                count, batch = batch.valid(), batch.to(self.device)
                total = total + double(self._loss(self.model, batch, count)[0]) * count
                tokens += count
            loss_sum, all_tokens = self.world.sum(float(total), float(tokens))
            if not all_tokens:
                checks.fail("val_loader", "yield at least one valid label", "none")
            loss = loss_sum / all_tokens
            if not math.isfinite(loss):
                self._check_weights()
            if math.isnan(loss):  # every weight is a number, but what is computed with them is none
                raise FloatingPointError(self._diverged())
            logs: dict[str, Any] = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
            if self.compute_metrics_fn is not None and first is not None:
                logs.update(self.compute_metrics_fn(self.model, first))
        finally:
            self.model.train(was_training)
            _checkpoint.set_rng_state(before, self.device)
        return logs

    def _log_step(self, tokens_per_second: float) -> None:
        self._check_finite()
        loss, reg, tokens, places = self.world.sum(*(float(v) for v in self._meters.values()))
        self._meters = dict.fromkeys(self._meters, 0.0)
        logs = {
            "step": self.step,
            "epoch": self._stream.epoch,
            "loss": loss / tokens if tokens else math.nan,
            "lr": self.learning_rate(self.step - 1),
            "grad_norm": float(self._norm),
            "tokens": int(self.tokens),
            "tokens_per_second": tokens_per_second,
            "window_reg": reg / max(places, 1.0),
        }
        if self.health and self._sample is not None:
            ids = self._sample.to(self.device)
            with self._overflow_named():
                logs |= _monitor.health(self.model, ids, self._autocast())
        self.last_logs = {**self.last_logs, **logs}
        if self.world.is_main:
            self._log_file.write(logs)
        self._call("on_log", logs)

    def _log_validation(self) -> None:
        logs = {"step": self.step, **self.validate()}
        if logs["val_loss"] < self._best["val_loss"]:
            self._best = {"val_loss": logs["val_loss"], "step": self.step, "since": 0}
        else:
            self._best["since"] += 1
        if self.early_stopping is not None and self._best["since"] >= self.early_stopping:
            self.stop()
        self.last_logs = {**self.last_logs, **logs}
        if self.world.is_main:
            self._log_file.write(logs)
        self._call("on_validation", logs)

    def _shown(self) -> dict[str, str]:
        """What the bar says of the last logs."""
        formats = {"loss": ".4f", "val_loss": ".4f", "lr": ".2e", "tokens_per_second": ".0f"}
        found = {k: f"{self.last_logs[k]:{f}}" for k, f in formats.items() if k in self.last_logs}
        return {"tok_s" if k == "tokens_per_second" else k: v for k, v in found.items()}

    def _call(self, method: str, *args: Any) -> None:
        """Call the callbacks; what they draw after the beginning does not change the run."""
        functions = [getattr(callback, method, None) for callback in self.callbacks]
        before = None
        if any(functions) and method != "on_train_begin":
            before = _checkpoint.rng_state(self.device)
        for function in functions:
            if function is not None:
                function(self, *args)
        if before is not None:
            _checkpoint.set_rng_state(before, self.device)

    # --- checkpoints -----------------------------------------------------------------------------

    def save(self) -> Path:
        """Write ``step-…`` of the present step: whole or not at all. Every rank must call it.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
            FileExistsError: ``save_dir`` holds another run.
        """
        self._check_finite()
        self._check_weights()
        with self._writing():
            self._begin_writing()
            folder = self._save()
        self._call("on_checkpoint", folder)
        return folder

    def _save(self) -> Path:
        keep = self.world.is_main
        weights = _checkpoint.model_state(self.model, keep)
        average = None
        if self._average is not None:
            average = self._average.state(self.model, weights, keep)
        optimizer = _checkpoint.optimizer_state(self.model, self.optimizer, keep)
        ranks = self.world.gather(
            {
                "rng": _checkpoint.rng_state(self.device),
                "stream": self._stream.state_dict(),
                "meters": {k: float(v) for k, v in self._meters.items()},
            }
        )
        state = {
            "step": self.step,
            "run_id": self.run_id,
            "tokens": self.tokens,
            "schedule": self.config.schedule_settings(),
            "other_state": _checkpoint.other_state(self.model),
            "best": dict(self._best),
            "owes_validation": self._owes_validation,
            "optimizer": optimizer,
            "groups": [plain_options(group) for group in self.optimizer.param_groups],
            "scaler": self.scaler.state_dict(),
            "ranks": ranks,
            "context_parallel": self.context_parallel,
            "last_logs": {k: _monitor.plain(v) for k, v in self.last_logs.items()},
        }

        plain, plain_average = weights, average
        if keep and _adapters.is_adapted(self.model):
            plain = _adapters.folded(self.model)
            if self._average is not None:
                with self._average.swapped_in(self.model):
                    plain_average = _adapters.folded(self.model)

        def fill(into: Path) -> None:
            _fill(into, plain)
            if plain_average is not None:
                (into / EMA_NAME).mkdir()
                _fill(into / EMA_NAME, plain_average)
            if _adapters.is_adapted(self.model):
                save_weights(weights, into / _adapters.WRAPPED_NAME)
                _adapters.save(self.model, into)
                if average is not None:
                    save_weights(average, into / EMA_NAME / _adapters.WRAPPED_NAME)
            torch.save(state, into / _checkpoint.STATE_NAME)

        def _fill(into: Path, tensors: dict[str, Any]) -> None:
            save_weights(tensors, into / WEIGHTS_NAME)
            save_config: Any = getattr(self.model, "save_config", None)
            if save_config is not None:
                save_config(into)
            if self.tokenizer is not None:
                _tokenizers.save_tokenizer(self.tokenizer, into)

        def write() -> None:
            best = self.keep_best and self._best["step"] == self.step
            _checkpoint.write(self.save_dir, self.step, fill, self.keep_last, best)

        self._on_main(write)
        folder: Path = self.save_dir / _checkpoint.step_name(self.step)
        return folder

    def _on_main(self, action: Callable[[], Any]) -> None:
        """Call ``action`` on rank 0; an OSError that it raises there is raised on every rank."""
        error = None
        if self.world.is_main:
            try:
                action()
            except OSError as caught:
                error = caught
        error = self.world.broadcast(error)
        if error is not None:
            raise error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """``save_dir`` is ours: no other process writes there, and it holds no other run."""
        if self._owned:
            yield
            return
        with ExitStack() as stack:

            def claim() -> None:
                stack.enter_context(_checkpoint.locked(self.save_dir))
                if not (self._begun or self.overwrite):
                    _checkpoint.refuse_another_run(self.save_dir, self._resumed)

            self._on_main(claim)
            self._owned = True
            try:
                yield
            finally:
                self._owned = False

    def _begin_writing(self) -> None:
        """Before this trainer's first write, remove what killed and replaced runs have left."""
        if not self._begun and self.world.is_main:
            _checkpoint.recover(self.save_dir)
            if self.overwrite:
                _checkpoint.clear(self.save_dir)
            self._log_file.begin(self._log_from)
            _checkpoint.rewind_best(self.save_dir, self._best["step"])
        self._begun = True

    def hyper_parameters(self) -> dict[str, Any]:
        """The settings of the run and of its model, as values that JSON can hold."""
        model = getattr(self.model, "config", None)
        shape = (
            {f"model.{k}": _monitor.plain(v) for k, v in model.items()}
            if isinstance(model, dict)
            else {}
        )
        return {**self.config.plain(), **shape, "world_size": self.world.size}

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        if self.step > self.total_steps:
            checks.fail("total_steps", f"be at least {folder.name}'s {self.step}", self.total_steps)
        self._continue_schedule(state.get("schedule", {}))
        self.run_id = state.get("run_id", self.run_id)
        self.last_logs = state["last_logs"]
        _checkpoint.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self._own_rates is not None:
            groups = state.get("groups", ())
            for group, saved in zip(self.optimizer.param_groups, groups, strict=False):
                group.update(saved)
        if self._average is not None:
            path = _adapters.weights_file(folder / EMA_NAME, WEIGHTS_NAME, self.model)
            self._average.load(path, self.model)
        self._best = state.get("best", self._best)
        self._owes_validation = self.val_loader is not None and state.get("owes_validation", False)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        ranks = state["ranks"]
        context = state.get("context_parallel", 1)
        same = len(ranks) == self.world.size and context == self.context_parallel
        # ranks that share a sequence have read the same data
        own = ranks[self.world.rank if same else self.world.data.rank * context % len(ranks)]
        self._stream.load_state_dict(own["stream"])
        if same:
            self._meters = dict(own["meters"])
        _checkpoint.set_rng_state(own["rng"], self.device)
        if not same:
            self._part_random_numbers()

    def _continue_schedule(self, before: dict[str, Any]) -> None:
        """Warn if the next learning rate is not the one that the checkpoint's schedule gave."""
        if self.config.warmup_steps is None:
            self.config = dataclasses.replace(self.config, warmup_steps=before.get("warmup_steps"))
        if before.get("schedule") not in SCHEDULES or self.step == self.total_steps:
            return
        known = {name: value for name, value in before.items() if name in NAMES}
        old, new = TrainConfig(**known).learning_rate(self.step), self.learning_rate(self.step)
        if not math.isclose(old, new, rel_tol=1e-6):
            now = self.config.schedule_settings()
            changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if v != before.get(k)]
            warnings.warn(
                f"the schedule has changed since the checkpoint ({', '.join(changed)}): step "
                f"{self.step} has the learning rate {new:.3g} in place of {old:.3g}",
                stacklevel=4,
            )

    def _part_random_numbers(self) -> None:
        """Ranks drop out different units: rank r > 0 continues from a seed of its own."""
        if self.world.size > 1:
            base = self.world.broadcast(torch.initial_seed())
            if self.world.rank:
                _seed_everything((base + 0x9E3779B97F4A7C15 * self.world.rank) % 2**63)


def _first_tokens(batch: _data.Batch) -> Tensor | None:
    """(1, N): how the first sequence of a batch begins, without padding and what is packed."""
    row = batch.input_ids[:1]
    mask, bounds = batch.extras.get("attention_mask"), batch.extras.get("cu_seqlens")
    if mask is not None:
        row = row[mask[:1] != 0][None]
    if bounds is not None:
        row = row[:, : int(bounds.diff()[0] if bounds.numel() > 1 else 0)]
    return row[:, : _monitor.SAMPLE_TOKENS] if row.numel() else None


def _begin_from(model: nn.Module, path: Path) -> None:
    """Give a model the weights of a checkpoint, a run's latest or a saved model."""
    folder = weights_folder(path)
    if folder is None:
        raise FileNotFoundError(f"no weights in {path}: neither {WEIGHTS_NAME} nor step folders")
    load_weights(model, folder / WEIGHTS_NAME, _checkpoint.other_state(model))


def weights_folder(path: Path) -> Path | None:
    """The folder itself if it holds weights, else the latest checkpoint in it."""
    return path if (path / WEIGHTS_NAME).is_file() else _checkpoint.latest(path)


def _finite(model: nn.Module) -> bool:
    """Whether every parameter on this process is a number."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    found = [p.detach().isfinite().all() for p in local if p.numel()]
    return not found or bool(torch.stack(found).all())


def _check_parameters(model: nn.Module) -> None:
    """Weights in half precision lose small steps: they are trained in float32."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point()}
    if torch.float16 in kinds:
        checks.fail(
            "model",
            "have float32 parameters",
            "float16",
            "model.float(), then dtype=torch.float16 computes in half precision",
        )
    if torch.bfloat16 in kinds:
        warnings.warn(
            "the model's bfloat16 parameters are trained and saved in float32; "
            "dtype=torch.bfloat16 computes in half precision",
            stacklevel=3,
        )
        model.float()


def _check_takes_group(model: nn.Module) -> None:
    if "group" not in inspect.signature(model.forward).parameters:
        checks.fail(
            "model",
            "have a forward with an argument `group` for context_parallel",
            type(model).__name__,
            "DSALTLMHeadModel has one",
            TypeError,
        )


class _Clock:
    """Tokens per second since the last question."""

    def __init__(self, tokens: float) -> None:
        self._since, self._tokens = time.perf_counter(), tokens

    def rate(self, tokens: float) -> float:
        now = time.perf_counter()
        done, lasted = tokens - self._tokens, max(now - self._since, 1e-9)
        self._since, self._tokens = now, tokens
        return done / lasted


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _enable_checkpointing(model: nn.Module) -> None:
    """Switch on the outermost modules that can recompute; their inner ones need not."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if hasattr(module, "gradient_checkpointing") and not inside:
            module.gradient_checkpointing = True
            found.append(name)
    if not found:
        checks.fail(
            "gradient_checkpointing", "be False for a model that cannot recompute its blocks", True
        )


def _signature() -> inspect.Signature:
    """What help() shows: the model, the data, and every setting with its default."""
    own = inspect.signature(DSALTTrainer.__init__).parameters
    named = [own[name] for name in ("self", "model", "train_loader", "val_loader")]
    last = NAMES.index("gradient_checkpointing")
    for i, field in enumerate(dataclasses.fields(TrainConfig)):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if i <= last else own["config"].kind
        named.append(
            inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
        )
    return inspect.Signature([*named, own["config"]])


DSALTTrainer.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
