"""Products with a kernel matrix of points by the native library, without the matrix.

    out_i = sum_j 2 ** (rate e_ij) v_j,    e_ij from the coordinates of x_i and y_j

Exponents come from differences of coordinates, so near points lose no digits however far they lie
from the origin. Sums are taken in float64.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..threads import one_torch_thread
from .library import call, in_ranges, zeros

__all__ = ["SCORES", "Pairs"]

# e_ij by its name: -sum (x - y)^2 / (scale_x scale_y), -sum |x - y|, sum x y
SCORES = ("squares", "sums", "products")
# Rows and columns of the squares that the matrix consists of.
_SIDE = 16
# Columns of v that one sweep takes.
_COLUMNS = 32
# Points of a block of squares, and the most blocks. Where there are several, their number is a
# multiple of four: two threads then have as many pairs of blocks each in every round, as four
# have in all but the last one.
_BLOCK_POINTS, _MOST_BLOCKS = 2048, 64
_SECONDS_PER_ENTRY = 1e-10


class _PairsCall(ctypes.Structure):
    """`PairsCall` of pairs.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "x_low", "x_scale", "y", "y_low", "y_scale")),
        *((name, ctypes.c_void_p) for name in ("v", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("x_from", "x_to", "x_least")),
        *((name, ctypes.c_void_p) for name in ("y_from", "y_to", "y_least")),
        *((name, ctypes.c_int64) for name in ("n", "m", "d", "r", "block", "blocks", "round")),
        *((name, ctypes.c_double) for name in ("rate", "least")),
        *((name, ctypes.c_int) for name in ("score", "symmetric", "dtype")),
    )


def _parts(n: int, size: int) -> int:
    """How many parts of this size, the last one perhaps smaller, n things make."""
    return -(-n // size)


def _blocks(n_squares: int, most: int) -> int:
    """A number of blocks near `most` whose last one is as full as can be."""
    if most < 2:
        return 1
    fours = range(_parts(most, 8) * 4, _parts(most, 4) * 4 + 1, 4)
    return max(fours, key=lambda n: (-_parts(n_squares, n) * n, n))


def _padded(columns: Tensor) -> Tensor:
    """(..., n) -> (..., n or a little more, a multiple of 16), filled with zeros."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[-1] % _SIDE)).contiguous()


def _with_spare(boxes: Tensor) -> Tensor:
    """All of them in a row, and behind them what a last vector reads and leaves out."""
    return torch.nn.functional.pad(boxes.flatten(), (0, _SIDE))


class Pairs:
    """The matrix 2 ** (rate e_ij) of two sets of points, ready for products with vectors.

    Args:
        x: (n, d) on the CPU. What is kept of it is of `dtype`.
        y: (m, d); None means x, and one half of the entries then serves for the other half.
        rate: what multiplies the exponents; 1 costs nothing.
        score: "squares", "sums" or "products", see SCORES.
        scales: for "squares", (scale_x (n,), scale_y (m,)), positive.
        dtype: float32 or float64, of the entries.
        low: whether float32 exponents take what float32 coordinates round away as well (for
            "squares"); they are then as exact as float64 differences, rounded once.
        skip_below: of "squares", entries below it may be left out: those of 16 rows by 16 columns
            that hold no others are. Few are left where the points are ordered in space.

    Raises:
        FloatingPointError: coordinates, or products of them, are beyond the range of the dtype.

    Example:
        >>> from shared_kernels import native
        >>> if not native.why_not():
        ...     x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        ...     assert Pairs(x).times(torch.eye(2)).tolist() == [[1.0, 0.5], [0.5, 1.0]]
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        rate: float = 1.0,
        score: str = "squares",
        scales: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        low: bool = False,
        skip_below: float | None = None,
    ) -> None:
        self.dtype, self.symmetric = dtype, y is None
        self.shape = len(x), len(x if y is None else y)
        self._call = call_ = _PairsCall()
        # what the pointers of the call point to
        self._named: dict[str, Tensor] = {}
        largest = 1.0
        for side, points in (("x", x), ("y", x if y is None else y)):
            if side == "y" and self.symmetric:
                call_.y, call_.y_low = call_.x, call_.x_low
            else:
                wide = _padded(points.double().T)
                narrow = self._keep(side, wide.to(dtype))
                if low and dtype == torch.float32 and score == "squares":
                    self._keep(f"{side}_low", (wide - narrow.double()).to(dtype))
            largest *= float(points.abs().max()) if points.numel() else 0.0
        if scales is not None:
            for side, scale, factor in zip("xy", scales, (rate, 1.0), strict=True):
                self._keep(f"{side}_scale", _padded(factor / scale.double()).to(dtype))
        bound = torch.finfo(dtype).max
        held = all(bool(torch.isfinite(t).all()) for t in self._named.values())
        largest *= rate * max(1, x.shape[1])
        if not held or (score == "products" and not largest < bound):
            raise FloatingPointError(
                f"coordinates of points, in units of the kernel's width, are beyond the range of "
                f"{dtype}: leave out the far ones, or take another unit"
            )
        n, m = (_parts(size, _SIDE) * _SIDE for size in self.shape)
        call_.n, call_.m, call_.d = n, m, x.shape[1]
        n_squares = n // _SIDE
        n_blocks = _blocks(n_squares, min(_MOST_BLOCKS, n // _BLOCK_POINTS))
        call_.block = max(1, _parts(n_squares, n_blocks))
        # in a symmetric matrix some of the blocks may be empty: their number stays
        call_.blocks = n_blocks if self.symmetric else _parts(n_squares, call_.block)
        call_.rate = rate
        if skip_below is not None and score == "squares" and 0 not in self.shape:
            call_.least = math.log2(skip_below)
            for side in "x" if self.symmetric else "xy":
                self._keep_boxes(side)
            if self.symmetric:
                call_.y_from, call_.y_to = call_.x_from, call_.x_to
                if scales is not None:
                    self._keep_least("y")
        call_.score, call_.symmetric = SCORES.index(score), self.symmetric
        call_.dtype = 1 if dtype == torch.float64 else 0

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        self._named[name] = tensor
        setattr(self._call, name, tensor.data_ptr())
        return tensor

    def _keep_boxes(self, side: str) -> None:
        """Boxes around every few points; the points that fill up count too."""
        points = self._named[side].unflatten(-1, (-1, _SIDE))
        self._keep(f"{side}_from", _with_spare(points.amin(-1)))
        self._keep(f"{side}_to", _with_spare(points.amax(-1)))
        if f"{side}_scale" in self._named:
            self._keep_least(side)

    def _keep_least(self, side: str) -> None:
        scale = self._named[f"{side}_scale"].unflatten(-1, (-1, _SIDE))
        self._keep(f"{side}_least", _with_spare(scale.amin(-1)))

    def times(
        self, V: Tensor, threads: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> Tensor:
        """The matrix times V: (m, r) -> (n, r) float64.

        Args:
            V: (m, r), in any floating dtype; it is rounded to the dtype of the entries.
            threads: how many at most; as many as torch has, if not given. Bits do not depend on it.
            part: (i, k) takes the i-th of k parts of the work alone; the sum of all k parts is the
                product.
        """
        # torch's own threads wait actively after an operator, on the processors that these want
        with one_torch_thread() as before:
            share = functools.partial(in_ranges, threads=threads or before)
            found = [self._sweep(columns, share, part) for columns in V.split(_COLUMNS, 1)]
        if len(found) == 1:
            return found[0]
        return torch.cat([V.new_zeros(self.shape[0], 0, dtype=torch.float64), *found], 1)

    def _sweep(self, V: Tensor, share: Callable[..., None], part: tuple[int, int]) -> Tensor:
        n, r = self.shape[0], V.shape[1]
        c = _PairsCall.from_buffer_copy(self._call)
        v = _padded(V.T.to(self.dtype))
        rows = zeros((c.n, r), torch.float64)
        columns = zeros((r, c.n if self.symmetric else 0), torch.float64)
        c.v, c.rows, c.columns, c.r = v.data_ptr(), rows.data_ptr(), columns.data_ptr(), r
        rounds = c.blocks // 2 + 1 if self.symmetric else 1
        seconds = c.n * c.m * (1.0 + 0.2 * r) * _SECONDS_PER_ENTRY / rounds
        for c.round in range(rounds if 0 not in self.shape else 0):
            first = c.round * c.blocks

            # half-way round the pair (i, j) comes again as (j, i)
            again = self.symmetric and c.round > 0 and 2 * c.round == c.blocks
            tasks = range(c.blocks // 2 if again else c.blocks)
            own = [t for t in tasks if (first + t) % part[1] == part[0]]

            def work(start: int, stop: int, own: list[int] = own) -> None:
                if part[1] == 1:
                    call("pairs_product", ctypes.byref(c), start, stop)
                    return
                for task in own[start:stop]:
                    call("pairs_product", ctypes.byref(c), task, task + 1)

            share(work, len(own), seconds / part[1])
        return (columns.add_(rows.T).T if self.symmetric else rows)[:n]
