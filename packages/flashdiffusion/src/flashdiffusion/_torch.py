"""Tiled products in torch: any device, tuned for CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels.distributed import Ranks

from ._problem import LOG2_E, Problem
from ._tiles import CLAMP, CLAMPED, CUT, SKIP, Tiles
from ._workers import add_up, deal, n_workers

# float32 sums are added into float64 after this many tiles.
FLUSH_EVERY = 4096
# A panel of tiles and what it is made of stay in a second-level cache of 1 MB.
_PANEL_BYTES = 3 * 2**18


@contextmanager
def _no_denormals(on: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """What keeps denormals, which are 10-200x slower, out of this thread's powers and products.

    The thread takes them for zero where its processor can, and nothing is left to do to exponents;
    the thread's own setting is put back. Elsewhere exponents at or below the clamp become -inf.
    """
    before = float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1.0) == 0.0
    able = on.type == "cpu" and torch.set_flush_denormal(True)
    try:
        yield _as_is if able else _cut
    finally:
        if able and not before:
            torch.set_flush_denormal(False)


def _work(sweep: Callable[..., Any], on: torch.device) -> Callable[[Sequence[Any]], Any]:
    """sweep(items, cut) as the work of a thread, with `cut` of `_no_denormals`."""

    @torch.no_grad()
    def work(mine: Sequence[Any]) -> Any:
        with _no_denormals(on) as cut:
            return sweep(mine, cut)

    return work


def _as_is(s: Tensor) -> Tensor:
    return s


def _cut(s: Tensor) -> Tensor:
    return torch.threshold_(s, CLAMP[s.dtype], float("-inf"))


class TorchProducts:
    """Products with a kernel matrix, tile by tile in plain torch; see `_operator.Kernel`."""

    name = "torch"

    def __init__(
        self, problem: Problem, tile: int | None, skip_below: float | None, ranks: Ranks | None
    ) -> None:
        self.tiles, self.ranks = Tiles(problem, tile, skip_below), ranks
        self.symmetric, self.on = problem.symmetric, problem.x.device
        # of a symmetric sweep, by their greatest width
        self._panels: dict[int, list[tuple[int, int, int, bool]]] = {}

    @staticmethod
    def why_not(problem: Problem) -> str | None:
        """Why this backend cannot run the problem, or None."""
        if problem.half:
            return "half precision is for tensor cores; on a CPU float32 is faster and more exact"
        return None

    softmax_why_not = why_not

    def matvec(self, V: Tensor) -> Tensor:
        """K V: (M, r) -> (N, r) in the problem's dtype.

        On a CPU entries below 2^-126 (float32) count as zero; 2^-86 where the processor cannot
        take denormals for zero.
        """
        V = self.tiles.ordered(V.to(self.tiles.dtype))
        return self.tiles.unordered(self._symmetric_sweep(V) if self.symmetric else self._sweep(V))

    def softmax(self, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_j softmax_j(-beta score_ij + bias_j) V_j (N, r) and the log-sum-exp (N,)."""
        bias = None if bias is None else self.tiles.ordered(bias)
        out, lse = self._softmax_sweep(self.tiles.ordered(V).to(self.tiles.dtype), bias)
        return self.tiles.unordered(out), self.tiles.unordered(lse)

    def biased(self, V: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
        """sum_j exp(-beta score_ij + row_bias_i + column_bias_j) V_j: (N, r)."""
        order = self.tiles.order_x
        row_bias = row_bias if order is None else row_bias[order]
        V = self.tiles.ordered(V).to(self.tiles.dtype)
        return self.tiles.unordered(
            self._biased_sweep(V, row_bias, self.tiles.ordered(column_bias))
        )

    # ---- sweeps, in the order of the tiles

    def panels(self) -> list[tuple[int, int, int, bool]]:
        """(i, j, width, clamped): tile i against tiles j to j + width - 1, which cover all j >= i.

        Of several threads only one at a time can start an operator, so theirs are made longer. The
        widest panels come first: dealing them in turn gives each thread the same work.
        """
        tiles = self.tiles
        widest = 1
        if tiles.bilinear and n_workers(self.on) > 1:
            widest = max(1, _PANEL_BYTES // (tiles.tile**2 * tiles.dtype.itemsize))
        if widest in self._panels:
            return self._panels[widest]
        panels = []
        alike = tiles.routes() <= CUT
        for i, row in enumerate(tiles.plan().tolist()):
            j, n = i, len(row)
            while j < n:
                if row[j] != SKIP:
                    width = 1
                    # the diagonal alone: it is not used twice
                    while j > i and width < widest and j + width < n and row[j + width] != SKIP:
                        if not (alike[i, j] and alike[i, j + width]):
                            break
                        width += 1
                    panels.append((i, j, width, CLAMPED in row[j : j + width]))
                    j += width - 1
                j += 1
        self._panels[widest] = sorted(panels, key=lambda panel: -panel[2])
        return self._panels[widest]

    def _symmetric_sweep(self, V: Tensor) -> Tensor:
        """K V for a symmetric K from the tiles j >= i alone, each used as S and as S^T: (N, r)."""
        tiles = self.tiles
        N, r = V.shape
        # [r, N], or [N]
        columns = (V[:, 0] if r == 1 else V.t()).contiguous()
        v = [t.contiguous() for t in columns.split(tiles.tile, -1)]
        panels = self.panels()
        ranks = self.ranks
        if ranks is not None:
            panels = panels[ranks.rank :: ranks.size]

        def sweep(
            mine: Sequence[tuple[int, int, int, bool]], cut: Callable[[Tensor], Tensor]
        ) -> Tensor:
            scratch = tiles.scratch()
            out = torch.zeros_like(columns)
            rows = out.split(tiles.tile, -1)
            total = None
            for count, (i, j, width, clamped) in enumerate(mine, 1):
                # [tile i, tiles j to j + width]
                s = tiles.exponents(i, j, scratch, width)
                if clamped:
                    cut(s)
                s.exp2_()
                here = slice(j * tiles.tile, (j + width) * tiles.tile)
                v_j, out_j = (v[j], rows[j]) if width == 1 else (columns[..., here], out[..., here])
                if r == 1:
                    rows[i].addmv_(s, v_j)
                    if j > i:
                        out_j.addmv_(s.t(), v[i])
                else:
                    rows[i].addmm_(v_j, s.t())
                    if j > i:
                        out_j.addmm_(v[i], s)
                if count % FLUSH_EVERY == 0:
                    total = out.double() if total is None else total.add_(out)
                    out.zero_()
            return out.view(r, N) if total is None else total.view(r, N) + out.view(r, N)

        if N == 0 or r == 0:
            return V.new_zeros(N, r)
        out = add_up(deal(_work(sweep, V.device), panels, V.device)).to(tiles.dtype)
        return (out if ranks is None else ranks.total(out)).t()

    def _sweep(self, V: Tensor) -> Tensor:
        """K V tile by tile: (M, r) -> (N, r)."""
        tiles = self.tiles
        plan = tiles.plan()

        def entries(s: Tensor, i: int, j: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
            return (cut(s) if plan[i, j] == CLAMPED else s).exp2_()

        return self._rows(V, entries)

    def _biased_sweep(self, V: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
        """sum_j exp(e_ij + row_bias_i + column_bias_j) V_j: (N, r)."""
        tiles = self.tiles
        rows = (row_bias * LOG2_E).to(tiles.gram_dtype).split(tiles.tile)
        columns = (column_bias * LOG2_E).to(tiles.gram_dtype).split(tiles.tile)

        def entries(s: Tensor, i: int, j: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
            return cut(s.add_(rows[i][:, None]).add_(columns[j]).to(tiles.dtype)).exp2_()

        return self._rows(V, entries, wide=True)

    def _rows(self, V: Tensor, entries: Callable[..., Tensor], wide: bool = False) -> Tensor:
        """sum_j entries(exponents)_ij V_j with one accumulator per row tile."""
        tiles = self.tiles
        v = V.split(tiles.tile)
        plan = tiles.plan()
        N, r = tiles.shape[0], V.shape[1]

        def sweep(mine: Sequence[int], cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
            scratch = tiles.scratch()
            results = []
            for i in mine:
                out = V.new_zeros(tiles.a_tiles[i].shape[0], r)
                for j in np.nonzero(plan[i] != SKIP)[0]:
                    s = entries(tiles.exponents(i, int(j), scratch, wide=wide), i, int(j), cut)
                    if r == 1:
                        out[:, 0].addmv_(s, v[j][:, 0])
                    else:
                        out.addmm_(s, v[j])
                results.append(out)
            return results

        return self._gather(sweep, V.new_zeros(N, r))

    def _gather(self, sweep: Callable[..., list[Tensor]], empty: Tensor) -> Tensor:
        """The rows that `sweep` finds for each tile of x, of all threads and ranks."""
        tiles = self.tiles
        if 0 in tiles.shape or empty.numel() == 0:
            return empty
        items = list(range(len(tiles.a_tiles)))
        ranks = self.ranks
        mine = items if ranks is None else items[ranks.rank :: ranks.size]
        results = deal(_work(sweep, empty.device), mine, empty.device)
        T = len(results)
        found = {item: results[k % T][k // T] for k, item in enumerate(mine)}
        if ranks is None:
            return torch.cat([found[i] for i in items])
        # the tiles of others are zeros: the sum over ranks puts all together, to the last bit
        zeros = [empty.new_zeros(len(tiles.a_tiles[i]), empty.shape[1]) for i in items]
        return ranks.total(torch.cat([found.get(i, zeros[i]) for i in items]))

    def _softmax_sweep(self, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows shifted by their own running maximum: out (N, r), log-sum-exp (N,) float64."""
        tiles = self.tiles
        N, M = tiles.shape
        # exponents of a far query differ in digits that only the wider dtype has
        dtype, wide, r = tiles.dtype, tiles.gram_dtype, V.shape[1]
        v = V.split(tiles.tile)
        b = None if bias is None else (bias * LOG2_E).to(wide).split(tiles.tile)

        def sweep(mine: Sequence[int], cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
            scratch = tiles.scratch()
            results = []
            for i in mine:
                n = tiles.a_tiles[i].shape[0]
                top = V.new_full((n, 1), float("-inf"), dtype=wide)
                out = V.new_zeros(n, r + 1)  # the last column is the sum
                for j in range(len(tiles.b_tiles)):
                    s = tiles.exponents(i, j, scratch, wide=True)
                    if b is not None:
                        s.add_(b[j])
                    new = torch.maximum(top, s.amax(1, keepdim=True))
                    safe = new.where(new > float("-inf"), 0.0)
                    out.mul_(torch.exp2(top - safe))
                    # 2^-86 of the row's largest entry is as good as zero
                    s = cut(s.sub_(safe).to(dtype)).exp2_()
                    out[:, r] += s.sum(1)
                    if r > 0:
                        out[:, :r].addmm_(s, v[j])
                    top = new
                # [n, r + 2]: weighted values, their sum, the maximum
                results.append(torch.cat((out, top), 1))
            return results

        merged = self._gather(sweep, V.new_zeros(N, r + 2, dtype=wide))
        total, top = merged[:, r], merged[:, r + 1].double()
        lse = torch.log(total.double()) + top / LOG2_E
        if M == 0:
            lse = torch.full_like(lse, float("-inf"))
        return (merged[:, :r] / total.where(total > 0, 1.0)[:, None]).to(dtype), lse
