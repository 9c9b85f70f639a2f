"""A kernel matrix whose points are split over processes: each has rows, and panels of them travel.

A process multiplies its own rows of the matrix. The points and the values that these rows are
multiplied with go around all processes, a panel at a time, while the panel before them is used.
Memory is O(N / processes) rows and three panels; a pair of points on two processes is visited by
both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from shared_kernels import pairwise

from ._group import Own
from ._operator import Kernel
from ._problem import Problem
from ._tiles import spatial_order

# Points of a panel, and of the blocks of own rows that meet it.
PANEL = 2**14
# Points of the boxes that rows are ordered by: the sides of the native library's squares.
_LEAF = 16


class SplitPoints:
    """The points that this process was given, ordered in space, and those of others as they pass.

    Attributes:
        x: (n, d) own points in the order of the tiles.
        rows: which rows of all points they are.
        centre: (d,) float64, the mean of all points.
    """

    def __init__(self, x: Tensor, rows: Own) -> None:
        self.rows, self.order = rows, spatial_order(x, _LEAF)
        self.x = x[self.order]
        self.centre = rows.total(self.x.sum(0, dtype=torch.float64)) / rows.N

    def ordered(self, V: Tensor) -> Tensor:
        return V[self.order]

    def unordered(self, out: Tensor) -> Tensor:
        found = torch.empty_like(out)
        found[self.order] = out
        return found

    def visit(self, values: Sequence[Tensor], work: Callable[..., None]) -> None:
        """work(start, y, *values) for each panel of all points; start is None for another's.

        Args:
            values: (n, ...) each, in the order of x; they travel with the points.
            work: takes a panel; what it raises on one process is raised on all, at the end.
        """
        failed: Exception | None = None
        for start, panel in self._panels((self.x, *values)):
            if failed is None:
                try:
                    work(start, *panel)
                except Exception as error:
                    # the others still wait for the panels that pass through here
                    failed = error
        with self.rows.agreed():
            if failed is not None:
                raise failed

    def _panels(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int | None, list[Tensor]]]:
        ranks = self.rows.ranks
        for start in range(0, max(self.rows.lengths), PANEL):
            lengths = [max(0, min(PANEL, n - start)) for n in self.rows.lengths]
            own = [t[start : start + PANEL] for t in tensors]
            for rank, panel in ranks.ring(own, lengths):
                if lengths[rank]:
                    yield start if rank == ranks.rank else None, panel

    def local_scales(self, x: Tensor, k: int) -> Tensor:
        """Distances of points x (n, d) to the (k+1)-th nearest of all points: (n,) float64."""
        x = x.double()
        most = [float(t.abs().max()) if t.numel() else 0.0 for t in (x, self.x)]
        size = float(self.rows.each(x.new_tensor(max(most))).max())
        # a power of two is exact: squares of any unit are then within any format's range
        unit = 2.0 ** round(math.log2(size)) if size > 0.0 else 1.0
        nearest = x.new_full((len(x), min(k + 1, self.rows.N)), math.inf)

        def work(_: int | None, y: Tensor) -> None:
            nonlocal nearest
            if len(x):
                n = min(nearest.shape[1], len(y))
                found = pairwise.knn(x / unit, n, Y=y.double() / unit)[0]
                both = torch.cat((nearest, found), 1)
                nearest = both.topk(nearest.shape[1], dim=1, largest=False, sorted=True).values

        self.visit((), work)
        return nearest[:, -1].sqrt() * unit

    def distinct(self) -> Tensor:
        """The points of all processes without copies; meant for few."""
        own = torch.unique(self.x, dim=0) if self.x.shape[1] else self.x[:1]
        ranks = self.rows.ranks
        lengths = [int(n) for n in ranks.gather(torch.tensor([len(own)], device=own.device))]
        every = torch.cat([part.clone() for _, (part,) in ranks.ring((own,), lengths)])
        return torch.unique(every, dim=0) if every.shape[1] else every[:1]


class RingKernel:
    """exp(-beta |x_i - x_j|^2 / (sigma_i sigma_j)), (N, N), of split points; see `Kernel`.

    Vectors are the rows that this process was given, in products and in results.

    Args:
        points: the split points.
        beta: inverse temperature.
        sigma: (n,) scales of the own points, as they were given, or None.
        precision: as for `Problem`.
    """

    same = symmetric = True
    diagonal = 1.0
    n_parts: int | None = None

    def __init__(
        self,
        points: SplitPoints,
        beta: float,
        sigma: Tensor | None,
        precision: str,
        tile: int | None,
    ) -> None:
        self.points, self.tile = points, tile
        self.held = self.kept = points.rows
        self.ranks, self.shape = points.rows.ranks, (points.rows.N,) * 2
        own = sigma if sigma is None else points.ordered(sigma)
        # the points as they are ordered, which is all that a panel needs to be like them
        self.problem = Problem(
            points.x,
            None,
            beta,
            sigma=None if own is None else (own, own),
            precision=precision,
            about=points.centre,
            ordered=True,
        )
        if precision == "auto":
            narrow = points.x.dtype == torch.float64
            settled = self.problem.precision_of(0.0 if narrow else self.spread)
            self.problem = replace(self.problem, precision=settled)
        self.dtype = self.problem.dtype

    @property
    def x(self) -> Tensor:
        """(n, d) own points, as they were given."""
        return self.points.unordered(self.problem.x)

    @cached_property
    def spread(self) -> float:
        own = torch.tensor(self.problem.spread, dtype=torch.float64, device=self.problem.x.device)
        return float(self.held.each(own).max())

    def in_precision(self, precision: str) -> RingKernel:
        """The same matrix in another precision."""
        own = self.problem.sigma
        sigma = None if own is None else self.points.unordered(own[0])
        return RingKernel(self.points, self.problem.beta, sigma, precision, self.tile)

    def release(self) -> None:
        """Nothing is kept between products."""

    def density(self) -> Tensor:
        """Own row sums K 1: (n,) float64."""
        one = torch.ones(len(self.problem.x), 1, dtype=torch.float64, device=self.problem.x.device)
        return self.matvec(one)[:, 0].double()

    def matvec(self, V: Tensor) -> Tensor:
        """Own rows of K V: (n, r) -> (n, r) in the kernel's dtype."""
        problem = self.problem
        V = self.points.ordered(V.to(self.dtype))
        out = V.new_zeros(V.shape, dtype=torch.float64)
        # as one process counts: every row sum is at least 1
        below = problem.negligible * len(problem.x) / self.held.N
        scales = () if problem.sigma is None else (problem.sigma[0],)
        blocks = [slice(i, i + PANEL) for i in range(0, len(problem.x), PANEL)]
        boxes = [_Box(problem.x[rows], *(s[rows] for s in scales)) for rows in blocks]

        def work(start: int | None, y: Tensor, v: Tensor, *sigma: Tensor) -> None:
            panel = _Box(y, *sigma)
            for rows, box in zip(blocks, boxes, strict=True):
                if problem.beta * box.nearest(panel) > -math.log(below):
                    continue
                others = None if rows.start == start else y
                pair = (scales[0][rows], sigma[0]) if scales else None
                part = replace(problem, x=problem.x[rows], others=others, sigma=pair)
                kernel = Kernel(part, self.tile, below)
                out[rows] += kernel.matvec(v)

        self.points.visit((V, *scales), work)
        return self.points.unordered(out.to(self.dtype))

    def softmax(
        self, x: Tensor, sigma: Tensor | None, V: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum_j softmax_j(log K_ij + bias_j) V_j (m, r) and the log-sum-exp (m,) of new points.

        Args:
            x, sigma: (m, d) new points and their scales (m,); each process has its own.
            V, bias: (n, r) and (n,) values of the own fitted points.
        """
        fitted = self.problem
        scales = () if fitted.sigma is None else (fitted.sigma[0],)
        out = V.new_zeros(len(x), V.shape[1], dtype=torch.float64)
        total = V.new_full((len(x),), -math.inf, dtype=torch.float64)
        blocks = [slice(i, i + PANEL) for i in range(0, len(x), PANEL)]

        def work(_: int | None, y: Tensor, v: Tensor, b: Tensor, *s: Tensor) -> None:
            for rows in blocks:
                pair = None if sigma is None else (sigma[rows], s[0])
                part = replace(fitted, x=x[rows], others=y, sigma=pair)
                found, log_sum = Kernel(part, self.tile).softmax(v, b)
                # both sums from their common maximum
                log_total = torch.logaddexp(total[rows], log_sum)
                before, now = ((t - log_total).exp()[:, None] for t in (total[rows], log_sum))
                out[rows] = out[rows] * before + found.double() * now
                total[rows] = log_total

        values = (self.points.ordered(V), self.points.ordered(bias), *scales)
        self.points.visit(values, work)
        return out, total


class _Box:
    """The box around points, and their largest scale."""

    def __init__(self, x: Tensor, sigma: Tensor | None = None) -> None:
        self.low, self.high = x.amin(0).double(), x.amax(0).double()
        self.scale = 1.0 if sigma is None else float(sigma.max())

    def nearest(self, other: _Box) -> float:
        """No two points of the boxes have a smaller |x - y|^2 / (sigma_x sigma_y)."""
        gap = torch.maximum(self.low - other.high, other.low - self.high).clamp(min=0.0)
        # the 1e-6 covers the rounding of this number
        return float(gap.square().sum()) / (self.scale * other.scale) * (1.0 - 1e-6)
