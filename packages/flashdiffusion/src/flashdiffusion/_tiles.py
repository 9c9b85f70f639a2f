"""A kernel matrix by its tiles: exponents of a pair of tiles, and which pairs matter.

The scores "sqeuclidean", "dot" and "cosine" are inner products of augmented rows, so a tile's
exponent is one matrix product: for |x - y|^2 the rows are [sqrt(2 beta) x, -beta |x|^2, 1] and
[sqrt(2 beta) y, 1, -beta |y|^2]. Dividing both by a local scale sigma gives |x - y|^2 / (sigma_x
sigma_y) at no cost. Exponents are those of two, because torch.exp2 is up to three times faster than
torch.exp: beta log2(e) stands for beta. The cosine score is half of |x - y|^2 between unit vectors.

Such a product rounds by eps beta (|x|^2 + |y|^2), which is harmless near the centre of the points
and may exceed the exponent itself far from it. A bound of this error decides for each pair of
tiles: where it is small, the product is used; where it is not, points are taken from the centre of
the pair, or else subtracted from each other. On the diagonal an exponent is 0, and no exponent is
above 0: K_ii = 1 >= K_ij.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._problem import LOG2_E, Problem

# Exponents (of two) below the clamp may count as minus infinity: 2^-86 < e^-59. Powers and products
# of denormals are 10-200x slower.
CLAMP = {torch.float32: -86.0, torch.float64: -865.0}
CLAMP_NEEDED_BELOW = {torch.float32: -115.0, torch.float64: -1009.0}
SKIP, PLAIN, CLAMPED = 0, 1, 2
# How the exponents of a tile are computed: by a product; by a product with exponents above 0, which
# rounding could give, cut off; by a product of points taken from the centre of both tiles; by
# differences.
PRODUCT, CUT, RECENTRED, DIFFERENCES = range(4)
# The largest rounding error of an exponent before the next of these ways is taken, by (dtype of
# sums, dtype of exponents). Where float32 exponents were asked for, only gross errors are avoided.
ROUNDING = {
    (torch.float32, torch.float32): 0.25,
    (torch.float32, torch.float64): 1e-7,
    (torch.float64, torch.float64): 1e-10,
    (torch.float32, torch.float16): float("inf"),
}
# The search for points that nearly coincide stops after this many comparisons per point.
_COMPARISONS_PER_POINT = 32
# Boxes of a k-d tree that are at most 2 to this many times as large as its leaves are halved at
# once.
_HALVINGS_AT_ONCE = 3


def spatial_order(x: Tensor, leaf: int) -> Tensor:
    """A permutation in which consecutive runs of `leaf` rows are boxes of a k-d tree."""
    points = x.double().cpu().numpy()
    order = np.arange(len(points))
    # large boxes are halved one by one, and small ones, of which there are many, all at once
    large = leaf * 2**_HALVINGS_AT_ONCE
    _halve_in_turn(order, points, 0, large)
    n_whole = len(points) // large * large
    boxes = order[:n_whole].reshape(-1, large)
    for _ in range(_HALVINGS_AT_ONCE if n_whole else 0):
        blocks = points[boxes]
        axes = np.argmax(blocks.max(1) - blocks.min(1), 1)
        along = np.take_along_axis(blocks, axes[:, None, None], 2)[:, :, 0]
        half = boxes.shape[1] // 2
        boxes = np.take_along_axis(boxes, np.argpartition(along, half, 1), 1).reshape(-1, half)
    order[:n_whole] = boxes.ravel()
    _halve_in_turn(order, points, n_whole, leaf)
    return torch.from_numpy(order).to(x.device)


def _halve_in_turn(order: np.ndarray, points: np.ndarray, first: int, leaf: int) -> None:
    """Order the rows from `first` on by boxes of `leaf` rows, the last one perhaps of fewer."""
    stack = [(first, len(points))]
    while stack:
        start, end = stack.pop()
        if end - start <= leaf:
            continue
        rows = order[start:end]
        block = points.take(rows, 0)
        # torch.aminmax is four times faster than numpy's min and max
        low, high = torch.aminmax(torch.from_numpy(block), dim=0)
        axis = int(np.argmax((high - low).numpy()))
        # a multiple of leaf on the left keeps every tile within one box
        middle = -(-(end - start) // leaf // 2) * leaf
        order[start:end] = rows[np.argpartition(block[:, axis], middle)]
        stack += [(start, start + middle), (start + middle, end)]


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; where columns of x lie side by side in memory, those of the result do, too."""
    if x.dim() == 2 and x.T.is_contiguous():
        return x.T.index_select(1, index).T
    return x.index_select(0, index)


def near_pairs(points: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices of the pairs of points (n, d) within the radius, some twice; None if it takes long.

    Points are sorted into the cells of a grid along three lines; a point near the wall of a cell is
    in both cells.
    """
    n, d = points.shape
    if n == 0 or d == 0:
        return None
    # Random directions, as coordinates may be integers that coincide along the axes.
    axes = min(d, 3)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((d, axes)))[0]
    lines = np.ascontiguousarray((points @ turn).T)
    lines -= lines.min(1, keepdims=True)
    # rounding may move a point by this much
    radius = radius + 1e-12 * d * float(lines.max())
    per_axis = int(2.0 * n ** (1.0 / axes)) + 1
    cell = np.maximum(lines.max(1, keepdims=True) / per_axis, 4.0 * radius)
    cell[cell == 0.0] = 1.0
    low = np.floor((lines - 0.5 * radius) / cell).astype(np.int64)
    crosses = low != np.floor((lines + 0.5 * radius) / cell)
    weight = (per_axis + 3) ** np.arange(axes)
    code, member = weight @ low, np.arange(n)
    for axis in range(axes):
        both = np.flatnonzero(crosses[axis, member])
        code = np.concatenate((code, code[both] + weight[axis]))
        member = np.concatenate((member, member[both]))
    order = np.argsort(code)
    code, member = code[order], member[order]
    lines = lines[:, member]
    at, found, compared = np.arange(len(code)), [], 0
    for step in range(1, len(code)):
        at = at[: np.searchsorted(at, len(code) - step)]
        at = at[code[at] == code[at + step]]
        if len(at) == 0:
            break
        compared += len(at)
        if compared > _COMPARISONS_PER_POINT * n:
            return None
        near = at
        for line in lines:
            near = near[np.abs(line[near + step] - line[near]) <= radius]
        if len(near):
            left, right = member[near], member[near + step]
            close = np.square(points[left] - points[right]).sum(1) <= radius**2
            found.append((left[close], right[close]))
    if not found:
        return member[:0], member[:0]
    left, right = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return left, right


class Scratch(dict[tuple[int, int], tuple[Tensor, Tensor | None]]):
    """(n, m) -> a tile of exponents, and one of gram dtype where that differs, else None.

    Smaller tiles are views of the largest tile's memory and are kept, because making a view takes a
    hundredth of the time of a tile.
    """

    def __init__(self, dtype: torch.dtype, gram_dtype: torch.dtype, on: torch.device) -> None:
        super().__init__()
        self.dtypes, self.on = (dtype, gram_dtype), on
        self.memory = [torch.empty(0, dtype=dtype, device=on)]

    def __missing__(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        size = shape[0] * shape[1]
        if size > len(self.memory[0]):
            self.clear()
            wanted = dict.fromkeys(self.dtypes)
            self.memory = [torch.empty(size, dtype=dtype, device=self.on) for dtype in wanted]
        views = [part[:size].view(shape) for part in self.memory]
        self[shape] = views[0], views[1] if len(views) == 2 else None
        return self[shape]


def _widest(problem: Problem, skip_below: float | None) -> int:
    """Rows and columns of a tile, if none are given."""
    score, x = problem.score, problem.x
    if x.device.type == "cuda":
        return 4096 if not callable(score) else 512
    if callable(score):
        d = max(1, x.shape[1])
        return max(8, min(256, int((2**20 / d) ** 0.5)))
    # 576 and 512 KB: a second-level cache of 1 MB holds the tile and its factors. Boxes of fewer
    # points are further apart, so that more pairs of them can be skipped.
    return 384 if problem.dtype == torch.float32 and skip_below is None else 256


class Tiles:
    """Exponents of a problem, tile by tile.

    Args:
        tile: rows and columns of a tile; None chooses by dtype and device.
        skip_below: tile pairs whose entries are all smaller are planned as SKIP; the points are
            then ordered in space by the permutations `order_x`, `order_y` (None: as given).
    """

    def __init__(self, problem: Problem, tile: int | None, skip_below: float | None) -> None:
        self.problem, self.skip_below = problem, skip_below
        self.shape, self.same = problem.shape, problem.same
        self.dtype, self.gram_dtype = problem.dtypes
        self.metric, self.bilinear = problem.metric, problem.bilinear
        # Lengths in units of a typical sigma are within float32's range.
        self.rate, self.unit = problem.rate * LOG2_E, self._unit()
        self.tile = int(tile or _widest(problem, skip_below))
        self.order_x: Tensor | None = None
        self.order_y: Tensor | None = None
        sorts = skip_below is not None and problem.euclidean and not problem.ordered
        if sorts and max(self.shape) > self.tile:
            self.order_x = spatial_order(problem.x, self.tile)
            self.order_y = self.order_x if self.same else spatial_order(problem.y, self.tile)
        # where each point of x is in that order
        self._places_x: Tensor | None = None
        self._plan: np.ndarray | None = None
        self._routes: np.ndarray | None = None
        # bounds of the tiles, kept until `routes` has used them
        self._bounded: tuple[Any, Any, float] | None = None

    @cached_property
    def a_tiles(self) -> list[Tensor]:
        """Rows (n, p) of each tile of x: their products with `b_tiles` are exponents. Or points."""
        return [t.contiguous() for t in self._rows[0].split(self.tile)] if self.shape[0] else []

    @cached_property
    def b_tiles(self) -> list[Tensor]:
        """Columns (p, m) of each tile of y. Or points."""
        tiles = self._rows[1].split(self.tile) if self.shape[1] else ()
        return [t.t().contiguous() if self.bilinear else t for t in tiles]

    @cached_property
    def b_whole(self) -> Tensor | None:
        return self._rows[1].t().contiguous() if self.bilinear else None

    @cached_property
    def _rows(self) -> list[Tensor]:
        x = self._ordered(0)
        y = x if self.same else self._ordered(1)
        if self.metric:
            scales = self._scale(0), self._scale(1)
            self._point_tiles = x.split(self.tile), y.split(self.tile)
            self._scale_tiles = [None if t is None else t.split(self.tile) for t in scales]
            a, b = self._augmented(x, y, self.problem.centre, *scales)
            rows = [a.to(self.gram_dtype), b.to(self.gram_dtype)]
        elif self.problem.score == "dot":
            beta = self.problem.beta * LOG2_E
            rows = [(beta * x.double()).to(self.gram_dtype), y.to(self.gram_dtype)]
        elif self.problem.score == "cosine":
            beta = self.problem.beta * LOG2_E
            units = []
            for points in (x, y):
                points = points.double()
                norm = points.norm(dim=1, keepdim=True)
                units.append(points / norm.where(norm > 0, 1.0))
            ones = [torch.ones_like(u[:, :1]) for u in units]
            rows = [
                torch.cat((beta * units[0], -beta * ones[0]), 1).to(self.gram_dtype),
                torch.cat((units[1], ones[1]), 1).to(self.gram_dtype),
            ]
        else:
            rows = [x.to(self.gram_dtype), y.to(self.gram_dtype)]
        return rows

    def ordered(self, V: Tensor) -> Tensor:
        """Values of y in the order of the tiles."""
        return V if self.order_y is None else _rows_at(V, self.order_y)

    def unordered(self, out: Tensor) -> Tensor:
        """Values of x, found in the order of the tiles, in the order that they came in."""
        if self.order_x is None:
            return out
        if self._places_x is None:
            self._places_x = torch.argsort(self.order_x)
        return _rows_at(out, self._places_x)

    @property
    def ordered_points(self) -> tuple[Tensor, Tensor]:
        return self._ordered(0).double(), self._ordered(1).double()

    @property
    def ordered_scales(self) -> tuple[Tensor, Tensor] | None:
        """sigma of the points in their order, in units: (n,), (m,) float64."""
        x, y = self._scale(0), self._scale(1)
        return None if x is None or y is None else (x[:, 0], y[:, 0])

    def _ordered(self, side: int) -> Tensor:
        order = (self.order_x, self.order_y)[side]
        return self.problem.points[side] if order is None else self.problem.points[side][order]

    def _unit(self) -> float:
        if self.problem.sigma is None or 0 in self.problem.shape:
            return 1.0
        return 2.0 ** round(float(self.problem.sigma[1].double().log2().median()))

    def _scale(self, side: int) -> Tensor | None:
        """sigma of the points in their order, in units, (n, 1) float64."""
        if self.problem.sigma is None:
            return None
        order = (self.order_x, self.order_y)[side]
        scale = self.problem.sigma[side].double() / self.unit
        return (scale if order is None else scale[order])[:, None]

    def _augmented(
        self, x: Tensor, y: Tensor, centre: Tensor, scale_x: Tensor | None, scale_y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows, float64, whose inner products are exponents of the metric, from any centre."""
        rate = self.rate
        rows: list[Tensor] = []
        for points, scale, left in ((x, scale_x, True), (y, scale_y, False)):
            if left or x is not y:
                moved = points.double() - centre
                moved = moved if self.unit == 1.0 else moved / self.unit
                sq = -rate * (moved * moved).sum(1, keepdim=True)
                one, scaled = torch.ones_like(sq), (2.0 * rate) ** 0.5 * moved
            augmented = torch.cat((scaled, *((sq, one) if left else (one, sq))), 1)
            rows.append(augmented if scale is None else augmented / scale)
        return rows[0], rows[1]

    # ---- tiles

    def scratch(self) -> Scratch:
        """Memory of one worker for a tile of exponents."""
        return Scratch(self.dtype, self.gram_dtype, self.problem.x.device)

    def exponents(
        self, i: int, j: int, scratch: Scratch, width: int = 1, wide: bool = False
    ) -> Tensor:
        """-beta log2(e) score of tile i of x against tile j of y: (n, m), lying in `scratch`.

        Inner products take `width` neighbouring tiles of y at once. `wide` leaves the exponents in
        the dtype that they were found in.
        """
        a, b = self.a_tiles[i], self.b_tiles[j]
        if width > 1 and self.b_whole is not None:
            b = self.b_whole[:, j * self.tile : (j + width) * self.tile]
        if not self.bilinear:
            s = self._plain_score(a, b)
            return s if wide else s.to(self.dtype)
        s, gram = scratch[a.shape[0], b.shape[1]]
        found = s if gram is None else gram
        if wide:
            # these exponents will be shifted by the largest of their row, so they need not be cut
            self.plan()
            route = PRODUCT if self._routes is None else max(self._routes[i, j], CUT)
            cut = False
        else:
            routes = self._routes if self._bounded is None else None
            routes = self.routes() if routes is None else routes
            # Python's integers are compared faster than numpy's, and there are many tiles
            route = int(routes[i, j] if width == 1 else routes[i, j : j + width].max())
            cut = route != PRODUCT
        if route == DIFFERENCES:
            found.copy_(self._differences(i, j))
        else:
            if route == RECENTRED:
                a, b = self._from_the_centre_of(i, j)
            torch.mm(a, b, out=found)
            if cut:
                found.clamp_(max=0.0)
            if i == j and self.same and self.metric:
                found.fill_diagonal_(0.0)
        return found if gram is None or wide else s.copy_(found)

    def _plain_score(self, a: Tensor, b: Tensor) -> Tensor:
        if not callable(self.problem.score):
            return torch.cdist(a, b, p=1.0).mul_(-self.problem.beta * LOG2_E)
        s = _checks.scored(self.problem.score, a[:, None], b[None])
        return s.to(self.dtype) * (-self.problem.beta * LOG2_E)

    def _pair(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Points and scales of tile i of x and of tile j of y, float64."""
        x, y = self._point_tiles
        left, right = self._scale_tiles
        return (
            x[i].double(),
            y[j].double(),
            None if left is None else left[i],
            None if right is None else right[j],
        )

    def _differences(self, i: int, j: int) -> Tensor:
        """Exponents of a tile pair from differences of coordinates: float64, at most 0."""
        x, y, scale_x, scale_y = self._pair(i, j)
        # The unit is a power of two, so these quotients and differences of near points are exact.
        s = torch.cdist(
            x / self.unit, y / self.unit, compute_mode="donot_use_mm_for_euclid_dist"
        ).square_()
        if scale_x is not None and scale_y is not None:
            s.div_(scale_x).div_(scale_y.T)
        return s.mul_(-self.rate)

    def _from_the_centre_of(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """The tiles' augmented rows, from the middle of the box around both."""
        x, y, scale_x, scale_y = self._pair(i, j)
        low, high = torch.minimum(x.amin(0), y.amin(0)), torch.maximum(x.amax(0), y.amax(0))
        a, b = self._augmented(x, y, low + 0.5 * (high - low), scale_x, scale_y)
        return a.to(self.gram_dtype), b.to(self.gram_dtype).T

    def plan(self) -> np.ndarray:
        """(row tiles, column tiles) int8: SKIP, PLAIN or CLAMPED, from boxes around the tiles."""
        if self._plan is None:
            self._survey()
        return self._plan  # type: ignore[return-value]

    def routes(self) -> np.ndarray:
        """(row tiles, column tiles) int8: PRODUCT, CUT, RECENTRED or DIFFERENCES."""
        if self._routes is None:
            self._survey()
        if self._bounded is not None:
            bounded, self._bounded = self._bounded, None
            self._skip_cuts_of_distinct_points(*bounded)
        return self._routes  # type: ignore[return-value]

    @np.errstate(over="ignore")  # squares of points that are very far
    def _survey(self) -> None:
        """Bounds on |x - y| of each tile pair: from boxes, and from balls around the centre."""
        n, m = (-(-size // self.tile) for size in self.shape)
        plan = np.full((n, m), CLAMPED, dtype=np.int8)
        # a cosine of two nearly parallel vectors may come out above 1
        routes = np.full((n, m), CUT if self.problem.score == "cosine" else PRODUCT, dtype=np.int8)
        self._plan, self._routes = plan, routes
        if not (self.metric and n and m):
            return
        xl, xh, xr, xs, xS, _ = left = self._bounds(0)
        yl, yh, yr, ys, yS, _ = right = left if self.same else self._bounds(1)
        skip = float("-inf") if self.skip_below is None else float(np.log2(self.skip_below))
        rate = self.rate
        # the rounding error of an inner product of d + 2 terms: usual size, and worst case
        eps, worst = 4.0 * torch.finfo(self.gram_dtype).eps, 0.25 * (self.problem.x.shape[1] + 4)
        allowed = ROUNDING[self.dtype, self.gram_dtype]
        routes[:] = PRODUCT
        x_size, y_size = eps * rate * np.square(xr), eps * rate * np.square(yr)
        may_bite = (x_size.max() + y_size.max()) / (xs.min() * ys.min()) > allowed
        # few rows of tiles at a time: the bounds take 2 MB
        step = max(1, 2**18 // (m * max(1, xl.shape[1])))
        for start in range(0, n, step):
            i = slice(start, start + step)
            low, high = xl[i, None], xh[i, None]
            nearest = np.square(np.maximum(np.maximum(low - yh, yl - high), 0.0)).sum(2)
            farthest = np.square(np.maximum(high - yl, yh - low)).sum(2)
            farthest = np.minimum(farthest, np.square(xr[i, None] + yr))
            least, most = xs[i, None] * ys, xS[i, None] * yS
            # the 1e-6 covers the rounding of the bounds
            largest = -rate * nearest / most * (1.0 - 1e-6)
            smallest = -rate * farthest / least * (1.0 + 1e-6)
            plan[i][smallest > CLAMP_NEEDED_BELOW[self.dtype]] = PLAIN
            if self.problem.euclidean:
                plan[i][largest < skip] = SKIP
            off = (x_size[i, None] + y_size) / least
            routes[i][worst * off >= -largest] = CUT
            if not may_bite:
                continue
            # An error may be as large as the last digits of the exponent itself.
            bites = (off > allowed) & (off > -4.0 * eps * largest)
            box = np.maximum(high, yh) - np.minimum(low, yl)
            off = 0.5 * eps * rate * np.square(box).sum(2) / least
            fine = (off <= allowed) | (off <= -4.0 * eps * largest)
            routes[i] = np.where(bites, np.where(fine, RECENTRED, DIFFERENCES), routes[i])
        self._bounded = left, right, eps * worst

    def _skip_cuts_of_distinct_points(
        self, left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...], eps: float
    ) -> None:
        """CUT becomes PRODUCT where no two points are so near that an exponent could exceed 0."""
        routes = self._routes
        if routes is None or (routes == CUT).mean() <= 0.1:
            return
        centred = routes <= CUT
        sides = (left,) if self.same else (left, right)
        # the largest |x|^2 / sigma^2 and sigma of the tiles that take the common centre
        rows, columns = centred.any(1), centred.any(0)
        far = max(
            np.square(s[2][k]).max() for s, k in zip((left, right), (rows, columns), strict=True)
        )
        small = min(s[3][k].min() for s, k in zip((left, right), (rows, columns), strict=True))
        large = max(s[4].max() for s in sides)
        radius = (2.0 * eps * far) ** 0.5 * (large / small)
        pairs = near_pairs(left[5] if self.same else np.concatenate((left[5], right[5])), radius)
        if pairs is None:
            return
        near = np.zeros_like(routes, dtype=bool)
        # Points of y are numbered after those of x. If both sets are one, each pair counts twice.
        shift = 0 if self.same else self.shape[0]
        for a, b in (pairs, pairs[::-1]):
            kept = (a < self.shape[0]) & (b >= shift)
            near[a[kept] // self.tile, (b[kept] - shift) // self.tile] = True
        routes[(routes == CUT) & ~near] = PRODUCT

    def _bounds(self, side: int) -> tuple[np.ndarray, ...]:
        """Of each tile: box (low, high), radius, least and largest sigma; centred points."""
        ordered = self._ordered(side).double().cpu().numpy()
        starts = np.arange(0, len(ordered), self.tile)
        centred = ordered - self.problem.centre.cpu().numpy()
        radius = np.sqrt(np.einsum("nd,nd->n", centred, centred))
        scale = self._scale(side)
        if scale is None:
            least = most = np.ones(len(starts))
        else:
            scales = (self.unit * scale[:, 0]).cpu().numpy()
            least, most = np.minimum.reduceat(scales, starts), np.maximum.reduceat(scales, starts)
        return (
            np.minimum.reduceat(ordered, starts),
            np.maximum.reduceat(ordered, starts),
            np.maximum.reduceat(radius, starts),
            least,
            most,
            centred,
        )
