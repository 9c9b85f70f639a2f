"""exp(-beta * score) between two point sets, known by its tiles; products with it, by backend.

The scores "sqeuclidean", "dot" and "cosine" are inner products of augmented rows, so a tile's
exponent is one matrix product: for |x - y|^2 the rows are [sqrt(2 beta) x, -beta |x|^2, 1] and
[sqrt(2 beta) y, 1, -beta |y|^2]. Dividing both by a local scale sigma gives |x - y|^2 / (sigma_x
sigma_y) at no cost. Exponents are those of two, because torch.exp2 is up to three times faster than
torch.exp: beta log2(e) stands for beta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels import device, dispatch

from ._group import Ranks, Rows, Shard

# Above this beta |x|^2 the cancellation in float32 exponents passes ~1e-5: compute them in float64.
SPLIT_ABOVE = 128.0
LOG2_E = 1.4426950408889634
# Exponents (of two) below the clamp may count as minus infinity: 2^-86 < e^-59. Powers and products
# of denormals are 10-200x slower.
CLAMP = {torch.float32: -86.0, torch.float64: -865.0}
CLAMP_NEEDED_BELOW = {torch.float32: -115.0, torch.float64: -1009.0}
SKIP, PLAIN, CLAMPED = 0, 1, 2
# Above this beta |x|^2 exponents of fp16 operands are off by more than a third: no rung at all.
HALF_UP_TO = 128.0


def spatial_order(x: Tensor, leaf: int) -> Tensor:
    """A permutation in which consecutive runs of `leaf` rows are boxes of a k-d tree."""
    points = x.double().cpu().numpy()
    order = np.arange(len(points))
    stack = [(0, len(points))]
    while stack:
        start, end = stack.pop()
        if end - start <= leaf:
            continue
        rows = order[start:end]
        block = points.take(rows, 0)
        # four times faster than numpy's
        low, high = torch.aminmax(torch.from_numpy(block), dim=0)
        axis = int(np.argmax((high - low).numpy()))
        # a multiple of leaf on the left keeps every tile within one box
        middle = -(-(end - start) // leaf // 2) * leaf
        order[start:end] = rows[np.argpartition(block[:, axis], middle)]
        stack += [(start, start + middle), (start + middle, end)]
    return torch.from_numpy(order).to(x.device)


class Scratch(dict):
    """(n, m) -> a tile of exponents, and one of gram dtype where that differs, else None.

    All but the first lie in the first, largest one's memory: making a view costs as much as a
    hundredth of a tile's work.
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


class Kernel:
    """The matrix exp(-beta score(x_i, y_j)), (N, M), as a source of exponent tiles.

    Args:
        x, y: (N, d), (M, d) of one dtype; y None means y = x, and the score is symmetric unless it
            is callable.
        beta: inverse temperature, > 0.
        score: "sqeuclidean", "dot" (-x.y), "cosine" (1 - cos), "l1", or a callable of
            (t, 1, d), (1, u, d) -> (t, u).
        sigma: local scales (sigma_x (N,), sigma_y (M,)) that divide |x - y|^2.
        precision: "float32", "mixed" (float64 exponents, float32 exp and sums), "float64", "half"
            (fp16 operands, float32 sums; Triton alone) or "auto".
        tile: rows and columns of a tile.
        skip_below: tile pairs whose entries are all smaller are dropped; the points are then
            ordered in space.
        backend: "auto", "cpu" (tiled torch, any device) or "triton".
        ranks: processes that hold the same kernel and share its sweeps; each product is then
            collective, and whole on every rank.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        beta: float,
        score: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
        sigma: tuple[Tensor, Tensor] | None = None,
        precision: str = "auto",
        tile: int | None = None,
        skip_below: float | None = None,
        backend: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.x, self.y, self.same = x, x if y is None else y, y is None
        self.beta, self.score, self.sigma = beta, score, sigma
        self.precision, self.backend, self.ranks = precision, backend, ranks
        self.asked_tile, self.skip_below = tile, skip_below
        self.shape = (self.x.shape[0], self.y.shape[0])
        self.euclidean = score == "sqeuclidean"
        self.symmetric = self.same and not callable(score)
        self.dtype, self.gram_dtype = self._dtypes()
        d = max(1, x.shape[1])
        # 576 and 512 KB: a second-level cache of 1 MB holds the tile and what it is made of. Boxes
        # of fewer points are further apart, so that more pairs of them can be skipped.
        widest = 384 if self.dtype == torch.float32 and skip_below is None else 256
        if callable(score):
            widest = max(8, min(256, int((2**20 / d) ** 0.5)))
        if x.device.type == "cuda":
            widest = 4096 if not callable(score) else 512
        self.tile = tile or widest
        self.half = precision == "half"
        self.order_x = self.order_y = None
        if skip_below is not None and self.euclidean and max(self.shape) > self.tile:
            self.order_x = spatial_order(self.x, self.tile)
            self.order_y = self.order_x if self.same else spatial_order(self.y, self.tile)
        self._build_rows()
        self._plan: np.ndarray | None = None
        # of the CPU's sweep, by their greatest width
        self.panels: dict[int, list[tuple[int, int, int, bool]]] = {}
        # what the Triton launcher has built from the points
        self.prepared: tuple[Tensor, ...] | None = None
        self._part: Any = None

    # ---- construction

    # K_ii of a symmetric kernel; a sparse one has a vector here
    diagonal = 1.0

    def disconnected(self, second: float) -> bool:
        """Whether the second eigenvalue tells that the graph falls into parts."""
        return second > 1.0 - 1e-6

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of exp and sums, dtype of the exponents)."""
        precision = self.precision
        if precision == "auto":
            if self.x.dtype == torch.float64:
                precision = "float64"
            elif not callable(self.score) and self.score != "l1" and self.spread() > SPLIT_ABOVE:
                precision = "mixed"
            else:
                precision = "float32"
        return {
            "float32": (torch.float32, torch.float32),
            "mixed": (torch.float32, torch.float64),
            "float64": (torch.float64, torch.float64),
            "half": (torch.float32, torch.float16),
        }[precision]

    def centre(self) -> Tensor:
        """What is subtracted from all points: (d,) float64."""
        if not self.euclidean or 0 in self.shape:
            return self.x.new_zeros(self.x.shape[1], dtype=torch.float64)
        return self.y.double().mean(0)

    def spread(self) -> float:
        """The largest term that cancels in an exponent: beta |x|^2 / sigma^2 after centring."""
        if 0 in self.shape or self.score == "cosine":
            return 0.0
        centre, largest = self.centre(), 0.0
        for i, points in enumerate((self.x,) if self.same else (self.x, self.y)):
            sq = ((points.double() - centre) ** 2).sum(1)
            if self.sigma is not None:
                sq = sq / self.sigma[i].double() ** 2
            largest = max(largest, float(sq.max()))
        return self.beta * largest

    def _build_rows(self) -> None:
        """a_tiles (n, p) and b_tiles (p, m): their products are exponents. Or plain points."""
        beta = self.beta * LOG2_E
        x = self.x if self.order_x is None else self.x[self.order_x]
        y = self.y if self.order_y is None else self.y[self.order_y]
        working = torch.float64
        if self.euclidean:
            centre = self.centre()
            scales = [torch.ones(1, device=x.device, dtype=torch.float64)] * 2
            if self.sigma is not None:
                for k, order in enumerate((self.order_x, self.order_y)):
                    s = self.sigma[k].double()
                    scales[k] = (s if order is None else s[order])[:, None]
            rows: list[Tensor] = []
            for points, scale, left in ((x, scales[0], True), (y, scales[1], False)):
                if left or not self.same:
                    points = points.double() - centre
                    sq = -beta * (points * points).sum(1, keepdim=True)
                    one, scaled = torch.ones_like(sq), (2.0 * beta) ** 0.5 * points
                augmented = torch.cat((scaled, *((sq, one) if left else (one, sq))), 1)
                rows.append((augmented / scale).to(self.gram_dtype))
        elif self.score == "dot":
            rows = [(beta * x.double()).to(self.gram_dtype), y.to(self.gram_dtype)]
        elif self.score == "cosine":
            units = []
            for points in (x, y):
                points = points.to(working)
                norm = points.norm(dim=1, keepdim=True)
                units.append(points / norm.where(norm > 0, 1.0))
            ones = [torch.ones_like(u[:, :1]) for u in units]
            rows = [
                torch.cat((beta * units[0], -beta * ones[0]), 1).to(self.gram_dtype),
                torch.cat((units[1], ones[1]), 1).to(self.gram_dtype),
            ]
        else:
            rows = [x.to(self.gram_dtype), y.to(self.gram_dtype)]
        self.bilinear = not callable(self.score) and self.score != "l1"
        self.a_tiles = [t.contiguous() for t in rows[0].split(self.tile)] if self.shape[0] else []
        b_tiles = rows[1].split(self.tile) if self.shape[1] else ()
        self.b_tiles = [t.t().contiguous() if self.bilinear else t for t in b_tiles]
        self.b_whole = rows[1].t().contiguous() if self.bilinear else None

    # ---- tiles

    def scratch(self) -> Scratch:
        """One worker's place for a tile of exponents."""
        return Scratch(self.dtype, self.gram_dtype, self.x.device)

    def exponents(self, i: int, j: int, scratch: Scratch, width: int = 1) -> Tensor:
        """-beta log2(e) score of tile i of x against tile j of y: (n, m), lying in `scratch`.

        Inner products take `width` neighbouring tiles of y at once.
        """
        a, b = self.a_tiles[i], self.b_tiles[j]
        if width > 1 and self.b_whole is not None:
            b = self.b_whole[:, j * self.tile : (j + width) * self.tile]
        if self.bilinear:
            s, gram = scratch[a.shape[0], b.shape[1]]
            if gram is None:
                return torch.mm(a, b, out=s)
            return s.copy_(torch.mm(a, b, out=gram))
        if not callable(self.score):
            return torch.cdist(a, b, p=1.0).mul_(-self.beta * LOG2_E).to(self.dtype)
        s = self.score(a[:, None], b[None])
        if not isinstance(s, Tensor) or s.shape != (a.shape[0], b.shape[0]):
            got = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
            raise ValueError(
                f"`score_mod` must return a tensor of shape (t, u) = {(len(a), len(b))}, got {got}"
            )
        return s.to(self.dtype) * (-self.beta * LOG2_E)

    def plan(self) -> np.ndarray:
        """(row tiles, column tiles) int8: SKIP, PLAIN or CLAMPED, from boxes around the tiles."""
        if self._plan is None:
            n, m = len(self.a_tiles), len(self.b_tiles)
            self._plan = np.full((n, m), CLAMPED, dtype=np.int8)
            if self.euclidean and n and m:
                self._plan_from_boxes(self._plan)
        return self._plan

    def _plan_from_boxes(self, plan: np.ndarray) -> None:
        """Bounds on |x - y| of a tile pair: from boxes, and from balls around the centre."""
        xl, xh, xr, xs, xS = self._bounds(0)
        yl, yh, yr, ys, yS = (xl, xh, xr, xs, xS) if self.same else self._bounds(1)
        skip = float("-inf") if self.skip_below is None else float(np.log2(self.skip_below))
        beta = self.beta * LOG2_E
        for i, row in enumerate(plan):
            nearest = np.square(np.maximum(np.maximum(xl[i] - yh, yl - xh[i]), 0.0)).sum(1)
            farthest = np.square(np.maximum(xh[i] - yl, yh - xl[i])).sum(1)
            farthest = np.minimum(farthest, np.square(xr[i] + yr))
            # the 1e-6 covers the rounding of the bounds
            largest = -beta * nearest / (xS[i] * yS) * (1.0 - 1e-6)
            smallest = -beta * farthest / (xs[i] * ys) * (1.0 + 1e-6)
            row[smallest > CLAMP_NEEDED_BELOW[self.dtype]] = PLAIN
            row[largest < skip] = SKIP

    def _bounds(self, side: int) -> tuple[np.ndarray, ...]:
        """Of each tile: box (low, high), radius from the centre, least and largest sigma."""
        points, order = ((self.x, self.order_x), (self.y, self.order_y))[side]
        ordered = (points if order is None else points[order]).double().cpu().numpy()
        starts = np.arange(0, len(ordered), self.tile)
        radius = np.sqrt(np.square(ordered - self.centre().cpu().numpy()).sum(1))
        if self.sigma is None:
            least = most = np.ones(len(starts))
        else:
            scale = self.sigma[side].double()
            scales = (scale if order is None else scale[order]).cpu().numpy()
            least, most = np.minimum.reduceat(scales, starts), np.maximum.reduceat(scales, starts)
        return (
            np.minimum.reduceat(ordered, starts), np.maximum.reduceat(ordered, starts),
            np.maximum.reduceat(radius, starts), least, most,
        )  # fmt: skip

    # ---- products

    def transposed(self) -> Kernel:
        """The kernel between y and x, for sums over rows."""
        score = self.score
        if callable(score):
            original = score

            def score(a: Tensor, b: Tensor) -> Tensor:
                return original(b.transpose(0, 1), a.transpose(0, 1)).t()

        return Kernel(
            self.y,
            None if self.same and not callable(score) else self.x,
            beta=self.beta,
            score=score,
            sigma=None if self.sigma is None else (self.sigma[1], self.sigma[0]),
            precision=self.precision,
            tile=self.asked_tile,
            skip_below=self.skip_below,
            backend=self.backend,
            ranks=self.ranks,
        )

    def density(self) -> Tensor:
        """Row sums K 1: (N,) float64."""
        one = torch.ones(self.shape[1], 1, dtype=torch.float64, device=self.x.device)
        return self.matvec(one)[:, 0].double()

    def reasons(self) -> dict[str, str | None]:
        """Backend -> why it cannot run `matvec`, or None; in order of preference."""
        reason = device.triton_why_not(self.x)
        if reason is None:
            reason = self._triton_why_not()
        if device.target(self.x).is_gpu:
            return {"triton": reason, "cpu": self._cpu_why_not()}
        return {"cpu": self._cpu_why_not(), "triton": reason}

    def _cpu_why_not(self) -> str | None:
        if self.half:
            return "half precision is for tensor cores; on a CPU float32 is faster and more exact"
        return None

    def _triton_why_not(self) -> str | None:
        if not self.euclidean or self.sigma is not None:
            return "the kernel is written for the score |x - y|^2"
        if torch.float64 in (self.dtype, self.gram_dtype):
            return "its sums are float32; this product asks for float64"
        if self.x.shape[1] > 252:
            return f"it takes at most 252 dimensions, got {self.x.shape[1]}"
        if self.half and self.spread() > HALF_UP_TO:
            return (
                f"beta |x|^2 is up to {self.spread():.3g}, and above {HALF_UP_TO:g} half precision "
                f"does not tell near points from far ones"
            )
        return None

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (M, r) -> (N, r) in the kernel's dtype.

        On the CPU entries below 2^-126 (float32) count as zero; 2^-86 where the processor cannot
        take denormals for zero.
        """
        if dispatch.choose("flashdiffusion::matvec", self.backend, self.reasons()) == "triton":
            from ._triton import forward

            if self.ranks is None:
                return forward.launch_matvec_forward(self, V)
            part, rows = self._own_part()
            out = torch.zeros(self.shape[0], V.shape[1], dtype=self.dtype, device=V.device)
            out[rows] = forward.launch_matvec_forward(part, V)
            return self.ranks.total(out)
        from . import _cpu

        V = V.to(self.dtype)
        if self.order_y is not None:
            V = V[self.order_y]
        sweep = _cpu.symmetric_sweep if self.symmetric else _cpu.sweep
        return self._unordered(sweep(self, V))

    def _own_part(self) -> tuple[Kernel, slice]:
        """For products by whole rows: the kernel between this rank's rows and all of y."""
        if self._part is None and self.ranks is not None:
            own = Shard(self.ranks, self.shape[0])
            x = own.mine(self.x)
            precision = "half" if self.half else "float32"
            part = Kernel(x, self.y, beta=self.beta, precision=precision, tile=self.asked_tile)
            self._part = part, slice(own.start, own.stop)
        return self._part

    def softmax_reasons(self) -> dict[str, str | None]:
        """As `reasons`, for rows that are shifted by their maximum."""
        unshifted = "the kernel multiplies by exp(-beta |x - y|^2) unshifted"
        return {"cpu": self._cpu_why_not(), "triton": unshifted}

    def softmax(self, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_j softmax_j(-beta score_ij + bias_j) V_j (N, r) and the log-sum-exp (N,)."""
        from . import _cpu

        dispatch.choose("flashdiffusion::softmax", self.backend, self.softmax_reasons())
        if self.order_y is not None:
            V, bias = V[self.order_y], None if bias is None else bias[self.order_y]
        out, lse = _cpu.softmax_sweep(self, V.to(self.dtype), bias)
        return self._unordered(out), self._unordered(lse)

    def log_sum_exp(self, bias: Tensor | None = None) -> Tensor:
        """log sum_j exp(-beta score_ij + bias_j): (N,) float64."""
        return self.softmax(self.x.new_empty(self.shape[1], 0), bias)[1]

    def biased(self, V: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
        """sum_j exp(-beta score_ij + row_bias_i + column_bias_j) V_j: (N, r)."""
        from . import _cpu

        dispatch.choose("flashdiffusion::softmax", self.backend, self.softmax_reasons())
        if self.order_y is not None:
            V, column_bias = V[self.order_y], column_bias[self.order_y]
            row_bias = row_bias[self.order_x]
        return self._unordered(_cpu.biased_sweep(self, V.to(self.dtype), row_bias, column_bias))

    def _unordered(self, out: Tensor) -> Tensor:
        if self.order_x is None:
            return out
        result = torch.empty_like(out)
        result[self.order_x] = out
        return result


class Reversible:
    """P_ij = K_ij w_j / (K w)_i and its symmetric form M, for a symmetric K with K_ii = 1.

    w = r^-alpha h with r = K 1: alpha-normalisation and Doob's h-transform are the same step. The
    degrees d = w * K w are P's stationary weights, M = diag(rscale) K diag(rscale) with
    rscale = sqrt(w / K w), and M sqrt(d) = sqrt(d).

    `weights`, `row_sums` = K w, `degree`, `rscale`: (N,) float64.
    """

    def __init__(self, kernel: Kernel, weights: Tensor, row_sums: Tensor | None = None) -> None:
        if row_sums is None:
            row_sums = kernel.matvec(weights[:, None])[:, 0].double()
        self.kernel, self.weights, self.row_sums = kernel, weights, row_sums
        self.degree = weights * row_sums
        self.rscale = (weights / row_sums).sqrt()

    @classmethod
    def normalised(cls, kernel: Kernel, alpha: float, h: Tensor | None = None) -> Reversible:
        """w = r^-alpha h: one pass for r, and one for K w unless w = 1."""
        density = kernel.density()
        weights = density**-alpha
        if h is not None:
            weights = weights * (h / h.max())
        return cls(kernel, weights, density if alpha == 0.0 and h is None else None)

    def apply(self, V: Tensor, kernel: Kernel | None = None, rows: Rows | None = None) -> Tensor:
        """M V, float64, (N, r); `kernel` may be the same matrix in another precision.

        With `rows`, of V and of the product only those that this process keeps.
        """
        kernel = kernel or self.kernel
        rows = Rows(len(self.rscale)) if rows is None else rows
        scale = rows.mine(self.rscale)[:, None]
        # rounded before the ranks exchange it, not after: half the bytes
        scaled = rows.whole((V * scale).to(kernel.dtype))
        return rows.mine(kernel.matvec(scaled)).double() * scale

    def markov(self, V: Tensor) -> Tensor:
        """P V, float64, (N, r)."""
        return self.kernel.matvec(V * self.weights[:, None]).double() / self.row_sums[:, None]
