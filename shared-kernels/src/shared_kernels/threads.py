"""The number of torch's threads, where several Python threads want it at one at the same time.

``torch.set_num_threads`` acts on the calling Python thread and on what new threads start from. A
section that remembers the count, sets one and puts back what it remembered leaves the process on
one thread as soon as two sections overlap: the second remembers the one of the first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_before = 1
_own = threading.local()


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Run torch on one thread in here; the last section that ends puts the count back.

    Sections may overlap in several Python threads and may be nested. The first one remembers how
    many threads torch had, and each gives its own Python thread that number back at its end.

    Yields:
        the number of threads that torch had before, and has again afterwards.

    Example:
        >>> with one_torch_thread() as before:
        ...     torch.get_num_threads()
        1
    """
    global _users, _before
    if getattr(_own, "is_inside", False):
        yield _before
        return
    with _lock:
        now = torch.get_num_threads()  # a new thread that does not ask takes the others' later on
        if _users == 0:
            _before = now
        _users += 1
        before = _before
        torch.set_num_threads(1)
    _own.is_inside = True
    try:
        yield before
    finally:
        _own.is_inside = False
        with _lock:
            _users -= 1
            torch.set_num_threads(before)
