"""The native CPU library: `library` loads and calls it; each other module has one computation."""

from .library import instruction_set, instruction_sets, why_not

__all__ = ["instruction_set", "instruction_sets", "why_not"]
