"""What every test file of Triton kernels imports: where they run, and memory that is not zero."""

import pytest
import torch

from shared_kernels import device
from shared_kernels.testing import poisoned_empty

pytestmark = pytest.mark.skipif(
    not (device.interpreting() or torch.cuda.is_available()),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nothing_unwritten():
    with poisoned_empty():
        yield
