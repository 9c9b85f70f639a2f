"""Checkpoint folders that are either whole or absent, and the states that go into them."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__: list[str] = []

LATEST = "latest"
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


def steps(save_dir: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, oldest first."""
    if not save_dir.is_dir():
        return []
    found = [(m, p) for p in save_dir.iterdir() if (m := _STEP.fullmatch(p.name))]
    return sorted((int(m[1]), p) for m, p in found if (p / STATE_NAME).is_file())


def recover(save_dir: Path) -> None:
    """Undo what a killed process left: a replaced checkpoint comes back, temporaries go."""
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
    for name in (f".{LATEST}", f".{LOG_NAME}"):
        (save_dir / name).unlink(missing_ok=True)


def latest(save_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names, else the one with the highest step, else None."""
    pointer = save_dir / LATEST
    if pointer.is_file():
        target = save_dir / pointer.read_text(encoding="utf-8").strip()
        if _STEP.fullmatch(target.name) and (target / STATE_NAME).is_file():
            return target
    found = steps(save_dir)
    return found[-1][1] if found else None


def resolve(path: str | os.PathLike[str], save_dir: Path) -> Path | None:
    """The folder to resume from. "latest" may find nothing (None); a path must be a checkpoint."""
    if str(path) == LATEST:
        return latest(save_dir)
    folder = Path(path)
    if (folder / STATE_NAME).is_file():
        return folder
    inside = latest(folder)
    if inside is None:
        raise FileNotFoundError(f"no checkpoint in {folder}: neither {STATE_NAME} nor step folders")
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
    save_dir: Path, step: int, fill: Callable[[Path], None], keep_last: int | None = None
) -> Path:
    """Make ``save_dir/step-…``: filled beside, flushed to disk, then renamed in one step.

    A process killed at any moment leaves each ``step-…`` folder whole or absent.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    recover(save_dir)
    saving = save_dir / _SAVING
    saving.mkdir()
    try:
        fill(saving)
        for file in saving.iterdir():
            _flush(file)
        _flush(saving)
        target = save_dir / step_name(step)
        replaced = save_dir / f"{_REPLACED}{target.name}"
        if target.exists():
            target.rename(replaced)
        saving.rename(target)
        _flush(save_dir)
    except BaseException:
        recover(save_dir)
        raise
    pointer = save_dir / f".{LATEST}"
    pointer.write_text(target.name + "\n", encoding="utf-8")
    _flush(pointer)
    os.replace(pointer, save_dir / LATEST)
    _flush(save_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last is not None:
        # later steps belong to an earlier run in this folder: not ours to count or remove
        ours = [p for n, p in steps(save_dir) if n <= step]
        for old in ours[:-keep_last]:
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


def _full(value: Any, keep: bool) -> Any:
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
    return {name: _full(value, keep) for name, value in model.state_dict().items()}


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, dict[str, Any]]:
    """State of each parameter by its name, whole tensors on the CPU."""
    return {
        name: {key: _full(value, keep) for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]
) -> None:
    """Put states by name back, sharded as the parameters are."""
    names = {id(p): name for name, p in model.named_parameters()}
    own = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    position = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            if name in saved:
                state[position] = {k: _sharded_as(v, p) for k, v in saved[name].items()}
            position += 1
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _sharded_as(value: Any, parameter: Any) -> Any:
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
