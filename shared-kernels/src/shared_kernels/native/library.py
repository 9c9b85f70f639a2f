"""The native CPU library: compiled loops behind a door of raw pointers.

    why_not()           None, or in words why the library cannot run and how to get it
    instruction_set()   "avx512", "avx2" or "base": what it runs here
    call(name, ...)     one function of it; the interpreter's lock is released meanwhile
    in_ranges(...)      one function over ranges of rows or heads, in torch's number of threads

`SHARED_KERNELS_INSTRUCTIONS=avx512|avx2|base` asks for a narrower set than the processor has.
`python -m shared_kernels.native build` compiles the library in a checkout.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "LIBRARY",
    "call",
    "flag",
    "in_ranges",
    "instruction_set",
    "instruction_sets",
    "pointer",
    "why_not",
]

# what the library's functions know a dtype by
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_SETS = ("base", "avx2", "avx512")
_VARIABLE = "SHARED_KERNELS_INSTRUCTIONS"
_INTERFACE = 2
_NAME = "libshared_kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# another build of it, such as one with a sanitizer
LIBRARY = Path(os.environ.get("SHARED_KERNELS_LIBRARY") or Path(__file__).with_name(_NAME))
_HOW = (
    "install a wheel of shared-kernels for this platform, or compile it in a checkout with "
    "`python -m shared_kernels.native build` (it needs a C++ compiler)"
)
# From so many seconds of work on, a second thread is worth its start.
_WORTH_A_THREAD = 1e-3


class _MissingError(Exception):
    """Why the library cannot be used, in words."""


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to its last table: mapping one that does not ends the process."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return True  # not ELF: the loader looks itself
    if len(header) < 64:
        return False
    table, size, count = (
        struct.unpack_from("<Q", header, 40)[0],
        *struct.unpack_from("<HH", header, 58),
    )
    return table + size * count <= path.stat().st_size


@functools.cache
def _load(path: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("SHARED_KERNELS_NATIVE") == "0":
        return "SHARED_KERNELS_NATIVE=0 switches the native library off"
    if not Path(path).exists():
        return f"there is no native library in this installation; {_HOW}"
    if not _is_whole(Path(path)):
        return f"the native library cannot be loaded (its file is cut short); {_HOW}"
    try:
        library = ctypes.CDLL(path)
        found = library.interface_version()
    except (OSError, AttributeError) as problem:
        first = str(problem).splitlines()[0]
        return f"the native library cannot be loaded ({first}); {_HOW}"
    if found != _INTERFACE:
        return f"the native library is of interface {found}, not {_INTERFACE}; {_HOW}"
    return library


@functools.cache
def _chosen(path: str, wanted: str) -> tuple[ctypes.CDLL, int]:
    library = _load(path)
    if isinstance(library, str):
        raise _MissingError(library)
    widest = library.widest_set()
    if not wanted:
        return library, widest
    if wanted not in _SETS:
        raise _MissingError(f"{_VARIABLE} must be one of {', '.join(_SETS)}, got {wanted!r}")
    if _SETS.index(wanted) > widest:
        raise _MissingError(f"{_VARIABLE}={wanted}, but this processor has {_SETS[widest]} at most")
    return library, _SETS.index(wanted)


def _now() -> tuple[ctypes.CDLL, int]:
    return _chosen(str(LIBRARY), os.environ.get(_VARIABLE, "").lower())


def why_not() -> str | None:
    """None where the native library runs; else the reason, and how to get it.

    Example:
        >>> why_not() is None or "native library" in why_not() or "PROCESSOR" in why_not()
        True
    """
    try:
        _now()
    except _MissingError as reason:
        return str(reason)
    return None


def instruction_set() -> str:
    """The instruction set that runs here: "avx512", "avx2" or "base" (SSE2, NEON).

    Raises:
        RuntimeError: the library cannot run; the text is that of `why_not`.
    """
    try:
        return _SETS[_now()[1]]
    except _MissingError as reason:
        raise RuntimeError(str(reason)) from None


def instruction_sets() -> tuple[str, ...]:
    """All sets that this processor can run, the widest last; empty without a library."""
    library = _load(str(LIBRARY))
    return () if isinstance(library, str) else _SETS[: library.widest_set() + 1]


def call(name: str, *arguments: Any) -> None:
    """Run one function of the library. Tensors go as pointers: they must outlive the call.

    Raises:
        RuntimeError: the library cannot run; the text is that of `why_not`.
        MemoryError: there was no room for the function's workspace.
    """
    try:
        library, chosen = _now()
    except _MissingError as reason:
        raise RuntimeError(str(reason)) from None
    failed = getattr(library, name)(chosen, *(_as_c(argument) for argument in arguments))
    if failed:
        raise MemoryError(f"native `{name}`: no memory for its workspace")


def flag(value: int) -> ctypes.c_int:
    """A C int; plain Python integers go as 64 bits."""
    return ctypes.c_int(value)


def pointer(address: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value


def in_ranges(run: Callable[[int, int], None], n: int, seconds: float) -> None:
    """``run(start, stop)`` over ranges that cover 0 .. n, in as many threads as torch has.

    The ranges are equal parts of n; what `run` computes of an item must not depend on them.

    Args:
        run: it works on items start .. stop - 1 and writes nothing of others.
        n: how many items.
        seconds: about how long all of it takes in one thread.
    """
    threads = min(torch.get_num_threads(), n, int(seconds / _WORTH_A_THREAD) + 1)
    if threads <= 1:
        run(0, n)
        return
    ends = [n * i // threads for i in range(threads + 1)]
    # threads of this call alone: a pool that is kept would be broken in a forked worker
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, ends[:-1], ends[1:]))
