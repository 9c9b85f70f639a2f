"""What a program may have changed about torch before it calls us."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch


@contextlib.contextmanager
def _dtype() -> Iterator[None]:
    # buffers of fp64 are too large where fp32 is meant; those of a half type would be overrun
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device() -> contextlib.AbstractContextManager[object]:
    # stands for a GPU: what is made there by mistake has no values
    return torch.device("meta")


_DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "dtype": _dtype,
    "device": _device,
}


def each_default() -> pytest.MarkDecorator:
    """A parameter ``default`` of a test: a context with another default of torch.

    ``torch.set_default_dtype`` and ``torch.set_default_device`` change no result of a call whose
    tensors have a dtype and a device.
    """
    return pytest.mark.parametrize("default", list(_DEFAULTS.values()), ids=list(_DEFAULTS))
