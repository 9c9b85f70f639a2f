"""Window + landmark attention whose windows learn, a language model on it and its trainer: O((w+K)N)."""

from ._version import __version__

__all__ = ["__version__"]
