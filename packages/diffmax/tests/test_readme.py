"""The README runs and lists what is public."""

from pathlib import Path

from shared_kernels.testing import contracts


class TestPackage(contracts.PackageContract):
    package = "diffmax"
    root = Path(__file__).parents[1]
