"""The two files of a saved model: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
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


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """safetensors file of a state dict; a tensor that several names share is written once."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        out[name] = tensor.detach().cpu().contiguous()
    save_file(out, str(path), metadata={"format": "pt"})


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from a safetensors file; ValueError in one line when they do not fit."""
    try:
        state = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    own = model.state_dict()
    shared: dict[int, list[str]] = {}
    for name, tensor in own.items():
        shared.setdefault(tensor.data_ptr(), []).append(name)
    for names in shared.values():
        present = [n for n in names if n in state]
        if present and own[names[0]].numel():
            for name in names:
                state.setdefault(name, state[present[0]])
    wrong = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [n for n in own if n not in state]
    extra = [n for n in state if n not in own]
    if wrong or missing or extra:
        why = wrong or [f"missing {n}" for n in missing] or [f"unknown {n}" for n in extra]
        more = f" and {len(why) - 1} more" if len(why) > 1 else ""
        raise ValueError(f"{path} does not fit this model: {why[0]}{more}")
    model.load_state_dict(state)
