"""Checkpoint folders that are either whole or absent, and the states that go into them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ._files import plain_name

__all__: list[str] = []

LATEST = "latest"
AUTO = "auto"
BEST = "best"
LOCK_NAME = ".lock"
LOG_NAME = "log.jsonl"
STATE_NAME = "trainer.pt"
_STATE = {"step", "tokens", "last_logs", "optimizer", "scaler", "ranks"}
_STEP = re.compile(r"step-(\d{8,})")
_SAVING = ".saving"
_REPLACED = ".replaced-"
_PRUNED = ".pruned"


# --- folders -------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _named(save_dir: Path) -> dict[int, Path]:
    """Every step folder by its step, whole or not; also one that a killed process had renamed."""
    found: dict[int, Path] = {}
    if save_dir.is_dir():
        for path in sorted(save_dir.iterdir()):  # ".replaced-" comes before "step-"
            match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
            if match and path.is_dir():
                found[int(match[1])] = path
    return found


def steps(save_dir: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, oldest first."""
    return [(n, p) for n, p in sorted(_named(save_dir).items()) if (p / STATE_NAME).is_file()]


def refuse_another_run(save_dir: Path, resumed: Path | None) -> None:
    """FileExistsError if the folder holds checkpoints of a run that is not the one resumed."""
    held = _named(save_dir)
    if not held or (resumed is not None and resumed.parent.resolve() == save_dir.resolve()):
        return
    raise FileExistsError(
        f"{save_dir} holds checkpoints of another run (up to step {max(held)}): resume that run "
        f'(resume_from="latest", --resume), or give another save_dir, or replace it with '
        f"overwrite=True (--overwrite)"
    )


def clear(save_dir: Path) -> None:
    """Remove the checkpoints and the log of an earlier run."""
    for path in _named(save_dir).values():
        path.rename(save_dir / _PRUNED)  # a half-removed folder must not look like a checkpoint
        shutil.rmtree(save_dir / _PRUNED)
    for name in (LATEST, BEST, LOG_NAME):
        (save_dir / name).unlink(missing_ok=True)


# The process that holds each folder: the operating system's lock does not stop that process itself.
_HELD: dict[Path, int] = {}


@contextlib.contextmanager
def locked(save_dir: Path) -> Iterator[None]:
    """This process alone writes into the folder; BlockingIOError if another one does.

    The lock is a record lock of the operating system: it ends when its process ends, however that
    happens, and a forked worker does not inherit it.
    """
    key, made = save_dir.resolve(), not save_dir.exists()
    if _HELD.get(key) == os.getpid():
        raise BlockingIOError(f"{save_dir} is in use by another trainer of this process")
    save_dir.mkdir(parents=True, exist_ok=True)
    handle = _lock(save_dir / LOCK_NAME)
    _HELD[key] = os.getpid()
    try:
        yield
    finally:
        if _HELD.pop(key) == os.getpid():
            # removed while it is held: who waits for the lock checks that the file still exists
            with contextlib.suppress(OSError):
                (save_dir / LOCK_NAME).unlink()
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):
                    save_dir.rmdir()  # nothing was written


def _lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _try_lock(handle)
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except FileNotFoundError:
            pass  # the last owner removed the file after we opened it and before we locked it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                read = getattr(os, "pread", lambda *_: b"")
                owner = read(handle, 32, 0).decode(errors="replace").strip()
                os.close(handle)
                raise BlockingIOError(
                    f"{path.parent} is in use: process {owner or 'unknown'} trains into it"
                ) from error
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):
                return handle  # a file system without locks
            os.close(handle)
            raise
        os.close(handle)


def _try_lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def recover(save_dir: Path) -> None:
    """Undo what a killed process left: bring a replaced checkpoint back, remove temporary files."""
    if not save_dir.is_dir():
        return
    for old in save_dir.glob(_REPLACED + "*"):
        target = save_dir / old.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    shutil.rmtree(save_dir / _SAVING, ignore_errors=True)
    shutil.rmtree(save_dir / _PRUNED, ignore_errors=True)
    for name in (f".{LATEST}", f".{BEST}", f".{LOG_NAME}"):
        (save_dir / name).unlink(missing_ok=True)


def latest(save_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names, else the one with the highest step, else None."""
    found = steps(save_dir)
    named = _pointed(save_dir, LATEST)
    for _, path in found:
        if path.name.removeprefix(_REPLACED) == named:
            return path
    return found[-1][1] if found else None


def best(save_dir: Path) -> Path | None:
    """The checkpoint that ``best`` names, or None."""
    named = _pointed(save_dir, BEST)
    return next((path for _, path in steps(save_dir) if path.name == named), None)


def _pointed(save_dir: Path, name: str) -> str | None:
    pointer = save_dir / name
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def rewind_best(save_dir: Path, step: int | None) -> None:
    """Let ``best`` name no step that a run, resumed from an earlier one, has not reached yet."""
    if _pointed(save_dir, BEST) not in (None, step_name(step or 0)):
        (save_dir / BEST).unlink()
        target = save_dir / step_name(step or 0)
        if (target / STATE_NAME).is_file():
            point(save_dir, BEST, target)


def point(save_dir: Path, name: str, target: Path) -> None:
    """Let the file ``name`` name a checkpoint: at any moment it names the old or the new one."""
    pointer = save_dir / f".{name}"
    pointer.write_text(target.name + "\n", encoding="utf-8")
    _flush(pointer)
    os.replace(pointer, save_dir / name)
    _flush(save_dir)


def resolve(path: str | os.PathLike[str], save_dir: Path) -> Path | None:
    """The folder to resume from: "latest" of save_dir, a checkpoint, or the latest of a run.

    FileNotFoundError where there is no whole checkpoint. "auto" is "latest" where there is one,
    else None: a job that is started again and again with the same command.
    """
    folder = save_dir if str(path) in (LATEST, AUTO) else Path(path)
    if (folder / STATE_NAME).is_file():
        return folder
    inside = latest(folder)
    if inside is None and (str(path) != AUTO or _named(folder)):
        torn = [p.name for p in _named(folder).values()]
        torn += [folder.name] if (folder / "model.safetensors").is_file() else []
        why = (
            f"{torn[-1]} has no {STATE_NAME}; its weights can start a new run (init_from, "
            f"--init-from)"
            if torn
            else f"neither {STATE_NAME} nor step folders"
            if folder.is_dir()
            else "no such folder"
        )
        raise FileNotFoundError(f"no checkpoint in {folder}: {why}")
    return inside


def read_state(folder: Path) -> dict[str, Any]:
    """What a trainer wrote into ``trainer.pt``; ValueError in one line for another file."""
    path = folder / STATE_NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is damaged: {why[0]}") from error
    if not isinstance(state, dict) or not state.keys() >= _STATE:
        raise ValueError(f"{path} is not the state of a DSALTTrainer")
    return state


def write(
    save_dir: Path,
    step: int,
    fill: Callable[[Path], None],
    keep_last: int | None = None,
    is_best: bool = False,
) -> Path:
    """Make ``save_dir/step-…``: fill a temporary folder, flush it to the disk, then rename it.

    A process killed at any moment leaves each ``step-…`` folder whole or absent. OSError, in one
    line, if it cannot be written; earlier checkpoints stay as they were.
    """
    target = save_dir / step_name(step)
    replaced = save_dir / f"{_REPLACED}{target.name}"
    saving = save_dir / _SAVING
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        recover(save_dir)
        saving.mkdir()
        fill(saving)
        for path in saving.rglob("*"):
            _flush(path)
        _flush(saving)
        if target.exists():
            target.rename(replaced)
        saving.rename(target)
        _flush(save_dir)
        point(save_dir, LATEST, target)
        if is_best:
            point(save_dir, BEST, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        recover(save_dir)
        # PyTorch and safetensors report a full disk by exceptions of their own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"the checkpoint {target} could not be written: {why}") from error
    except BaseException:
        recover(save_dir)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last is not None:
        # later steps belong to an earlier run in this folder: they are neither counted nor removed
        ours = [p for n, p in steps(save_dir) if n <= step]
        named = _pointed(save_dir, BEST)
        for old in ours[:-keep_last]:
            if old.name != named:
                # renamed first: a half-removed folder must not look like a checkpoint
                old.rename(save_dir / _PRUNED)
                shutil.rmtree(save_dir / _PRUNED)
    return target


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- random numbers ------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every global generator: torch on the CPU and on the device, numpy, python."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, words, position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- full states of possibly sharded models ------------------------------------------------------


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def full(value: Any, keep: bool) -> Any:
    """The whole tensor on the CPU (a collective when sharded); None where it is not kept."""
    if _is_sharded(value):
        if value.device.type != value.device_mesh.device_type:
            value = value.to(value.device_mesh.device_type)
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def model_state(model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The state dict with whole CPU tensors; every rank of a sharded model must call it."""
    return {plain_name(n): full(value, keep) for n, value in model.state_dict().items()}


def other_state(model: nn.Module) -> dict[str, Any]:
    """What a state dict holds besides tensors: the extra state of modules that have one."""
    state = model.state_dict()
    return {plain_name(n): v for n, v in state.items() if not isinstance(v, Tensor)}


def check_extra_state(model: nn.Module) -> None:
    """Refuse, before the first step, extra state that a checkpoint could not give back."""
    for name, value in other_state(model).items():
        box = io.BytesIO()
        try:
            torch.save(value, box)
            box.seek(0)
            torch.load(box, weights_only=True)
        except Exception as error:
            why = str(error).splitlines() or [type(error).__name__]
            raise ValueError(
                f"`model` must have a state that a checkpoint can hold, got {name!r} "
                f"({type(value).__name__}): {why[0]}; get_extra_state may return tensors, numbers, "
                f"strings, lists and dicts"
            ) from error


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, dict[str, Any]]:
    """State of each parameter by its name, whole tensors on the CPU."""
    return {
        plain_name(name): {key: full(value, keep) for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]
) -> None:
    """Put states by name back, sharded as the parameters are."""
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    own = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    position = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p))
            if name in saved:
                state[position] = {k: sharded_as(v, p) for k, v in saved[name].items()}
            position += 1
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def sharded_as(value: Any, parameter: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape or value.dim() == 0:
        return value.clone()
    if not _is_sharded(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    whole = value.to(mesh.device_type)
    return distribute_tensor(whole, mesh, parameter.placements).to(parameter.device)
