"""Products with a kernel matrix by the native CPU library; see `_operator.Kernel`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shared_kernels import native
from shared_kernels.distributed import Ranks
from shared_kernels.native.pairs import Pairs

from ._problem import LOG2_E, Problem
from ._tiles import Tiles
from ._workers import n_workers

# Points that are near each other: the library leaves out squares of as many rows and columns.
_TILE = 16
# Above this beta |x|^2 differences of float32 coordinates are taken before anything rounds them.
_EXACT_ABOVE = 16.0
_SCORES = {"dot": "products", "l1": "sums"}


class NativeProducts:
    """K V by compiled loops over pairs of tiles; ranks take tasks in turn."""

    name = "native"

    def __init__(
        self, problem: Problem, tile: int | None, skip_below: float | None, ranks: Ranks | None
    ) -> None:
        # a tile of the caller's is for torch; the library has squares of its own
        self.tiles = Tiles(problem, _TILE, skip_below)
        self.part = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.problem, self.ranks = problem, ranks
        self._pairs: Pairs | None = None

    @staticmethod
    def why_not(problem: Problem) -> str | None:
        """Why this backend cannot run the problem, or None."""
        if problem.x.device.type != "cpu":
            return f"the native library runs on CPU tensors, got one on {problem.x.device}"
        reason = native.why_not()
        if reason is not None:
            return reason
        if callable(problem.score):
            return "the native library has no score of the caller's own"
        if problem.half:
            return "half precision is for tensor cores; on a CPU float32 is faster and more exact"
        if problem.score == "cosine" and problem.units is None:
            return "the native library divides by |x|, and a vector is zero"
        return None

    @staticmethod
    def softmax_why_not(problem: Problem) -> str | None:
        return "the native library multiplies by exp(-beta score) unshifted"

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (M, r) -> (N, r) in the problem's dtype; entries below its normal range are 0."""
        if self._pairs is None:
            self._pairs = self._prepared()
        out = self._pairs.times(self.tiles.ordered(V), n_workers(V.device), self.part)
        if self.ranks is not None:
            out = self.ranks.total(out)
        # columns lie side by side in memory, as they come from the library, where those of V do
        out = self.tiles.unordered(out.T.to(self.problem.dtype).T)
        return out if V.T.is_contiguous() else out.contiguous()

    def _prepared(self) -> Pairs:
        problem, tiles = self.problem, self.tiles
        options: dict[str, Any] = {"dtype": problem.dtype}
        x, y = tiles.ordered_points
        rate, score = problem.rate * LOG2_E, _SCORES.get(str(problem.score), "squares")
        if score == "squares" and _rounds(problem):
            # with coordinates in units of the width, the exponents need no factor
            unit, rate = rate**-0.5, 1.0
            options["low"] = problem.gram_dtype != problem.dtype
            x, y = x - problem.centre, y - problem.centre
        else:
            # Differences of the given numbers are as exact as those: a power of two, which brings
            # them into any dtype's range, rounds nothing.
            power = 1 if score == "sums" else 2
            unit = 2.0 ** -round(math.log2(rate) / power)
            rate *= unit**power
        if tiles.ordered_scales is not None:
            # sigma comes in units of a typical one, and the points then do too
            options["scales"] = tiles.ordered_scales
            unit *= tiles.unit
        if problem.euclidean:
            options["skip_below"] = tiles.skip_below
        others = None if problem.same else y / unit
        return Pairs(x / unit, others, rate=rate, score=score, **options)


def _rounds(problem: Problem) -> bool:
    """Whether coordinates are rounded to float32 anyway, or lose nothing that matters by it."""
    if problem.dtype == torch.float64:
        return False
    return problem.points[0].dtype == torch.float64 or problem.spread <= _EXACT_ABOVE
