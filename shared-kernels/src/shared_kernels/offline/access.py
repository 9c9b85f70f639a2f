"""How many bytes each thread of a compiled kernel loads and stores at once."""

from __future__ import annotations

import re
from typing import Any

from .targets import Row

# ld.global.nc.L1::evict_last.v4.b32: four times 32 bits; cp.async.cg.shared.global [a], [b], 0x10
_PTX = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[[^]]*\]\s*,\s*\[[^]]*\]\s*,\s*(\w+)")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z]+\d*(?:x\d)?)")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def accesses(code: str, is_ptx: bool) -> dict[str, list[int]]:
    """The bytes of each instruction on global memory: ``{"load": [16, 4], "store": [16]}``."""
    found: dict[str, list[int]] = {"load": [], "store": []}
    if is_ptx:
        for name, count, bits in _PTX.findall(code):
            size = int(count or 1) * int(bits) // 8
            found["load" if name == "ld" else "store"].append(size)
        found["load"] += [int(size, 0) for size in _COPY.findall(code)]
        return found
    for name, kind in _AMD.findall(code):
        # ushort, short, sshort: two bytes; ubyte, sbyte, byte: one
        found[name].append(_AMD_BYTES.get(kind) or (1 if "byte" in kind else 2))
    return found


def described(kernel: Any) -> Row:
    """The narrowest and the widest access of a compiled kernel: ``{"load": [4, 16], ...}``.

    An empty list where the kernel loads or stores nothing.
    """
    is_ptx = "ptx" in kernel.asm
    found = accesses(kernel.asm["ptx" if is_ptx else "amdgcn"], is_ptx)
    return {name: [min(sizes), max(sizes)] if sizes else [] for name, sizes in found.items()}
