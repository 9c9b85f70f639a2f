"""Products with a kernel matrix on tensor cores; see `_operator.Kernel`."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels import device
from shared_kernels.distributed import Ranks

from .._group import Shard
from .._problem import Problem

# Above this beta |x|^2 exponents of fp16 operands are off by more than a third: too rough a start.
HALF_UP_TO = 128.0
# Above this beta |x|^2 so are exponents of pairs of fp16 numbers, and norms leave fp16's range.
PAIR_UP_TO = 3e4


class TritonProducts:
    """K V for |x - y|^2 in float32, or roughly in half precision. Ranks take rows in turn."""

    name = "triton"

    def __init__(
        self, problem: Problem, tile: int | None, skip_below: float | None, ranks: Ranks | None
    ) -> None:
        # a kernel has tiles of its own, and skips nothing
        self.problem, self.ranks = problem, ranks
        self.rows = slice(None)
        # x_i is y_(i + first), if x is a part of y
        self.first: int | None = 0 if problem.same else None
        if ranks is not None:
            own = Shard(ranks, problem.shape[0])
            self.rows = slice(own.start, own.stop)
            self.first = own.start if problem.same else None
        # fp16 rows of the points, made by the first product
        self.prepared: tuple[Tensor, ...] | None = None

    @staticmethod
    def why_not(problem: Problem) -> str | None:
        """Why this backend cannot run the problem, or None."""
        reason = device.triton_why_not(problem.x)
        if reason is not None:
            return reason
        if not problem.euclidean or problem.sigma is not None:
            return "the kernel is written for the score |x - y|^2"
        if torch.float64 in problem.dtypes:
            return "its sums are float32; this product asks for float64"
        if problem.x.shape[1] > 252:
            return f"it takes at most 252 dimensions, got {problem.x.shape[1]}"
        limit, kind = (HALF_UP_TO, "half precision") if problem.half else (PAIR_UP_TO, "fp16 pairs")
        if problem.spread > limit:
            verb = "does" if problem.half else "do"
            return (
                f"beta |x|^2 is up to {problem.spread:.3g}, and above {limit:g} {kind} "
                f"{verb} not tell near points from far ones"
            )
        return None

    @staticmethod
    def softmax_why_not(problem: Problem) -> str | None:
        return "the kernel multiplies by exp(-beta |x - y|^2) unshifted"

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (M, r) -> (N, r) float32; of a half-precision problem, roughly."""
        from . import forward

        problem = self.problem
        if self.prepared is None:
            self.prepared = forward.features(problem, problem.x[self.rows])
        part = forward.launch_matvec_forward(
            self.prepared, V, len(problem.x[self.rows]), self.first, is_half=problem.half
        )
        if self.ranks is None:
            return part
        out = part.new_zeros(problem.shape[0], V.shape[1])
        out[self.rows] = part
        return self.ranks.total(out)
