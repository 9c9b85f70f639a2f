"""Diffusion maps of millions of points: a tiled kernel matvec and a block eigensolver, never the N x N matrix."""

from ._version import __version__

__all__ = ["__version__"]
