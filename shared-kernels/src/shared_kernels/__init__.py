"""What the sparse-weights packages share: dispatch, op registration, the threshold solver, tiled distances and test contracts."""

from ._version import __version__

__all__ = ["__version__"]
