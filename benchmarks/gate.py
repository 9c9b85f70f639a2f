"""No wrong op is timed: a row passes here first, or it is not measured."""

from __future__ import annotations

from shared_kernels.testing import assert_close

from .registry import Row, tensors


class WrongAnswerError(AssertionError):
    """The op does not compute what it should; its speed means nothing."""


def check(row: Row) -> None:
    ours, exact = tensors((row.checked or row.ours)()), tensors(row.exact())
    if len(ours) != len(exact):
        raise WrongAnswerError(f"{row.case} {row.size}: {len(ours)} results, expected {len(exact)}")
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        try:
            assert_close(a, b, "forward" if i == 0 else "gradient")
        except AssertionError as error:
            raise WrongAnswerError(f"{row.case} {row.size}, result {i}: {error}") from None
