"""Diffusion maps of millions of points: a tiled kernel matvec and a block eigensolver."""

from ._version import __version__
from .bridge import schroedinger_bridge
from .cdc import carre_du_champ, metric_tensor
from .dmap import DiffusionMap
from .doob import committor, doob_transform
from .kernel import FlashDiffusion, explain
from .ness import probability_current, stationary_distribution
from .planning import plan
from .trajectory import slow_manifold
from .utils import bgh_bandwidth, knn_bandwidth, median_bandwidth, nystrom_extension

__all__ = [
    "DiffusionMap",
    "FlashDiffusion",
    "__version__",
    "bgh_bandwidth",
    "carre_du_champ",
    "committor",
    "doob_transform",
    "explain",
    "knn_bandwidth",
    "median_bandwidth",
    "metric_tensor",
    "nystrom_extension",
    "plan",
    "probability_current",
    "schroedinger_bridge",
    "slow_manifold",
    "stationary_distribution",
]
