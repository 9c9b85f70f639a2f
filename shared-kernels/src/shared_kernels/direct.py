"""Whether PyTorch's dispatcher would do nothing for a call but find its kernel.

A call of an op passes through the dispatcher twice, which costs more than all that a small op
computes. It is needed where something is on that changes what a call means: a transform of
torch.func, a dispatch or function mode, autocast, forward mode, a tracer, the profiler. Where
nothing is, :mod:`shared_kernels.registration` calls the kernel at once. What "nothing" looks like
is not written down here: it is read off a thread in which nobody has changed anything.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

__all__ = ["Signatures", "any_requires_grad", "is_plain"]

_TENSORS = (Tensor, torch.nn.Parameter)
# A schema's words for types, and the Python types that the dispatcher passes on as they are.
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": _TENSORS,
    "float": (float,),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "List[int]": (list,),
}


class Signatures(dict[tuple[type, ...], "list[int] | None"]):
    """Types of an op's arguments, as they come -> which of them are tensors; None where the
    dispatcher would convert one. Each combination is looked through once."""

    def __init__(self, schema: Any) -> None:
        super().__init__()
        self.accepted = _accepted_types(schema)

    def __missing__(self, kinds: tuple[type, ...]) -> list[int] | None:
        found = None
        if self.accepted is not None and all(
            kind in types for types, kind in zip(self.accepted, kinds, strict=True)
        ):
            found = [place for place, kind in enumerate(kinds) if kind in _TENSORS]
        self[kinds] = found
        return found


def _accepted_types(schema: Any) -> list[frozenset[type]] | None:
    """For each argument the types that need no conversion; None where one is not known here."""
    found = []
    for argument in schema.arguments:
        word = str(argument.type)
        is_optional = word.startswith("Optional[")
        word = word.removeprefix("Optional[").removesuffix("]") if is_optional else word
        if word not in _TYPES:
            return None
        found.append(frozenset((*_TYPES[word], *(type(None),) * is_optional)))
    return found


def _any_requires_grad(*args: Any) -> bool:
    """Whether a tensor among the arguments, or in a list among them, requires a gradient."""
    return pytree.tree_any_only(Tensor, lambda x: x.requires_grad, args)


# The same in C++, which torch 2.7 does not have yet.
any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", _any_requires_grad)


def _state() -> tuple[int, int]:
    """Which keys the dispatcher adds to those of the tensors, and which it leaves out."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
    )


@functools.cache
def _untouched(device: str) -> tuple[frozenset[tuple[int, int]], frozenset[int]]:
    """The states of a new thread, in inference mode too, and the keys of its dense tensors."""
    states, keys = set(), set()

    def look() -> None:
        for is_inference in (False, True):
            with torch.inference_mode(is_inference):
                states.add(_state())
                keys.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(states), frozenset(keys)


def is_plain(signatures: Signatures, args: Sequence[Any]) -> bool:
    """Whether these arguments, all that the schema has, may go to the kernel at once."""
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    places = signatures[tuple(map(type, args))]
    states, keys = _untouched("cpu")
    if places is None or _state() not in states:
        return False
    for place in places:
        own = torch._C._dispatch_keys(args[place]).raw_repr()
        if own not in keys and not (
            args[place].device.type == "cuda" and own in _untouched("cuda")[1]
        ):
            return False
    return True
