"""Models under adapters of the peft library: what a checkpoint of them holds.

``model.safetensors`` has the adapters folded into the weights, under the names of the model inside,
so that it loads without peft; ``wrapped.safetensors`` has every tensor under peft's names, to go on
training; ``adapter/`` is what peft itself reads.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

__all__: list[str] = []

WRAPPED_NAME = "wrapped.safetensors"
FOLDER_NAME = "adapter"


def is_adapted(model: Any) -> bool:
    """Whether it is a PeftModel (which is not imported to ask)."""
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)


def inside(model: Any) -> nn.Module:
    """The model that the adapters were put on; another model is its own."""
    base: nn.Module = model.get_base_model() if is_adapted(model) else model
    return base


def folded(model: Any) -> dict[str, Any]:
    """The state of the model inside with the adapters added to its weights."""
    whole = copy.deepcopy(model)
    if not hasattr(whole, "merge_and_unload") and not hasattr(whole.base_model, "merge_and_unload"):
        raise ValueError(
            f"`model` must have adapters that can be merged into its weights, got "
            f"{type(model).__name__}; train it with a loop of your own"
        )
    merged = whole.merge_and_unload()
    return {
        name: value.cpu() for name, value in merged.state_dict().items() if hasattr(value, "cpu")
    }


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder / FOLDER_NAME))


def weights_file(folder: Path, plain: str, model: Any) -> Path:
    """The file from which a run goes on with this model."""
    wrapped = folder / WRAPPED_NAME
    return wrapped if is_adapted(model) and wrapped.is_file() else folder / plain
