"""What is done to a call, the named tuple of an op's arguments, wherever it comes from."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["replaced"]

Call = TypeVar("Call", bound=tuple)  # type: ignore[type-arg]


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
