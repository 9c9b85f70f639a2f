"""The two files of a saved model: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel and DataParallel."""
    copies = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, copies):
            inner = model.module
        if inner is None:
            return model
        model = inner


def read_config(folder: Path) -> dict[str, Any]:
    """The constructor arguments in ``config.json``; ValueError in one line for another file."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.pop("model_type", None) != "dsalt":
        raise ValueError(f'{path} is not a dsalt model ("model_type" differs)')
    config.pop("dsalt_version", None)
    return config


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """The name of a tensor without those of wrappers around the modules that hold it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_config(model: nn.Module, folder: Path) -> None:
    """ValueError if a checkpoint's model was made with other arguments than this one.

    Weights of the same shape do not make the same model: another window or another number of heads
    changes what they compute. Dropout may differ, it belongs to training.
    """
    own: Any = getattr(model, "config", None)
    if not isinstance(own, dict) or not (folder / CONFIG_NAME).is_file():
        return
    saved = read_config(folder)
    changed = [
        f"{name}={own[name]!r} is {value!r} in the checkpoint"
        for name, value in saved.items()
        if name in own and own[name] != value and name != "dropout"
    ]
    if changed:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} does not fit this model: {', '.join(changed)}; the model of "
            f"a run stays as it began (init_from, --init-from begins another from its weights)"
        )


def save_weights(state: dict[str, Any], path: Path) -> None:
    """safetensors file of a state dict's tensors; one that several names share is written once.

    Views that overlap in part are written each by itself. What is no tensor is left out. Equal
    tensors give equal bytes: the header has one entry, for safetensors writes several in any order.
    """
    seen: set[tuple[Any, ...]] = set()
    taken: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in taken or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(place)
        out[plain_name(name)] = tensor
    save_file(out, str(path), metadata={"format": "pt"})


def stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor in a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


def load_weights(model: nn.Module, path: Path, others: dict[str, Any] | None = None) -> None:
    """Fill a model from a safetensors file; ValueError in one line when they do not fit.

    ``others`` is what its state dict holds beside tensors.
    """
    try:
        state: dict[str, Any] = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    state |= others or {}
    own = {plain_name(name): value for name, value in model.state_dict().items()}
    shared: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            shared.setdefault(key, []).append(name)
    for names in shared.values():
        present = [n for n in names if n in state]
        if present:
            for name in names:
                state.setdefault(name, state[present[0]])
    wrong = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and name in state and state[name].shape != tensor.shape
    ]
    missing = [n for n in own if n not in state]
    extra = [n for n in state if n not in own]
    if wrong or missing or extra:
        why = wrong or [f"missing {n}" for n in missing] or [f"unknown {n}" for n in extra]
        more = f" and {len(why) - 1} more" if len(why) > 1 else ""
        raise ValueError(f"{path} does not fit this model: {why[0]}{more}")
    model.load_state_dict({name: state[plain_name(name)] for name in model.state_dict()})
