"""Triton's launches on CPU tensors, run as the code that Triton compiled for another GPU.

Triton asks its driver for everything that has to do with a device. The driver here takes the PTX
for a binary, reads it when a kernel is loaded, and runs it when the kernel is launched; so the
packages' own wrappers run unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ... import device
from ..compiler import _Driver, _Utils
from ..targets import TARGETS
from .counters import Counters
from .errors import UnsupportedError
from .executor import Kernel
from .memory import GlobalMemory, poisoned
from .sanitizer import Sanitizer


class _Launches:
    """What is switched on for the launches of the moment."""

    def __init__(self) -> None:
        self.sanitizer: Sanitizer | None = None
        self.counters: Counters | None = None
        self.edit: Callable[[str], str] | None = None
        self.is_fused = False
        self.largest_grid = 1 << 20
        self.poisoned: set[int] = set()  # addresses of storages that came from torch.empty
        self.kernels: dict[tuple[str, int, bool], Kernel] = {}

    def kernel(self, text: str, shared: int) -> Kernel:
        if self.edit is not None:
            text = self.edit(text)
        key = (text, shared, self.is_fused)
        if key not in self.kernels:
            self.kernels[key] = Kernel(text, shared, fused=self.is_fused)
        return self.kernels[key]


_launches = _Launches()


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class _PoisonedEmpty(TorchDispatchMode):
    """torch.empty gives poison, and its storages are remembered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prims"):
            # An operator of somebody's own allocates inside: PyTorch has taken this mode away by
            # now, so it is put back, and the operator's code for the CPU is called.
            with self:
                return func.redispatch(_CPU, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            name = func.__name__
            if name.startswith(("empty", "new_empty")):
                if out.numel():
                    poisoned(out)
                    _launches.poisoned.add(out.untyped_storage().data_ptr())
            elif out.numel() and name.startswith(("zeros", "full", "ones", "clone", "_to_copy")):
                _launches.poisoned.discard(out.untyped_storage().data_ptr())
        return out


class _RunningUtils(_Utils):
    """A loaded binary is the text of its PTX."""

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:  # type: ignore[override]
        _, binary, shared, _ = arguments
        return (0, (binary.decode(), shared), 0, 0, 1024)


class _RunningDriver(_Driver):
    def __init__(self, target: Any, index: int, processors: int) -> None:
        super().__init__(target, index, processors)
        self.utils = _RunningUtils(target, processors)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())
        function = f"{source.fn.fn.__module__}:{source.fn.fn.__name__}"

        def launch(*given: Any) -> None:
            grid, (text, shared), values = given[:3], given[4], given[9:]
            _launch(text, shared, grid, 32 * metadata.num_warps, kinds, values, function)

        return launch


def _flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of every argument; those of a tuple one by one, as the PTX takes them."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        else:
            yield kind, value


def _launch(
    text: str,
    shared: int,
    grid: Any,
    threads: int,
    kinds: list[Any],
    values: Any,
    function: str | None = None,
) -> None:
    kernel = _launches.kernel(text, shared)
    programs = grid[0] * grid[1] * grid[2]
    if programs > _launches.largest_grid:
        raise UnsupportedError(
            f"{kernel.name}: a grid of {programs} programs; "
            f"at most {_launches.largest_grid} are run here"
        )
    memory = GlobalMemory()
    arguments: list[int | float] = []
    for kind, value in _flat(kinds, values):
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise UnsupportedError(
                    f"{kernel.name}: a tensor on {value.device}; CPU tensors are run here"
                )
            start = value.untyped_storage().data_ptr()
            arguments.append(memory.address(value, start in _launches.poisoned))
        elif isinstance(value, (bool, int, float)):
            arguments.append(value)
        elif value is None:
            arguments.append(0)
        else:
            raise UnsupportedError(f"{kernel.name}: an argument of {type(value).__name__}")
    if _launches.sanitizer is not None:
        _launches.sanitizer.begin(kernel.name, kernel.forms, function)
    if _launches.counters is not None:
        _launches.counters.begin()
    kernel.launch(grid, threads, arguments, memory, _launches.sanitizer, _launches.counters)


def _stop_at_ptx(*arguments: Any) -> Any:
    """Triton's hook into a compilation: the text of the PTX stands for the binary."""
    if not arguments:
        return "run as PTX", "run as PTX"
    stages = arguments[1]
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextlib.contextmanager
def executing(
    target: str,
    sanitizer: Sanitizer | None = None,
    counters: Counters | None = None,
    edit: Callable[[str], str] | None = None,
    fused: bool = False,
    largest_grid: int = 1 << 20,
) -> Iterator[None]:
    """Inside this context Triton's launches on CPU tensors run as compiled for a target.

    Args:
        target: "sm_80", "sm_90" or "sm_120".
        sanitizer: Collects findings; without one only wild accesses stop a run.
        counters: Counts what is executed.
        edit: Changes the text of each PTX, to break a kernel on purpose.
        fused: Round a product and the sum behind it once, as the assembler may.
        largest_grid: More programs than this are refused.

    Raises:
        UnsupportedError: Another target, a form that is not modelled, a tensor on a device.

    Example:
        ::

            with executing("sm_80", Sanitizer()):
                out = my_wrapper(torch.randn(128))
    """
    if target not in TARGETS or TARGETS[target][0] != "cuda":
        known = ", ".join(t for t in TARGETS if TARGETS[t][0] == "cuda")
        raise UnsupportedError(f"`target` must be one of {known}, got {target!r}")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, arch, warp, processors = TARGETS[target]
    pretended = device.Target(backend, target, device.SHARED_MEMORY[target], processors)
    index = 2000 + list(TARGETS).index(target)
    running = _RunningDriver(GPUTarget(backend, arch, warp), index, processors)  # type: ignore[arg-type]
    before = dict(_launches.__dict__)
    _launches.__dict__.update(
        sanitizer=sanitizer, counters=counters, edit=edit, is_fused=fused, largest_grid=largest_grid
    )
    driver.set_active(running)  # type: ignore[arg-type]
    hook, knobs.runtime.add_stages_inspection_hook = (
        knobs.runtime.add_stages_inspection_hook,
        _stop_at_ptx,
    )
    try:
        with device.pretend(pretended), _PoisonedEmpty():
            yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook
        _launches.__dict__.update(before)
