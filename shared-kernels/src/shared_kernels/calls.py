"""A call, the named tuple of an op's arguments, with other values or as another type."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["recast", "replaced"]

Call = TypeVar("Call", bound=tuple)  # type: ignore[type-arg]
New = TypeVar("New", bound=tuple)  # type: ignore[type-arg]


def replaced(call: Call, **changes: Any) -> Call:
    """Give the named tuple with other values in some of its fields.

    What ``call._replace(**changes)`` gives, in words that every promised version of PyTorch can
    trace: torch 2.7 does not look into the module ``collections``, where ``_replace`` is made.

    Args:
        call: a named tuple; it stays as it is.
        changes: new values by the names of fields.

    Returns:
        A named tuple of the same type.

    Raises:
        ValueError: a name is not a field of ``call``.

    Example:
        >>> from typing import NamedTuple
        >>> class Point(NamedTuple):
        ...     x: int
        ...     y: int
        >>> replaced(Point(1, 2), y=3)
        Point(x=1, y=3)
    """
    kind: Any = type(call)
    new: Call = kind(*map(changes.pop, kind._fields, call))
    if changes:
        raise ValueError(f"{kind.__name__} has no field named {', '.join(changes)}")
    return new


def recast(call: tuple[Any, ...], kind: type[New], **more: Any) -> New:
    """Give a named tuple of another type, with the values of the fields that both types have.

    Args:
        call: a named tuple; it stays as it is.
        kind: the other type of named tuple.
        more: values by the names of its fields; they come before those of ``call``.

    Returns:
        A named tuple of type ``kind``. Fields that are given nowhere take their defaults.

    Raises:
        TypeError: a field without a default is given nowhere, or a name is not a field of ``kind``.

    Example:
        >>> from typing import NamedTuple
        >>> class Point(NamedTuple):
        ...     x: int
        ...     y: int
        >>> class Circle(NamedTuple):
        ...     x: int
        ...     y: int
        ...     radius: float
        >>> recast(Point(1, 2), Circle, radius=3.0)
        Circle(x=1, y=2, radius=3.0)
    """
    fields: Any = type(call)
    shared = [x for x in getattr(kind, "_fields", ()) if x in fields._fields]
    return kind(**{**{x: getattr(call, x) for x in shared}, **more})
