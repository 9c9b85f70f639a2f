"""Diffusion maps of millions of points: a tiled kernel matvec and a block eigensolver."""

from importlib import import_module
from typing import TYPE_CHECKING

from shared_kernels.installed import warn_of_another_project

from ._version import __version__
from .bridge import schroedinger_bridge
from .kernel import FlashDiffusion, explain
from .ness import probability_current, stationary_distribution
from .utils import bgh_bandwidth, knn_bandwidth, median_bandwidth, nystrom_extension

if TYPE_CHECKING:
    from .cdc import carre_du_champ, metric_tensor
    from .dmap import DiffusionMap
    from .doob import committor, doob_transform
    from .planning import plan
    from .trajectory import slow_manifold

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

warn_of_another_project(__name__)


# a type checker reads the imports above: with this in sight it would believe any name
if not TYPE_CHECKING:

    def __getattr__(name):
        # on first use: the estimator is made of scikit-learn, which takes longer to load than torch
        homes = {
            "DiffusionMap": "dmap",
            "carre_du_champ": "cdc",
            "committor": "doob",
            "doob_transform": "doob",
            "metric_tensor": "cdc",
            "plan": "planning",
            "slow_manifold": "trajectory",
        }
        if name in homes:
            globals()[name] = getattr(import_module(f"{__name__}.{homes[name]}"), name)
            return globals()[name]
        if name in ("cdc", "dmap", "doob", "eigensolver", "planning", "trajectory"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
