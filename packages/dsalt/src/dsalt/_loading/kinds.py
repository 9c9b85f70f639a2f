"""What kind of loader the user gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from .._memory import keeps_state


def set_epoch(x: Any, epoch: int) -> None:
    """Tell the epoch to an object, and to the samplers and datasets inside it, that want it."""
    todo, seen = [x], set()
    while todo:
        item = todo.pop()
        if item is None or id(item) in seen or isinstance(item, (torch.Tensor, type)):
            continue
        seen.add(id(item))
        setter = getattr(item, "set_epoch", None)
        if callable(setter):
            setter(epoch)
        for name in ("sampler", "batch_sampler", "dataset", "data_source", "base"):
            todo.append(getattr(item, "__dict__", {}).get(name))
        several = getattr(item, "__dict__", {}).get("datasets")
        todo.extend(several if isinstance(several, (list, tuple)) else [])


def is_divisible(loader: Any) -> bool:
    """A map-style loader whose batches are torch's own: ranks share out its samples."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
    )


def is_pipe(dataset: Any) -> bool:
    """torch's data pipes, which a DataLoader treats apart."""
    return type(dataset).__module__.startswith("torch.utils.data.datapipes") or any(
        cls.__name__ in ("IterDataPipe", "MapDataPipe") for cls in type(dataset).__mro__
    )


def is_blind(loader: DataLoader[Any]) -> bool:
    """torchdata's loader of a dataset without state_dict, whose generators it does not see."""
    return type(loader).__module__.startswith("torchdata.") and not keeps_state(loader.dataset)


def sampler_is_known(loader: Any) -> bool:
    """Whether a loader with a state of its own knows that of its sampler too.

    torchdata passes over the indices of any other sampler, drawn anew: exact only without chance.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while type(sampler).__name__ == "BatchSampler" and not keeps_state(sampler):
        sampler = sampler.sampler
    ours = (torch.utils.data.SequentialSampler, DistributedSampler)
    known: Callable[[Any], bool] = lambda s: keeps_state(s) or isinstance(s, ours)  # noqa: E731
    return known(sampler) or type(sampler).__module__.startswith("torchdata.")
