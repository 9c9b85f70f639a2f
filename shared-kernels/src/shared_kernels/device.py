"""What the machine offers. Cached functions; nothing is probed at import.

Launchers ask :func:`target` which GPU they compile for, and :func:`triton_why_not` whether Triton
can take some tensors: never ``tensor.is_cuda``, so the same launcher runs on a GPU, in Triton's
interpreter, and under offline compilation for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Bytes of shared memory one program may use.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
    "gfx1201": 64 * 1024,
}


@dataclass(frozen=True)
class Target:
    """A place where kernels run: ``backend`` is "cuda", "hip", "interpret" or "cpu"."""

    backend: str
    arch: str
    shared_memory: int
    processors: int

    @property
    def is_gpu(self) -> bool:
        return self.backend in ("cuda", "hip")


_INTERPRET = Target("interpret", "interpret", 1 << 30, 1)
_pretended: list[Target] = []


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET`` is on, in any of Triton's words: kernels run in Python."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        backend, arch = "hip", properties.gcnArchName.split(":")[0]
    else:
        backend, arch = "cuda", f"sm_{properties.major}{properties.minor}"
    memory = getattr(
        properties, "shared_memory_per_block_optin", SHARED_MEMORY.get(arch, 64 * 1024)
    )
    return Target(backend, arch, memory, properties.multi_processor_count)


@functools.cache
def _cpu() -> Target:
    return Target("cpu", "cpu", 0, os.cpu_count() or 1)


def target(where: torch.Tensor | torch.device | str | None = None) -> Target:
    """Where kernels for ``where`` (a tensor, a device, or None: the default device) would run."""
    if _pretended:
        return _pretended[-1]
    if interpreting() and has_triton():
        return _INTERPRET
    device = where.device if isinstance(where, torch.Tensor) else where
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return _cpu()
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def is_gpu(where: torch.Tensor | None) -> bool:
    """``target(where).is_gpu``, without a look at the environment for a tensor on the CPU."""
    if where is not None and where.is_cpu and not _pretended:
        return False
    return target(where).is_gpu


@contextlib.contextmanager
def pretend(pretended: Target) -> Iterator[Target]:
    """Inside this context CPU tensors count as ``pretended``'s: for offline compilation."""
    _pretended.append(pretended)
    try:
        yield pretended
    finally:
        _pretended.pop()


# AMD's cards for which launches were compiled (offline/targets.py). The tiles fit them: they have
# 512 registers for each of 64 threads, and matrix instructions for bf16.
_AMD = ("gfx90a", "gfx942", "gfx950")
# AMD's cards with 32 threads in a wave (RDNA). The tiles of all tables are made for cards with as
# many registers per thread as NVIDIA's or twice that; compiled for gfx1100 they spill hundreds.
_WAVE32 = ("gfx10", "gfx11", "gfx12")


@functools.cache
def _arch_why_not(backend: str, arch: str) -> str | None:
    """Why no kernel is launched on cards of this kind, or None."""
    if backend == "hip" and arch.startswith(_WAVE32):
        reason = "a card of 32 threads in a wave: compiled for it they spill registers"
    elif backend == "hip" and arch not in _AMD:
        reason = f"for which nothing was compiled; AMD's cards that were: {', '.join(_AMD)}"
    elif backend == "cuda" and int(arch.partition("_")[2]) < 80:
        reason = "which has less shared memory than they need; NVIDIA's cards from sm_80 on have it"
    else:
        return None
    return f'the kernels\' tiles do not fit {arch}, {reason}; backend="torch" runs there'


def _card_why_not(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Why no kernel is launched on the card of these tensors, or None."""
    # tensors may say "cuda" where there is no card: torch.compile's fake ones
    if not tensors or not (_pretended or torch.cuda.is_initialized()):
        return None
    place = target(tensors[0])
    return _arch_why_not(place.backend, place.arch) if place.is_gpu else None


def triton_why_not(*tensors: torch.Tensor) -> str | None:
    """Why Triton cannot run on these tensors, or None if it can."""
    if not has_triton():
        return "triton is not installed (there are wheels for Linux on x86_64 and aarch64 only)"
    if _pretended or interpreting():
        elsewhere = [t for t in tensors if t.device.type not in ("cpu", "cuda", "meta")]
    else:
        elsewhere = [t for t in tensors if t.device.type not in ("cuda", "meta")]
    if elsewhere:
        device = elsewhere[0].device
        hint = "; TRITON_INTERPRET=1 runs kernels on CPU tensors" if device.type == "cpu" else ""
        return f"the tensors are on {device}, Triton needs a GPU{hint}"
    return _card_why_not(tensors)
