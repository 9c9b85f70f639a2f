"""The GPUs that are compiled for."""

from typing import Any

# (Triton backend, its arch, threads per warp, processors of a typical card)
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 108),
    "sm_90": ("cuda", 90, 32, 132),
    "sm_120": ("cuda", 120, 32, 188),
    "gfx942": ("hip", "gfx942", 64, 304),
}

# One compiled kernel of a report: target, launch, size, config, kernel, variant, what it uses.
Row = dict[str, Any]


def shortened(text: str, limit: int = 1500) -> str:
    """The end of a long message, where compilers say what is wrong."""
    return text if len(text) <= limit else "... " + text[-limit:]
