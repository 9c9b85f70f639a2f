"""Run the PTX that Triton compiled for a GPU that is not there, on CPU tensors, and watch it.

:func:`executing` stands behind Triton's wrappers; :class:`Sanitizer` finds races, wild accesses,
uninitialised reads and missing waits; :class:`Counters` counts instructions, bank conflicts and
sectors. ``python -m shared_kernels.offline.ptx run module:function`` is the same as a tool.
"""

from .counters import Counters
from .errors import FaultError, UnsupportedError
from .executor import Kernel
from .launcher import executing
from .sanitizer import Sanitizer
from .semantics import Approximations

__all__ = [
    "Approximations",
    "Counters",
    "FaultError",
    "Kernel",
    "Sanitizer",
    "UnsupportedError",
    "executing",
]
