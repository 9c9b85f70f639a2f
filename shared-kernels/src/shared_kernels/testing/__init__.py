"""How the packages test themselves: cases, tolerances, three references, poison and contracts.

Comes with the distribution ``shared-kernels-dev`` (and with a checkout); needs pytest, hypothesis.
"""

from . import contracts, readme
from .cases import Case, cpu_backends, others_thorough, pairwise, parametrize
from .compare import compare
from .memory import Memory, measure_memory
from .poison import guarded, poisoned_empty
from .tolerances import assert_close, assert_no_worse, tolerance

__all__ = [
    "Case",
    "Memory",
    "assert_close",
    "assert_no_worse",
    "compare",
    "contracts",
    "cpu_backends",
    "guarded",
    "measure_memory",
    "others_thorough",
    "pairwise",
    "parametrize",
    "poisoned_empty",
    "readme",
    "tolerance",
]
