"""Make unwritten and overwritten memory visible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _fill(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.fill_(float("nan"))
    if x.dtype == torch.bool:
        return x.fill_(True)
    return x.fill_(torch.iinfo(x.dtype).min) if not x.is_complex() else x


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty, empty_like, empty_strided and new_empty give NaN (integers: min)."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: _fill(function(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            patch = mock.patch.object(torch, name, poisoned(getattr(torch, name)))
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)))
        yield


def guarded(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu", rows: int = 64
) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous NaN-filled tensor with guard rows before and behind it, and their check."""
    row = shape[-1] if shape else 1
    size = int(torch.Size(shape).numel())
    mark = 77
    memory = torch.full((size + 2 * rows * row,), mark, dtype=dtype, device=device)
    view = memory[rows * row : rows * row + size].view(tuple(shape))
    _fill(view)

    def check() -> None:
        before, behind = memory[: rows * row], memory[rows * row + size :]
        if not bool((before == mark).all() and (behind == mark).all()):
            raise AssertionError("memory outside the tensor was written")

    return view, check
