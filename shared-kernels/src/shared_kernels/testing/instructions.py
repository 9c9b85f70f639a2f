"""Tests on each instruction set of the native library that this processor has.

A module of tests imports both names and says ``pytestmark = EVERY_INSTRUCTION_SET``.
"""

from __future__ import annotations

import pytest

from .. import native

__all__ = ["EVERY_INSTRUCTION_SET", "NEEDS_LIBRARY", "instructions"]

NEEDS_LIBRARY = pytest.mark.skipif(
    native.why_not() is not None, reason=f"no native library: {native.why_not()}"
)
EVERY_INSTRUCTION_SET = [NEEDS_LIBRARY, pytest.mark.usefixtures("instructions")]


@pytest.fixture(params=native.instruction_sets())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once on each instruction set; its name."""
    monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", request.param)
    assert native.instruction_set() == request.param
    return str(request.param)
