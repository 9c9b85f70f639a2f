"""Tests on each instruction set of the native library that this processor has.

A module of tests says ``instructions = each_instruction_set()``, and ``pytestmark = ON_EACH_SET``
or ``pytest.mark.usefixtures("instructions")`` at single tests. `needs_library()` is the mark of
those that run on the widest set alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from .. import native

__all__ = ["ON_EACH_SET", "each_instruction_set", "needs_library"]

ON_EACH_SET = pytest.mark.usefixtures("instructions")


def needs_library() -> pytest.MarkDecorator:
    reason = native.why_not()
    return pytest.mark.skipif(reason is not None, reason=f"no native library: {reason}")


def each_instruction_set() -> Any:
    """A fixture that runs a test once on each set; without a library the test is skipped."""

    @pytest.fixture(name="instructions", params=native.instruction_sets() or [None])
    def on_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        reason = native.why_not()
        if reason is not None:
            pytest.skip(f"no native library: {reason}")
        monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", request.param)
        assert native.instruction_set() == request.param

    return on_one
