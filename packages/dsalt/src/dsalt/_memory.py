"""What the objects behind a loader remember between two batches: generators, counters, orders."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import pickle
import random
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from io import IOBase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__: list[str] = []

_SCALARS = (bool, int, float, str, bytes, type(None))
_RNGS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CLOSED = (type, types.ModuleType, Tensor, np.ndarray, np.generic, torch.dtype, torch.device)
_METHODS = (types.MethodType, types.BuiltinMethodType)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_MOST_OBJECTS = 1000


class _Leaf(NamedTuple):
    """A value that may change: ``holder[key]`` of a dict, or the attribute ``key`` of an object."""

    holder: Any
    key: Any
    value: Any

    def replace(self, value: Any) -> None:
        if isinstance(self.holder, (dict, list, deque)):
            self.holder[self.key] = value
        else:
            object.__setattr__(self.holder, self.key, value)


class Memory:
    """The state of everything that is reachable from some objects, as plain values by path.

    A generator (torch, numpy, python) is saved always; a number, a text or a container of them
    when it is no longer what it was when this Memory was made (or at the last ``mark``). So what
    the user configures otherwise in a later run, a batch size for example, is not overwritten.

    Args:
        roots: objects by name.
        without: objects that are not entered.
        most: containers and arrays with more entries are not looked at.
    """

    def __init__(self, roots: Mapping[str, Any], without: Iterable[Any] = (), most: int = 256):
        self.roots = dict(roots)
        self.without = [x for x in without if x is not None]
        self.most = most
        self.mark()

    def mark(self) -> None:
        """Take what is there now as the unchanged state."""
        self._before = {
            path: _digest(leaf.value)
            for path, leaf in self._leaves()[0].items()
            if not isinstance(leaf.value, _RNGS)
        }

    def generators(self) -> set[int]:
        """The identities of the generators, to see whether two parties share one."""
        found = (leaf.value for leaf in self._leaves()[0].values())
        return {id(value) for value in found if isinstance(value, _RNGS)}

    def state(self, generators_only: bool = False) -> dict[str, Any]:
        """Plain values by path, which ``torch.load(weights_only=True)`` reads."""
        if generators_only:
            leaves = self._leaves()[0].items()
            return {p: _encode(x.value) for p, x in leaves if isinstance(x.value, _RNGS)}
        found: dict[str, Any] = {}
        for path, leaf in self._leaves()[0].items():
            if is_bare_iterator(leaf.value):
                found[path] = ["iterator", type(leaf.value).__name__]
            elif isinstance(leaf.value, _RNGS) or self._before.get(path) != _digest(leaf.value):
                found[path] = _encode(leaf.value)
        for name, root in self.roots.items():
            if keeps_state(root):
                found[f"{name}.state_dict()"] = ["state_dict", root.state_dict()]
        return found

    def load(self, state: Mapping[str, Any]) -> None:
        """Put a state back; ValueError for a part of it that has no place here."""
        self.check(state)
        leaves, owners = self._leaves()
        for path, (kind, data) in state.items():
            if kind == "state_dict":
                self.roots[path.removesuffix(".state_dict()")].load_state_dict(data)
            else:
                _put(leaves.get(path) or _room(path, owners), kind, data)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise for a state that no Memory can put back."""
        for path, (kind, data) in state.items():
            if kind == "iterator":
                raise ValueError(
                    f"cannot resume exactly: `{path}` was an iterator ({data}), whose place cannot "
                    f"be saved; give its owner state_dict and load_state_dict"
                )

    def _leaves(self) -> tuple[dict[str, _Leaf], dict[str, Any]]:
        """(the values that may change, the objects that hold them), by path."""
        found: dict[str, _Leaf] = {}
        entered: dict[str, Any] = {}
        seen = {id(x) for x in self.without}
        todo = deque((name, self.roots, name, root) for name, root in self.roots.items())
        while todo and len(seen) < _MOST_OBJECTS:
            path, holder, key, value = todo.popleft()
            if isinstance(value, _SCALARS):
                if holder is not self.roots:
                    found[path] = _Leaf(holder, key, value)
                continue
            if id(value) in seen or _is_global(value):
                continue
            seen.add(id(value))
            if isinstance(value, _RNGS) or self._is_plain(value):
                found[path] = _Leaf(holder, key, value)
            elif is_bare_iterator(value):
                found[path] = _Leaf(holder, key, value)
            else:
                entered[path] = value
                todo.extend(self._inside(path, value))
        return found, entered

    def _is_plain(self, value: Any) -> bool:
        """Numbers and texts, or a container of them that is not too long."""
        if isinstance(value, np.ndarray):
            return value.size <= self.most and value.dtype.kind in "biuf"
        if isinstance(value, Tensor):
            # reading one on an accelerator would wait for it
            ordinary = type(value) is Tensor and value.layout == torch.strided
            return ordinary and value.device.type == "cpu" and value.numel() <= self.most
        if not isinstance(value, _CONTAINERS) or len(value) > self.most:
            return False
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return all(isinstance(part, _SCALARS) for part in parts)

    def _inside(self, path: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        """(path, holder, key, part) of the parts of an object."""
        if isinstance(value, _CLOSED):
            return
        if isinstance(value, dict):
            if len(value) <= self.most:
                yield from ((f"{path}[{k!r}]", value, k, v) for k, v in list(value.items()))
        elif isinstance(value, (list, tuple, deque)):
            if len(value) <= self.most:
                for i, part in enumerate(value):
                    if not isinstance(part, _SCALARS):
                        yield f"{path}[{i}]", value, i, part
        elif isinstance(value, functools.partial):
            yield f"{path}.func", value, "func", value.func
            yield f"{path}.args", value, "args", value.args
            yield f"{path}.keywords", value, "keywords", value.keywords
        elif isinstance(value, _METHODS):
            if not isinstance(value.__self__, types.ModuleType):
                yield f"{path}.__self__", value, "__self__", value.__self__
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                yield f"{path}.{name}", cell, "cell_contents", _content(cell)
            yield from _globals_of(path, value)
        else:
            names = dict(getattr(value, "__dict__", {}))
            for cls in type(value).__mro__:
                slots = cls.__dict__.get("__slots__", ())
                for name in [slots] if isinstance(slots, str) else slots:
                    if hasattr(value, name):
                        names.setdefault(name, getattr(value, name))
            if isinstance(value, DataLoader):
                names.pop("_iterator", None)
            for name in names.keys() - _only_counted(type(value)):  # type: ignore[arg-type]
                yield f"{path}.{name}", value, name, names[name]
            for cls in type(value).__mro__:
                for function in _functions_of(cls):
                    yield from _globals_of(cls.__module__, function)


def _room(path: str, owners: Mapping[str, Any]) -> _Leaf:
    """A place for an attribute or a key that the resumed run made as it went on."""
    for mark in (".", "["):
        above, found, name = path.rpartition(mark)
        owner = owners.get(above) if found else None
        if isinstance(owner, dict) and mark == "[":
            return _Leaf(owner, ast.literal_eval(name[:-1]), None)
        if owner is not None and mark == "." and not isinstance(owner, _CONTAINERS):
            return _Leaf(owner, name, None)
    raise ValueError(
        f"cannot resume exactly: the run that is resumed had `{path}`, which is not there now; "
        f"give the loader that it was started with"
    )


def keeps_state(x: Any) -> bool:
    """Whether an object has the protocol ``state_dict`` / ``load_state_dict``; modules do not."""
    return (
        not isinstance(x, torch.nn.Module)
        and callable(getattr(x, "state_dict", None))
        and callable(getattr(x, "load_state_dict", None))
    )


def is_bare_iterator(x: Any) -> bool:
    """A generator, ``iter(list)``, ``itertools.count()``: its place cannot be read from outside."""
    return isinstance(x, Iterator) and not isinstance(x, IOBase) and not hasattr(x, "__dict__")


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@functools.lru_cache(maxsize=1024)
def _functions_of(cls: type) -> list[types.FunctionType]:
    """The methods that a user wrote for a class."""
    if cls.__module__.split(".")[0] in ("torch", "builtins", "numpy", "typing", "collections"):
        return []
    return [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]


@functools.lru_cache(maxsize=1024)
def _only_counted(cls: type) -> frozenset[str]:
    """Attributes that the methods of a class add to and never read: they affect no sample."""
    counted: set[str] = set()
    used: set[str] = set()
    methods = (f for c in cls.__mro__ for f in _functions_of(c) if f.__name__ != "__init__")
    for method in methods:
        steps = [*dis.get_instructions(method)]
        for i, step in enumerate(steps):
            second, third = (steps + 2 * steps[-1:])[i + 1 : i + 3]
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                adds = third.argrepr == "+=" or third.opname == "INPLACE_ADD"
                appends = second.argval in ("append", "add", "extend")
                (counted if adds or appends else used).add(step.argval)
    return frozenset(counted - used)


def _globals_of(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any, Any, Any]]:
    """The generators that a function reads from its module."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, _RNGS):
            yield f"{path}:{name}", function.__globals__, name, value


def _is_global(value: Any) -> bool:
    """The global generators of torch, numpy and python: the stream keeps their states itself."""
    owner = getattr(random.random, "__self__", None)
    return value is torch.default_generator or value is owner or value is np.random.mtrand._rand


def _digest(value: Any) -> bytes:
    """What tells whether a plain value has changed."""
    if is_bare_iterator(value):
        return b""
    return hashlib.blake2b(pickle.dumps(_encode(value)), digest_size=16).digest()


def _numbers(value: Any) -> Any:
    """numpy's states with lists in place of arrays, so that torch.load reads them."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_numbers(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _encode(value: Any) -> list[Any]:
    """(kind, data) of plain types only, which ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, torch.Generator):
        return ["torch", value.get_state().numpy().tobytes()]
    if isinstance(value, np.random.Generator):
        return ["numpy", _numbers(value.bit_generator.state)]
    if isinstance(value, np.random.RandomState):
        return ["numpy.RandomState", _numbers(value.get_state(legacy=False))]
    if isinstance(value, random.Random):
        return ["random", _numbers(value.getstate())]
    if isinstance(value, Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ["tensor", [str(value.dtype).removeprefix("torch."), list(value.shape), content]]
    if isinstance(value, np.ndarray):
        return ["array", [str(value.dtype), value.tolist()]]
    if isinstance(value, dict):
        return ["dict", [[k, v] for k, v in value.items()]]
    if isinstance(value, _SCALARS):
        return ["value", value]
    return [type(value).__name__, list(value)]


def _state_of_numpy(data: Any) -> Any:
    """numpy's bit generators want arrays where there are long lists."""
    if isinstance(data, dict):
        return {k: _state_of_numpy(v) for k, v in data.items()}
    return np.array(data, dtype=np.uint64) if isinstance(data, list) else data


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _put(leaf: _Leaf, kind: str, data: Any) -> None:
    value = leaf.value
    if kind == "torch":
        value = value if isinstance(value, torch.Generator) else torch.Generator()
        value.set_state(_bytes(data))
    elif kind == "numpy":
        if not isinstance(value, np.random.Generator):
            value = np.random.Generator(getattr(np.random, data["bit_generator"])())
        value.bit_generator.state = _state_of_numpy(data)
    elif kind == "numpy.RandomState":
        value = value if isinstance(value, np.random.RandomState) else np.random.RandomState()
        value.set_state(_state_of_numpy(data))
    elif kind == "random":
        value = value if isinstance(value, random.Random) else random.Random()
        version, internal, gauss = data
        value.setstate((version, tuple(internal), gauss))
    elif kind == "tensor":
        name, shape, content = data
        there = _bytes(content).view(getattr(torch, name)).reshape(shape)
        if isinstance(value, Tensor) and value.shape == there.shape:
            value.detach().copy_(there)
        else:
            value = there
    elif kind == "array":
        data = np.array(data[1], dtype=data[0])
        if isinstance(value, np.ndarray) and value.shape == data.shape and value.flags.writeable:
            value[...] = data
        else:
            value = data
    elif kind in ("list", "deque", "set", "dict") and type(value).__name__ == kind:
        # in place: other objects may hold the same container
        value.clear()
        getattr(value, "update" if kind in ("set", "dict") else "extend")(data)
    else:
        kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
        value = dict(data) if kind == "dict" else kinds.get(kind, lambda x: x)(data)
    if value is not leaf.value:
        leaf.replace(value)
