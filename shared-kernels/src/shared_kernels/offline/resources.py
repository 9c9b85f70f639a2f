"""What a compiled kernel turns out to use."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from . import model
from .targets import WITH_UTCHMMA, Row

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
        matrix = ("HGMMA", "HMMA", "UTCHMMA") if target in WITH_UTCHMMA else ("HGMMA", "HMMA")
        row.update({name: opcodes.count(name) for name in matrix})
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
    if target not in model.RATES:
        return row
    return {**row, **model.described(target, code, meta.num_warps)}
