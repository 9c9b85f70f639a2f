"""The user's loaders: resumed exactly, and shared out over processes."""

from __future__ import annotations

from .stream import BatchStream
from .validation import check_validation, validation_batches

__all__ = ["BatchStream", "check_validation", "validation_batches"]
