"""Few-label memories: settings by validation, numbers from the test set.

1797 handwritten digits of 8 x 8, or 1800 points in ten round clusters of 64 dimensions: 1000 are
stored, 300 validate, the rest test; noise is added to all, then they are centred and scaled to unit
length. Of the stored only a few have a label. A Hopfield memory holds the labelled ones; a diffused
memory all of them, with zero values where the label is unknown.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffused_attention import DiffusedHopfield
from ..hopfield import Hopfield
from .report import spread

STATIC: dict[str, Any] = {"disable_out_projection": True}
for _name in ("stored_pattern", "state_pattern", "pattern_projection"):
    STATIC |= {f"{_name}_as_static": True, f"normalize_{_name}": False}
    STATIC |= {f"normalize_{_name}_affine": False}

BETAS = (4.0, 8.0, 16.0, 32.0, 64.0)
N_STORED, N_VALIDATION = 1000, 300
# Standard deviation of a cluster in each dimension; that of the clusters' centres is 1.
CLUSTER_WIDTH = 1.6


class Task(NamedTuple):
    """Stored patterns and their known labels (one-hot, else zero); the other parts (X, y)."""

    stored: Tensor
    values: Tensor
    labelled: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) pixels in [0, 1] and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the experiments need scikit-learn: difflayers[examples]") from error
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)


def clusters(seed: int) -> tuple[Tensor, Tensor]:
    """(1800, 64) points around ten random centres and the number of their centre."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(1800) % 10
    centres = torch.randn(10, 64, generator=generator)
    return centres[y] + CLUSTER_WIDTH * torch.randn(1800, 64, generator=generator), y


DATA: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "digits": lambda seed: digits(),
    "clusters": clusters,
}


def task(
    data: str, seed: int, labels: int = 20, noise: float = 0.0, balanced: bool = False
) -> Task:
    """One split of "digits" or "clusters" with ``labels`` labels.

    Args:
        noise: standard deviation per dimension, in units of that of the data.
        balanced: as many labels of each class; else those of stored patterns drawn at random.
    """
    X, y = DATA[data](seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(X), generator=generator)
    X = X + noise * X.std() * torch.randn(X.shape, generator=generator)
    X = torch.nn.functional.normalize(X - X[order[:N_STORED]].mean(0), dim=-1)
    stored, validation, test = order.tensor_split((N_STORED, N_STORED + N_VALIDATION))
    labelled = torch.arange(labels)
    if balanced:
        labelled = torch.cat([(y[stored] == c).nonzero()[: labels // 10, 0] for c in range(10)])
    values = torch.zeros(N_STORED, 10)
    values[labelled, y[stored][labelled]] = 1.0
    return Task(X[stored], values, labelled, (X[validation], y[validation]), (X[test], y[test]))


@torch.no_grad()
def accuracy(memory: Hopfield, task: Task, part: tuple[Tensor, Tensor], everything: bool) -> float:
    """Share of states whose retrieved value has its largest entry at their class."""
    stored, values = task.stored, task.values
    if not everything:
        stored, values = stored[task.labelled], values[task.labelled]
    found: Tensor = memory((stored[None], part[0][None], values[None]))[0]
    return float((found.argmax(-1) == part[1]).double().mean())


def grid(quick: bool, **options: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the listed settings (tuples), the first two of each when quick."""
    lists = {
        k: (v[:2] if quick else v) if isinstance(v, tuple) else (v,) for k, v in options.items()
    }
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def hopfield_score(task: Task, quick: bool = False) -> float:
    """Test accuracy of the plain memory at the beta that validates best."""
    betas = BETAS[:2] if quick else BETAS
    memories = [Hopfield(scaling=beta, **STATIC) for beta in betas]
    best = max(memories, key=lambda m: accuracy(m, task, task.validation, False))
    return accuracy(best, task, task.test, False)


def diffused_score(task: Task, quick: bool = False, **options: Any) -> float:
    """Test accuracy of a diffused memory at the settings (tuples) that validate best."""
    options = {"scaling": (16.0, 32.0, 64.0), "k_neighbors": (5, 10), **options}
    memories = [DiffusedHopfield(**settings, **STATIC) for settings in grid(quick, **options)]
    best = max(memories, key=lambda m: accuracy(m, task, task.validation, True))
    return accuracy(best, task, task.test, True)


# What smooths the values: few settings that cover short and long reach.
VALUES: dict[str, Any] = {
    "diffusion_mode": "ppr",
    "eta": 1.0,
    "diffuse_key": False,
    "diffuse_value": True,
    "diffusion_steps": (10, 30),
    "restart": (0.02, 0.1),
}
KEYS: dict[str, Any] = {"eta": (0.1, 0.3, 0.6), "diffusion_steps": (1, 3)}
LOGITS: dict[str, Any] = {
    "diffuse_key": False,
    "use_logit_diffusion": True,
    "logit_eta": (0.5, 1.0),
}


def compare(
    setups: dict[str, dict[str, Any]], conditions: Sequence[Sequence[Task]], quick: bool
) -> list[list[str]]:
    """Rows of a table: the plain memory, then every setup; columns are conditions (tasks)."""
    rows = [["Hopfield", *(spread([hopfield_score(t, quick) for t in c]) for c in conditions)]]
    for name, options in setups.items():
        scores = [[diffused_score(t, quick, **options) for t in c] for c in conditions]
        rows.append([name, *map(spread, scores)])
    return rows
