"""Modern Hopfield memories as layers, smoothed over a kNN graph (diffusion-augmented Hopfield networks)."""

from ._version import __version__

__all__ = ["__version__"]
