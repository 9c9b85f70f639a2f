"""The worker: a stand-in for Triton's driver, behind which launches compile and do nothing."""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Callable, Container, Iterator
from typing import Any

from .. import device
from . import access
from .keys import key
from .plan import Item, load, plan
from .resources import resources
from .targets import ALL, TARGETS, Row, shortened


class _Utils:
    """What Triton asks of a device; the limits are lifted, because the gates judge."""

    def __init__(self, target: Any, processors: int) -> None:
        self.properties = {
            "max_shared_mem": 1 << 30,
            "multiprocessor_count": processors,
            "max_num_regs": 65536,
            "warpSize": target.warp_size,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def get_device_properties(self, index: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *args: object) -> tuple[int, int, int, int, int]:
        return (0, 0, 0, 0, 1024)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Driver:
    """Stands in for Triton's driver of a GPU that is not there."""

    def __init__(self, target: Any, index: int, processors: int) -> None:
        self.target, self.index = target, index
        self.utils = _Utils(target, processors)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, index: int | None = None) -> int:
        return 0

    def set_current_device(self, index: int) -> None:
        pass

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


class _Known:
    """Stands in for a kernel that a report describes already; launching it does nothing."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, report_key: str) -> None:
        self.name, self.report_key = name, report_key

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        return None


@contextlib.contextmanager
def compiling(name: str, known: Container[str] = ()) -> Iterator[list[tuple[Any, float]]]:
    """Triton compiles CPU tensors' launches for target `name`; yields [(kernel, seconds), ...].

    A kernel whose key is among the `known` is not compiled; `kernel.report_key` is the key.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class ZeroedEmpty(TorchDispatchMode):
        """torch.empty gives zeros: no launcher meets garbage it takes for an index."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.__name__ and isinstance(out, torch.Tensor):
                out.zero_()
            return out

    backend, arch, warp, processors = ALL[name]
    target = device.Target(backend, name, device.SHARED_MEMORY[name], processors)
    kernels: list[tuple[Any, float]] = []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_unless_known(
        self: Any,
        cache_key: Any,
        signature: Any,
        device: Any,
        constexprs: Any,
        options: Any,
        attrs: Any,
        warmup: bool,
    ) -> Any:
        _, _, _, compiler, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constexprs, attrs)
        report_key = key(source, compiler, options)
        if report_key in known:
            return _Known(source.name, report_key)
        kernel = do_compile(self, cache_key, signature, device, constexprs, options, attrs, warmup)
        kernel.report_key = report_key
        return kernel

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, **kwargs)
        kernels.append((kernel, time.perf_counter() - start))
        return kernel

    index = 1000 + list(ALL).index(name)
    # For the rest of the process: there is no driver to go back to.
    driver.set_active(_Driver(GPUTarget(backend, arch, warp), index, processors))  # type: ignore[arg-type]
    JITFunction.run, JITFunction._do_compile = recording, compile_unless_known
    try:
        with device.pretend(target), ZeroedEmpty():
            yield kernels
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile


class _Everything:
    """Holds every key: nothing is compiled."""

    def __contains__(self, key: object) -> bool:
        return True


def representative(name: str, items: list[Item]) -> list[Item]:
    """Items that launch every kernel, at a size of 128 where it has one; nothing is compiled.

    And those that fail, which `work` will report.
    """
    out: list[Item] = []
    seen: set[tuple[str, str]] = set()
    with compiling(name, _Everything()) as kernels:
        for item in sorted(items, key=lambda item: item.size != 128):
            kernels.clear()
            with contextlib.suppress(Exception):
                item.compile()
            launched = {(item.package, kernel.name) for kernel, _ in kernels}
            if not launched or not launched <= seen:
                out.append(item)
            seen |= launched
    return out


# What a row says of the launch; the rest describes its kernel.
_OF_LAUNCH = ("target", "launch", "size", "config", "hmma_allowed", "access", "variant")


def work(
    name: str,
    files: list[str],
    only: str,
    first: int,
    write: Callable[[Row], None],
    report: list[Row] | None = None,
) -> None:
    """Compile the items from number `first` on; `write` gets a record before and after each.

    What the rows of a `report` describe is not compiled again. For the targets of MORE, one launch
    of each kernel is compiled.
    """
    items = [item for file in files for item in plan(*load(file), name)]
    if name not in TARGETS:
        items = representative(name, items)
    # First those that ask for the width of accesses, of which an old report says nothing: a kernel
    # that is compiled for them is there for the others, and one that is not compiled is not.
    items.sort(key=lambda item: item.launch.access is None)
    old: dict[str, Row] = {}
    for row in report or []:
        if row["target"] == name and "key" in row:
            old[row["key"]] = {k: v for k, v in row.items() if k not in _OF_LAUNCH}
    known = {k: made for k, made in old.items() if "load" in made}
    with compiling(name, known) as kernels:
        for i, item in enumerate(items):
            row = {"target": name, **item.row()}
            if i < first or not fnmatch.fnmatch(row["launch"], f"*{only}*"):
                continue
            write({"start": i, **row})
            kernels.clear()
            asks = item.launch.access is not None
            if not asks:
                known.update({k: made for k, made in old.items() if k not in known})
            try:
                item.compile()
                if not kernels:
                    raise RuntimeError("launched no kernel")
                seen: dict[str, int] = {}
                for kernel, seconds in kernels:
                    named = kernel.report_key
                    if named not in known:
                        known[named] = {
                            **resources(kernel, name),
                            **(access.described(kernel) if asks else {}),
                            "seconds": round(seconds, 1),
                            "key": named,
                        }
                    if named in seen:
                        continue
                    made = known[named]
                    variant = sum(n == made["kernel"] for n in seen.values())
                    seen[named] = made["kernel"]
                    write({**row, **made, "variant": variant})
            except Exception as error:  # a failed compilation is a finding, and the next may pass
                write({**row, "error": shortened(f"{type(error).__name__}: {error}")})
    write({"done": True})
