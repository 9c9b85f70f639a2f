"""diffmax: a drop-in for torch.softmax with exact zeros, sparsity 0 < alpha < 1."""

import importlib.util
import sys
from typing import TYPE_CHECKING

from shared_kernels.installed import warn_of_another_project

from ._version import __version__
from .api import diffmax_bisect, diffmax_loss, explain, sparsity_stats
from .decoding import Calibration, diffmax_calibrate, diffmax_sample, support_topk
from .losses import budget_loss, diffmax_linear_loss, entmax_loss, normmax_loss
from .modules import (
    DiffmaxBisectModule,
    DiffmaxLinearLoss,
    DiffmaxRouter,
    ExpMap,
    HillMap,
    Routing,
    TanhMap,
)
from .normalizers import budget_sparsemax, normmax

__all__ = [
    "Calibration",
    "DiffmaxBisectModule",
    "DiffmaxLinearLoss",
    "DiffmaxRouter",
    "ExpMap",
    "HillMap",
    "Routing",
    "TanhMap",
    "__version__",
    "budget_loss",
    "budget_sparsemax",
    "diffmax_bisect",
    "diffmax_calibrate",
    "diffmax_linear_loss",
    "diffmax_loss",
    "diffmax_sample",
    "entmax_loss",
    "explain",
    "normmax",
    "normmax_loss",
    "sparsity_stats",
    "support_topk",
]

warn_of_another_project(__name__)


if TYPE_CHECKING:
    from ._monitor import diffmax_bisect_monitored as diffmax_bisect_monitored
else:

    def __getattr__(name):
        if name != "diffmax_bisect_monitored":
            raise AttributeError(f"module 'diffmax' has no attribute {name!r}")
        loaded = "swanlab" in sys.modules
        found = sys.modules["swanlab"] if loaded else importlib.util.find_spec("swanlab")
        if found is None:
            raise ImportError(
                "diffmax_bisect_monitored logs to swanlab, which is not installed; "
                'pip install "diffmax[monitoring]"'
            )
        from ._monitor import diffmax_bisect_monitored

        return diffmax_bisect_monitored

    def __dir__():
        return sorted([*globals(), "diffmax_bisect_monitored"])
