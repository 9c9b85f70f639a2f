"""The README runs, lists the public names, and the package imports with nothing else there."""

from __future__ import annotations

from pathlib import Path

from shared_kernels.testing import contracts


class TestPackage(contracts.PackageContract):
    package = "adasplash"
    root = Path(__file__).parents[1]
