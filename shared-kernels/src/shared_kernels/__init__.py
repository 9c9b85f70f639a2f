"""What the packages share: dispatch, ops, the threshold solver, tiled distances, test contracts."""

from ._version import __version__

__all__ = ["__version__"]
