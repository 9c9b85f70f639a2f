"""Named cases: every leg (CPU, interpreter, GPU) runs the same list."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
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


def parametrize(cases: Iterable[Case], plain: Container[str] | None = None) -> pytest.MarkDecorator:
    """Decorator for a test that takes ``case``.

    Where ``plain`` names some of the cases, the others carry the mark ``thorough``.
    """
    parameters = []
    for case in cases:
        marks = () if plain is None or case.name in plain else pytest.mark.thorough
        parameters.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", parameters)


def pairwise(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Decorator for a test of several parameters: every two values meet in one of few cases.

    The rest of the product of all values carries the mark ``thorough``. A value may be a
    ``pytest.param`` with marks of its own.
    """
    kind = type(pytest.param())
    values = [
        [v if isinstance(v, kind) else pytest.param(v) for v in axis] for axis in axes.values()
    ]
    product = list(itertools.product(*(range(len(axis)) for axis in values)))

    def pairs(case: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, product))
    few = set()
    for most in range(len(axes) * (len(axes) - 1) // 2, 0, -1):  # cases of many new pairs first
        for case in product:
            if len(pairs(case) & missing) >= most:
                few.add(case)
                missing -= pairs(case)
    parameters = []
    for case in product:
        chosen = [axis[i] for axis, i in zip(values, case, strict=True)]
        marks = [mark for value in chosen for mark in value.marks]
        marks += [] if case in few else [pytest.mark.thorough]
        given: list[Any] = [value.values[0] for value in chosen]
        names = [
            str(v.id or getattr(x, "name", None) or x) for v, x in zip(chosen, given, strict=True)
        ]
        parameters.append(pytest.param(*given, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)


def others_thorough(values: Iterable[Any], plain: int = 1) -> list[Any]:
    """A parameter's values: the first `plain` as they are, the others marked ``thorough``."""
    listed = list(values)
    return listed[:plain] + [pytest.param(v, marks=pytest.mark.thorough) for v in listed[plain:]]


def cpu_backends() -> list[Any]:
    """The fast backends of CPU tensors, for ``pytest.mark.parametrize("backend", ...)``.

    "native" is skipped where the library cannot run, with the reason.
    """
    reason = native.why_not()
    mark = pytest.mark.skipif(reason is not None, reason=str(reason))
    return [pytest.param("native", marks=mark), "torch"]
