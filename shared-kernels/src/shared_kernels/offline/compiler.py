"""The worker: a stand-in for Triton's driver, and what a compiled kernel turns out to use."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from .. import device
from . import model
from .plan import load, plan
from .targets import TARGETS, Row, shortened


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

    def __init__(self, hash: str) -> None:
        self.hash = hash

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        return None


@functools.cache
def _description() -> str:
    """A digest of the code that describes a compiled kernel: what it wrote before may be old."""
    files = [Path(__file__), Path(model.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key(hash: str) -> str:
    """What a report keeps of a kernel's hash in Triton's cache and of how it was described.

    The hash covers the kernel's source and that of what it calls, its arguments' types and
    constants, its options, the target, and Triton with its assembler.
    """
    return hashlib.sha256((hash + _description()).encode()).hexdigest()[:16]


@contextlib.contextmanager
def compiling(name: str, known: Container[str] = ()) -> Iterator[list[tuple[Any, float]]]:
    """Triton compiles CPU tensors' launches for target `name`; yields [(kernel, seconds), ...].

    A kernel whose `key` is among the `known` is not compiled.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, get_cache_invalidating_env_vars, get_cache_key

    class ZeroedEmpty(TorchDispatchMode):
        """torch.empty gives zeros: no launcher meets garbage it takes for an index."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.__name__ and isinstance(out, torch.Tensor):
                out.zero_()
            return out

    backend, arch, warp, processors = TARGETS[name]
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
        cache, _, _, compiler, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constexprs, attrs)
        text = get_cache_key(source, compiler, options, get_cache_invalidating_env_vars())
        hash = hashlib.sha256(text.encode()).hexdigest()
        if key(hash) in known:
            cache[cache_key] = _Known(hash)
            return cache[cache_key]
        return do_compile(self, cache_key, signature, device, constexprs, options, attrs, warmup)

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, **kwargs)
        kernels.append((kernel, time.perf_counter() - start))
        return kernel

    index = 1000 + list(TARGETS).index(name)
    # For the rest of the process: there is no driver to go back to.
    driver.set_active(_Driver(GPUTarget(backend, arch, warp), index, processors))  # type: ignore[arg-type]
    JITFunction.run, JITFunction._do_compile = recording, compile_unless_known
    try:
        with device.pretend(target), ZeroedEmpty():
            yield kernels
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile


_DOT = re.compile(r"tt\.dot .*?(?:inputPrecision = (\w+))?\s*: tensor<[0-9x]+x(\w+)>")


def _wants_tensor_cores(ttir: str) -> bool:
    """Whether the kernel has a dot that tensor cores are made for (fp32 in ieee is not)."""
    return any(kind != "f32" or precision for precision, kind in _DOT.findall(ttir))


def _tool(name: str) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if not found:
        raise RuntimeError(f"{name} is neither in the triton package nor on the PATH")
    return found


def resources(kernel: Any, target: str) -> Row:
    """What a compiled kernel uses: registers, stack, spills, shared memory, matrix instructions.

    And what its inner loop is made of, with the unit that bounds it (`model`).
    """
    meta = kernel.metadata
    row: Row = {
        "kernel": meta.name,
        "num_warps": meta.num_warps,
        "num_stages": meta.num_stages,
        "shared": meta.shared,
        "matrix": _wants_tensor_cores(kernel.asm["ttir"]),
    }
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.check_output(
                [_tool("cuobjdump"), "-res-usage", file.name], text=True
            )
            code = subprocess.check_output([_tool("nvdisasm"), "-c", file.name], text=True)
        used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if used is None:
            raise RuntimeError(f"cuobjdump reports no registers: {usage!r}")
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code)
        row.update(registers=int(used[1]), stack=int(used[2]))
        row.update(spills=sum(op in ("LDL", "STL") for op in opcodes))
        row.update({name: opcodes.count(name) for name in ("HGMMA", "HMMA")})
        row.update(mfma=0, instructions=len(opcodes))
    else:
        code = kernel.asm["amdgcn"]

        def number(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", code)
            return int(found[1]) if found else 0

        # On gfx9 .vgpr_count already contains the accumulation registers.
        row.update(registers=number("vgpr_count"), stack=number("private_segment_fixed_size"))
        row.update(spills=number("vgpr_spill_count"), HGMMA=0, HMMA=0)
        opcodes = re.findall(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)\b", code, re.M)
        row.update(mfma=sum(op.startswith("v_mfma") for op in opcodes), instructions=len(opcodes))
    return {**row, **model.described(target, code, meta.num_warps)}


# What a row says of the launch; the rest describes its kernel.
_OF_LAUNCH = ("target", "launch", "size", "config", "hmma_allowed", "variant")


def work(
    name: str,
    files: list[str],
    only: str,
    first: int,
    write: Callable[[Row], None],
    report: list[Row] | None = None,
) -> None:
    """Compile the items from number `first` on; `write` gets a record before and after each.

    What the rows of a `report` describe is not compiled again.
    """
    items = [item for file in files for item in plan(*load(file), name)]
    known: dict[str, Row] = {}
    for old in report or []:
        if old["target"] == name and "key" in old:
            known[old["key"]] = {k: v for k, v in old.items() if k not in _OF_LAUNCH}
    with compiling(name, known) as kernels:
        for i, item in enumerate(items):
            row = {"target": name, **item.row()}
            if i < first or not fnmatch.fnmatch(row["launch"], f"*{only}*"):
                continue
            write({"start": i, **row})
            kernels.clear()
            try:
                item.compile()
                if not kernels:
                    raise RuntimeError("launched no kernel")
                seen: dict[str, int] = {}
                for kernel, seconds in kernels:
                    if key(kernel.hash) not in known:
                        known[key(kernel.hash)] = {
                            **resources(kernel, name),
                            "seconds": round(seconds, 1),
                            "key": key(kernel.hash),
                        }
                    if kernel.hash in seen:
                        continue
                    made = known[key(kernel.hash)]
                    variant = sum(n == made["kernel"] for n in seen.values())
                    seen[kernel.hash] = made["kernel"]
                    write({**row, **made, "variant": variant})
            except Exception as error:  # a failed compilation is a finding, and the next may pass
                write({**row, "error": shortened(f"{type(error).__name__}: {error}")})
    write({"done": True})
