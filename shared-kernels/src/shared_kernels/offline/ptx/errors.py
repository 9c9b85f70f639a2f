"""What stops a run of compiled code."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """An instruction form, a PTX version or a way to launch that is not modelled."""


class FaultError(RuntimeError):
    """The program did something that a GPU would not survive, or that the sanitizer forbids."""
