"""The README is executable."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_kernels.testing import contracts


class TestPackage(contracts.PackageContract):
    package = "dsalt"
    root = Path(__file__).parents[1]

    def test_readme_blocks_run(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.chdir(tmp_path)  # what the blocks write stays there
        super().test_readme_blocks_run()
