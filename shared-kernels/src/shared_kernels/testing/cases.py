"""Named cases: every leg (CPU, interpreter, GPU) runs the same list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from .. import native


class Case:
    """``Case("gqa-causal", B=2, H=4, causal=True)``: a name, and values read as attributes."""

    def __init__(self, name: str, **values: Any) -> None:
        self.name = name
        self.values = values

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["values"][key]
        except KeyError:
            raise AttributeError(f"case {self.__dict__.get('name')!r} has no {key!r}") from None

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def replaced(self, name: str, **values: Any) -> Case:
        return Case(name, **{**self.values, **values})

    def __repr__(self) -> str:
        return f"Case({self.name!r})"


def parametrize(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Decorator for a test that takes ``case``."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases])


def cpu_backends() -> list[Any]:
    """The fast backends of CPU tensors, for ``pytest.mark.parametrize("backend", ...)``.

    "native" is skipped where the library cannot run, with the reason.
    """
    reason = native.why_not()
    mark = pytest.mark.skipif(reason is not None, reason=str(reason))
    return [pytest.param("native", marks=mark), "torch"]
