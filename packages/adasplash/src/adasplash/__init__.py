"""Flash attention with alpha-entmax weights, and lazy (elastic-softmax) attention, in O(N) memory."""

from ._version import __version__

__all__ = ["__version__"]
