"""The native CPU library: compiled loops behind a door of raw pointers.

    why_not(*tensors)   None, or in one line why the library cannot run on them and how to get it
    instruction_set()   "avx512", "avx2" or "base": what it runs here
    call(name, ...)     one function of it; the interpreter's lock is released meanwhile
    in_ranges(...)      work on ranges of rows or heads, in torch's number of threads
    run(name, ...)      both: a function of the library on all items of a structure

What a package's backend "native" needs is `why_not` for its ``Backend`` entry, and `run` (or `call`
inside `in_ranges`) for its work. Two variables of the environment are read at every call:
`SHARED_KERNELS_NATIVE=0` switches the library off, `SHARED_KERNELS_INSTRUCTIONS=avx512|avx2|base`
asks for a narrower set than the processor has. `python -m shared_kernels.native build` compiles the
library in a checkout.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "LIBRARY",
    "call",
    "empty",
    "in_ranges",
    "instruction_set",
    "instruction_sets",
    "multiplies_bytes",
    "run",
    "why_not",
    "zeros",
]

# what the library's functions know a dtype by
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_SETS = ("base", "avx2", "avx512")
_VARIABLE = "SHARED_KERNELS_INSTRUCTIONS"
_INTERFACE = 10
_NAME = "libshared_kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# another build of it, such as one with a sanitizer
LIBRARY = Path(os.environ.get("SHARED_KERNELS_LIBRARY") or Path(__file__).with_name(_NAME))
_HOW = (
    "install a wheel of shared-kernels for this platform, or compile it in a checkout with "
    "`python -m shared_kernels.native build` (it needs a C++ compiler)"
)
# what ELF calls the processors that platform.machine() names
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21, "s390x": 22}
_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# what the functions take after the number of the instruction set
_SIGNATURES = {
    "rows_forward": (_P, _P, _N, _P, _N, _N, _N, _I, _I),
    "rows_backward": (_P, _P, _P, _N, _P, _P, _N, _N, _I),
    **dict.fromkeys(
        (
            "attention_forward",
            "attention_backward",
            "attention_double_forward",
            "attention_double_backward",
            "lazy_forward",
            "lazy_backward",
            "lazy_double_forward",
            "lazy_double_backward",
            "band_forward",
            "band_backward",
            "band_double_forward",
            "band_double_backward",
            "pages_decode",
            "pairs_product",
            "neighbours_search",
            "association_forward",
            "association_backward",
        ),
        (_P, _N, _N),
    ),
}
# From so many seconds of work on, a second thread is worth its start.
_WORTH_A_THREAD = 1e-3


def _elf_fault(path: Path) -> str | None:
    """What is wrong with an ELF file: mapping one that is cut short would end the process, and the
    loader calls one of another processor absent. Other formats are left to their loaders."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return None
    if len(header) < 64:
        return "its file is cut short"
    machine = platform.machine()
    made_for = struct.unpack_from("<H", header, 18)[0]
    if made_for != _ELF_MACHINES.get(machine, made_for):
        names = {number: name for name, number in _ELF_MACHINES.items()}
        return f"it is made for {names.get(made_for, f'processor {made_for}')}, this is {machine}"
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return "its file is cut short" if table + size * count > path.stat().st_size else None


@functools.cache
def _load(path: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not Path(path).exists():
        return f"there is no native library in this installation; {_HOW}"
    try:
        fault = _elf_fault(Path(path))
        if fault is not None:
            return f"the native library cannot be loaded ({fault}); {_HOW}"
        library = ctypes.CDLL(path)
        found = library.interface_version()
    except (OSError, AttributeError) as problem:
        first = str(problem).splitlines()[0]
        return f"the native library cannot be loaded ({first}); {_HOW}"
    if found != _INTERFACE:
        return f"the native library is of interface {found}, not {_INTERFACE}; {_HOW}"
    for name, kinds in _SIGNATURES.items():
        getattr(library, name).argtypes = (_I, *kinds)
    return library


@functools.cache
def _chosen(path: str, wanted: str) -> tuple[ctypes.CDLL, int] | str:
    """The library and the number of its instruction set, or why it cannot run."""
    library, wanted = _load(path), wanted.lower()
    if isinstance(library, str):
        return library
    widest = library.widest_set()
    if wanted and wanted not in _SETS:
        return (
            f"the native library has no instruction set {wanted!r}: {_VARIABLE} must be one of "
            f"{', '.join(_SETS)}"
        )
    if wanted and _SETS.index(wanted) > widest:
        return (
            f"the native library cannot run {_VARIABLE}={wanted}: this processor has "
            f"{_SETS[widest]} at most"
        )
    if not wanted and widest == 0 and platform.machine().lower() in ("x86_64", "amd64"):
        return (
            "the native library gains nothing over PyTorch on an x86 processor without AVX2; "
            f"{_VARIABLE}=base runs it all the same"
        )
    return library, _SETS.index(wanted) if wanted else widest


def _library_or_reason() -> tuple[ctypes.CDLL, int] | str:
    """The library and the number of its instruction set by the environment as it is now."""
    if os.environ.get("SHARED_KERNELS_NATIVE") == "0":
        return (
            "SHARED_KERNELS_NATIVE=0 switches the native library off; unset it to use the library"
        )
    return _chosen(str(LIBRARY), os.environ.get(_VARIABLE, ""))


def _library() -> tuple[ctypes.CDLL, int]:
    found = _library_or_reason()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def why_not(*tensors: Tensor | None) -> str | None:
    """None where the native library runs on such tensors; else the reason, and how to get it.

    Args:
        tensors: the floating-point inputs; None is passed over. Without any the question is whether
            the library runs here at all.

    Example:
        >>> import torch
        >>> why_not(torch.empty(3, device="meta"))
        'the native library runs on CPU tensors, got one on meta'
    """
    for x in tensors:
        if x is not None and not x.is_cpu:
            return f"the native library runs on CPU tensors, got one on {x.device}"
        if x is not None and x.dtype not in DTYPES:
            return f"the native library knows fp16, bf16, fp32 and fp64, got {x.dtype}"
    found = _library_or_reason()
    return found if isinstance(found, str) else None


def instruction_set() -> str:
    """The instruction set that runs here: "avx512", "avx2" or "base" (SSE2, NEON).

    Raises:
        RuntimeError: the library cannot run; the text is that of `why_not`.
    """
    return _SETS[_library()[1]]


def multiplies_bytes() -> bool:
    """Whether AVX-512 runs here, on a processor that has its products of bytes (VNNI)."""
    library, chosen = _library()
    return _SETS[chosen] == "avx512" and _has_byte_products(library)


@functools.cache
def _has_byte_products(library: ctypes.CDLL) -> bool:
    # asked once: a virtual machine takes 100 microseconds to answer
    return bool(library.has_byte_products())


def instruction_sets() -> tuple[str, ...]:
    """All sets that this processor can run, the widest last; empty without a library."""
    library = _load(str(LIBRARY))
    return () if isinstance(library, str) else _SETS[: library.widest_set() + 1]


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that the library writes: on the CPU, whatever torch's default device and dtype are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The same memory, filled with zeros."""
    return torch.zeros(shape, dtype=dtype, device="cpu")


def call(name: str, *arguments: Any) -> None:
    """Run one function of the library. Pointers are numbers: their tensors must outlive the call.

    Raises:
        RuntimeError: the library cannot run (the text is that of `why_not`), or it is not known
            here what the function takes.
        MemoryError: there was no room for the function's workspace.
    """
    library, chosen = _library()
    function = getattr(library, name)
    if function.argtypes is None:  # Python's whole numbers would go as 32 bits
        raise RuntimeError(f"native `{name}` has no line in _SIGNATURES: add its arguments there")
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"native::{name}"):
            failed = function(chosen, *arguments)
    else:
        failed = function(chosen, *arguments)
    if failed:
        raise MemoryError(f"native `{name}`: no memory for its workspace")


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait from one call to the next, as to start one takes .4 ms."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, torch.get_num_threads()), "shared_kernels")


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of them


def in_ranges(
    run: Callable[[int, int], None], n: int, seconds: float, threads: int | None = None
) -> None:
    """``run(start, stop)`` over ranges that cover 0 .. n, in as many threads as torch has.

    The ranges are equal parts of n; what `run` computes of an item must not depend on them. Work of
    less than about a millisecond stays in this thread, as all work does where torch has one thread:
    in the workers of a DataLoader, and under torchrun.

    Args:
        run: it works on items start .. stop - 1 and writes nothing of others.
        n: how many items.
        seconds: about how long all of it takes in one thread.
        threads: how many at most, instead of as many as torch has.
    """
    worth = min(n, int(seconds / _WORTH_A_THREAD) + 1)
    threads = worth if worth <= 1 else min(worth, threads or torch.get_num_threads())
    if threads <= 1:
        run(0, n)
        return
    # the caller takes what is left when a thread does not start in time
    ranges = collections.deque((n * i // threads, n * (i + 1) // threads) for i in range(threads))

    def work() -> None:
        while True:
            try:
                start, stop = ranges.popleft()
            except IndexError:
                return
            run(start, stop)

    others: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # a process that is about to end starts no thread
        for _ in range(1, threads):
            others.append(_pool().submit(work))
    try:
        work()
    finally:
        ranges.clear()
        started = [other for other in others if not other.cancel()]
        wait(started)  # they write to what belongs to this call
    for other in started:
        other.result()


def run(name: str, structure: ctypes.Structure, n: int, seconds: float) -> None:
    """Run one function of the library on items 0 .. n of a structure, see `call` and `in_ranges`.

    Args:
        name: of a function that takes a pointer to the structure, the first item and the end.
        structure: the arguments; every tensor that it points into must outlive the call.
        n, seconds: as for `in_ranges`.
    """
    pointer = ctypes.c_void_p(ctypes.addressof(structure))
    in_ranges(lambda start, stop: call(name, pointer, start, stop), n, seconds)
