"""The GPUs that are compiled for."""

from typing import Any

# (Triton backend, its arch, threads per warp, processors of a typical card)
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 108),
    "sm_90": ("cuda", 90, 32, 132),
    "sm_120": ("cuda", 120, 32, 188),
    "gfx942": ("hip", "gfx942", 64, 304),
}
# Compiled for as well, one launch of each kernel: these cards take the tiles of a card above.
MORE: dict[str, tuple[str, int | str, int, int]] = {
    "sm_86": ("cuda", 86, 32, 84),
    "sm_89": ("cuda", 89, 32, 128),
    "sm_100": ("cuda", 100, 32, 148),
    "sm_103": ("cuda", 103, 32, 160),
    "gfx90a": ("hip", "gfx90a", 64, 104),
    "gfx950": ("hip", "gfx950", 64, 256),
}
# Where UTCHMMA is the matrix instruction of large tiles; smaller ones run HMMA.
WITH_UTCHMMA = ("sm_100", "sm_103")
ALL = {**TARGETS, **MORE}

# One compiled kernel of a report: target, launch, size, config, kernel, variant, what it uses.
Row = dict[str, Any]


def shortened(text: str, limit: int = 1500) -> str:
    """The end of a long message, where compilers say what is wrong."""
    return text if len(text) <= limit else "... " + text[-limit:]
