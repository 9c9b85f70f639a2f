"""What a kernel matrix is: points, beta, score and precision, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
# Above this beta |x|^2 the cancellation in float32 exponents passes ~1e-5: compute them in float64.
SPLIT_ABOVE = 128.0

Score = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrix exp(-beta score(x_i, y_j)), (N, M), and how exactly it is wanted.

    Args:
        x, y: (N, d), (M, d) of one dtype; y None means y = x, and the score is symmetric unless it
            is callable.
        beta: inverse temperature, > 0.
        score: "sqeuclidean", "dot" (-x.y), "cosine" (1 - cos), "l1", or a callable of
            (t, 1, d), (1, u, d) -> (t, u).
        sigma: local scales (sigma_x (N,), sigma_y (M,)) that divide |x - y|^2.
        precision: "float32", "mixed" (float64 exponents, float32 exp and sums), "float64", "half"
            (fp16 operands, float32 sums; Triton alone) or "auto".
        about: (d,) float64, what is subtracted from all points; None: the mean of y.
        ordered: whether consecutive points are near each other already.
    """

    x: Tensor
    others: Tensor | None
    beta: float
    score: Score = "sqeuclidean"
    sigma: tuple[Tensor, Tensor] | None = None
    precision: str = "auto"
    about: Tensor | None = None
    ordered: bool = False

    @property
    def y(self) -> Tensor:
        return self.x if self.others is None else self.others

    @property
    def same(self) -> bool:
        return self.others is None

    @property
    def symmetric(self) -> bool:
        return self.same and not callable(self.score)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def euclidean(self) -> bool:
        return self.score == "sqeuclidean"

    @property
    def half(self) -> bool:
        return self.precision == "half"

    @property
    def bilinear(self) -> bool:
        """Whether exponents are inner products of augmented rows."""
        return not callable(self.score) and self.score != "l1"

    @cached_property
    def units(self) -> tuple[Tensor, Tensor] | None:
        """1 - cos = |u - v|^2 / 2 of unit vectors; None where one is zero: its cosine is 0."""
        if self.score != "cosine":
            return None
        found: list[Tensor] = []
        for points in (self.x,) if self.same else (self.x, self.y):
            points = points.double()
            size = points.abs().amax(1, keepdim=True) if points.shape[1] else points.new_zeros(1, 1)
            if not bool((size > 0).all()):
                return None
            # first by the largest entry: squares of small and large ones do not exist
            points = points / size
            found.append(points / points.norm(dim=1, keepdim=True))
        return found[0], found[-1]

    @property
    def metric(self) -> bool:
        """Whether the exponent is -rate |x - y|^2 / (sigma_x sigma_y) of `points`."""
        return self.euclidean or self.units is not None

    @property
    def points(self) -> tuple[Tensor, Tensor]:
        return (self.x, self.y) if self.units is None else self.units

    @property
    def rate(self) -> float:
        return self.beta if self.units is None else 0.5 * self.beta

    @cached_property
    def centre(self) -> Tensor:
        """What is subtracted from all points: (d,) float64."""
        if not self.metric or 0 in self.shape:
            return self.x.new_zeros(self.x.shape[1], dtype=torch.float64)
        if self.about is not None:
            return self.about
        return self.points[1].double().mean(0)

    @cached_property
    def spread(self) -> float:
        """The largest term that cancels in an exponent: beta |x|^2 / sigma^2 after centring."""
        if 0 in self.shape:
            return 0.0
        if self.score == "cosine":
            return self.beta
        largest = 0.0
        for i, points in enumerate(self.points[:1] if self.same else self.points):
            sq = ((points.double() - self.centre) ** 2).sum(1)
            if self.sigma is not None:
                sq = sq / self.sigma[i].double() ** 2
            largest = max(largest, float(sq.max()))
        return self.beta * largest

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of exp and sums, dtype of the exponents)."""
        precision = self.precision
        if precision == "auto":
            narrow = self.x.dtype == torch.float64 or not self.bilinear
            precision = self.precision_of(0.0 if narrow else self.spread)
        return {
            "float32": (torch.float32, torch.float32),
            "mixed": (torch.float32, torch.float64),
            "float64": (torch.float64, torch.float64),
            "half": (torch.float32, torch.float16),
        }[precision]

    def precision_of(self, spread: float) -> str:
        """What "auto" stands for."""
        if self.x.dtype == torch.float64:
            return "float64"
        return "mixed" if spread > SPLIT_ABOVE else "float32"

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def gram_dtype(self) -> torch.dtype:
        return self.dtypes[1]

    @property
    def negligible(self) -> float:
        """Entries that are all smaller may be left out of a square kernel.

        Its row sums are at least 1, so a row of such entries changes the operator by less than a
        quarter of float32's rounding, and by nothing that float64 sums could tell.
        """
        if self.dtype == torch.float64:
            return 1e-18
        return 2.0**-26 / max(1, self.shape[1])

    def transposed(self) -> Problem:
        """The matrix between y and x."""
        score = self.score
        if callable(score):
            original = score

            def score(a: Tensor, b: Tensor) -> Tensor:
                return original(b.transpose(0, 1), a.transpose(0, 1)).t()

        return replace(
            self,
            x=self.y,
            others=None if self.symmetric else self.x,
            score=score,
            sigma=None if self.sigma is None else (self.sigma[1], self.sigma[0]),
        )
