"""A drop-in for torch.softmax with exact zeros; sparsity is one learnable number, 0 < alpha < 1."""

from ._version import __version__

__all__ = ["__version__"]
