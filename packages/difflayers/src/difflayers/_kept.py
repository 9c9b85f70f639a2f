"""What is kept between calls: how it is made, and when it still holds.

One rule for all of it: made with autocast off, outside inference mode and without gradient, so that
every later call may use it; and written by one assignment, so that threads may share it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared_kernels.ops import full_precision

T = TypeVar("T")


def make(kind: str, build: Callable[[], T]) -> T:
    """build() under the rule of this file."""
    if torch.compiler.is_compiling():
        with torch.no_grad(), full_precision(kind):
            return build()
    # inference_mode(False) switches the gradient on: no_grad comes after it
    with torch.inference_mode(False), torch.no_grad(), full_precision(kind):
        return build()


class _Steps:
    """How often any optimizer has stepped: fused ones change parameters without a new version."""

    count = 0
    hooked = False
    lock = threading.Lock()

    @classmethod
    def watch(cls) -> None:
        with cls.lock:
            if not cls.hooked:
                cls.hooked = True
                register_optimizer_step_post_hook(cls._stepped)

    @classmethod
    def _stepped(cls, *_: Any) -> None:
        with cls.lock:
            cls.count += 1


class _Entry(NamedTuple):
    owners: tuple[Any, ...] = ()
    state: tuple[Any, ...] = ()
    value: Any = None


class TensorCache:
    """One value per state of a tensor: same memory hits, any in-place change misses.

    Told by identity (a weak reference to the tensor that owns the memory), layout and torch's
    version counter; for tensors that optimizers change, by the number of optimizer steps, too; and
    by ``extra``, the settings that the value depends on. Nothing is kept, or taken, while a call is
    traced, compiled or transformed. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        _Steps.watch()
        self._entry = _Entry()

    @property
    def _value(self) -> Any:
        return self._entry.value

    def clear(self) -> None:
        self._entry = _Entry()

    def get(self, tensors: tuple[Tensor | None, ...], extra: Any, build: Callable[[], T]) -> T:
        kind = next(t.device.type for t in tensors if t is not None)
        if _is_traced() or not all(_is_plain(t) for t in tensors):
            return make(kind, build)
        owners = tuple(None if t is None else (t if t._base is None else t._base) for t in tensors)
        state = (extra, *(_state(t, o) for t, o in zip(tensors, owners, strict=True)))
        entry = self._entry  # another thread may write a new one at any time
        same = len(owners) == len(entry.owners) and all(
            (ref is None and owner is None) or (ref is not None and ref() is owner)
            for ref, owner in zip(entry.owners, owners, strict=True)
        )
        if same and state == entry.state:
            found: T = entry.value
            return found
        value = make(kind, build)
        refs = tuple(None if o is None else weakref.ref(o) for o in owners)
        self._entry = _Entry(refs, state, value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorCache:
        return TensorCache()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        return TensorCache, ()


def _is_traced() -> bool:
    """Whether this call is recorded: what is kept would be recorded as a constant."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def _is_plain(t: Tensor | None) -> bool:
    if t is None:
        return True
    if t.is_inference() or isinstance(t, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _state(t: Tensor | None, owner: Tensor | None) -> tuple[Any, ...]:
    if t is None or owner is None:
        return ()
    steps = _Steps.count if owner.requires_grad else 0
    layout = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)
    return (owner._version, steps, *layout)
