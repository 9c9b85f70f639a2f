"""The native CPU library: `library` is its door; `rows` and `attention` compute."""

from .library import (
    instruction_set,
    instruction_sets,
    why_not,
)

__all__ = ["instruction_set", "instruction_sets", "why_not"]
