"""Tiled sweeps in torch: any device, tuned for CPU.

On a CPU the tiles are dealt to as many Python threads as torch would use, each running its small
products on one thread: a barrier per tile would cost more than the tile. The deal is fixed, so two
runs with the same number of threads give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_kernels.threads import one_torch_thread

from ._operator import CLAMP, CLAMPED, CUT, LOG2_E, SKIP, Kernel

# float32 sums are added into float64 after this many tiles.
FLUSH_EVERY = 4096
# A panel of tiles and what it is made of stay in a second-level cache of 1 MB.
_PANEL_BYTES = 3 * 2**18


# What torch had before `algebra_on_one_thread`, within it.
_workers: ContextVar[int | None] = ContextVar("workers", default=None)


@contextmanager
def algebra_on_one_thread() -> Iterator[None]:
    """Sweeps on as many threads as torch has, all that is smaller on one.

    Operators on tall or small matrices gain little from several threads, and where other programs
    want the cores too, every one of them waits for the slowest thread.
    """
    with one_torch_thread() as before:
        token = _workers.set(_workers.get() or before)
        try:
            yield
        finally:
            _workers.reset(token)


def _n_workers(on: torch.device) -> int:
    if on.type != "cpu":
        return 1
    chosen = _workers.get()
    if chosen is None:
        # what torch has where no other section holds it at one
        with one_torch_thread() as chosen:
            pass
    return chosen


def _deal(work: Callable[[Sequence[Any]], Any], items: list, device: torch.device) -> list:
    """Run work(items[t::T]) on T workers; results in worker order."""
    n_workers = max(1, min(_n_workers(device), len(items)))
    if n_workers == 1:
        return [work(items)]

    def start() -> None:
        torch.set_num_threads(1)

    with (
        one_torch_thread(),
        ThreadPoolExecutor(n_workers, initializer=start) as pool,
    ):
        return list(pool.map(work, [items[t::n_workers] for t in range(n_workers)]))


def _column_ranges(x: Tensor) -> list[slice]:
    """One range of columns for each worker."""
    N = x.shape[1]
    width = max(1, -(-N // _n_workers(x.device)))
    return [slice(start, start + width) for start in range(0, max(N, 1), width)]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for few long rows, (m, N), (n, N) -> (m, n)."""

    @torch.no_grad()
    def work(mine: Sequence[slice]) -> Tensor:
        return _total([a[:, part] @ b[:, part].T for part in mine])

    return _total(_deal(work, _column_ranges(a), a.device))


def subtract_rows(out: Tensor, h: Tensor, basis: Tensor) -> None:
    """out -= h^T basis, in place, for (n, N), (m, n), (m, N)."""

    @torch.no_grad()
    def work(mine: Sequence[slice]) -> None:
        for part in mine:
            out[:, part].addmm_(h.T, basis[:, part], alpha=-1.0)

    _deal(work, _column_ranges(out), out.device)


def _total(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


@contextmanager
def _no_denormals(on: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """What keeps denormals, which are 10-200x slower, out of this thread's powers and products.

    The thread takes them for zero where its processor can, and nothing is left to do to exponents;
    the thread's own setting is put back. Elsewhere exponents at or below the clamp become -inf.
    """
    before = float(torch.tensor(1e-40) * 1.0) == 0.0
    able = on.type == "cpu" and torch.set_flush_denormal(True)
    try:
        yield _as_is if able else _cut
    finally:
        if able and not before:
            torch.set_flush_denormal(False)


def _as_is(s: Tensor) -> Tensor:
    return s


def _cut(s: Tensor) -> Tensor:
    return torch.threshold_(s, CLAMP[s.dtype], float("-inf"))


def _panels(kernel: Kernel) -> list[tuple[int, int, int, bool]]:
    """(i, j, width, clamped): tile i against tiles j to j + width - 1, which cover all j >= i.

    Of several threads only one at a time can start an operator, so theirs are made longer. The
    widest panels come first: dealing them in turn gives each thread the same work.
    """
    widest = 1
    if kernel.bilinear and _n_workers(kernel.x.device) > 1:
        widest = max(1, _PANEL_BYTES // (kernel.tile**2 * kernel.dtype.itemsize))
    if widest in kernel.panels:
        return kernel.panels[widest]
    panels = []
    alike = kernel.routes() <= CUT
    for i, row in enumerate(kernel.plan().tolist()):
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
    kernel.panels[widest] = sorted(panels, key=lambda panel: -panel[2])
    return kernel.panels[widest]


def symmetric_sweep(kernel: Kernel, V: Tensor) -> Tensor:
    """K V for a symmetric K from the tiles j >= i alone, each used as S and as S^T: (N, r)."""
    N, r = V.shape
    # [r, N], or [N]
    columns = (V[:, 0] if r == 1 else V.t()).contiguous()
    v = [t.contiguous() for t in columns.split(kernel.tile, -1)]
    panels = _panels(kernel)
    ranks = kernel.ranks
    if ranks is not None:
        panels = panels[ranks.rank :: ranks.size]

    @torch.no_grad()
    def work(mine: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        with _no_denormals(V.device) as cut:
            return swept(mine, cut)

    def swept(mine: Sequence[tuple[int, int, int, bool]], cut: Callable) -> Tensor:
        scratch = kernel.scratch()
        out = torch.zeros_like(columns)
        rows = out.split(kernel.tile, -1)
        total = None
        for count, (i, j, width, clamped) in enumerate(mine, 1):
            # [tile i, tiles j to j + width]
            s = kernel.exponents(i, j, scratch, width)
            if clamped:
                cut(s)
            s.exp2_()
            here = slice(j * kernel.tile, (j + width) * kernel.tile)
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
    out = _total(_deal(work, panels, V.device)).to(kernel.dtype)
    return (out if ranks is None else ranks.total(out)).t()


def sweep(kernel: Kernel, V: Tensor) -> Tensor:
    """K V tile by tile: (M, r) -> (N, r)."""
    plan = kernel.plan()

    def entries(s: Tensor, i: int, j: int, cut: Callable) -> Tensor:
        return (cut(s) if plan[i, j] == CLAMPED else s).exp2_()

    return _rows(kernel, V, entries)


def biased_sweep(kernel: Kernel, V: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
    """sum_j exp(e_ij + row_bias_i + column_bias_j) V_j: (N, r)."""
    rows = (row_bias * LOG2_E).to(kernel.gram_dtype).split(kernel.tile)
    columns = (column_bias * LOG2_E).to(kernel.gram_dtype).split(kernel.tile)

    def entries(s: Tensor, i: int, j: int, cut: Callable) -> Tensor:
        return cut(s.add_(rows[i][:, None]).add_(columns[j]).to(kernel.dtype)).exp2_()

    return _rows(kernel, V, entries, wide=True)


def _rows(kernel: Kernel, V: Tensor, entries: Callable[..., Tensor], wide: bool = False) -> Tensor:
    """sum_j entries(exponents)_ij V_j with one accumulator per row tile."""
    v = V.split(kernel.tile)
    plan = kernel.plan()
    N, r = kernel.shape[0], V.shape[1]

    @torch.no_grad()
    def work(mine: Sequence[int]) -> list[Tensor]:
        with _no_denormals(V.device) as cut:
            return swept(mine, cut)

    def swept(mine: Sequence[int], cut: Callable) -> list[Tensor]:
        scratch = kernel.scratch()
        results = []
        for i in mine:
            out = V.new_zeros(kernel.a_tiles[i].shape[0], r)
            for j in np.nonzero(plan[i] != SKIP)[0]:
                s = entries(kernel.exponents(i, int(j), scratch, wide=wide), i, int(j), cut)
                if r == 1:
                    out[:, 0].addmv_(s, v[j][:, 0])
                else:
                    out.addmm_(s, v[j])
            results.append(out)
        return results

    return _gather(kernel, work, V.new_zeros(N, r))


def _gather(kernel: Kernel, work: Callable, empty: Tensor) -> Tensor:
    if 0 in kernel.shape or empty.numel() == 0:
        return empty
    items = list(range(len(kernel.a_tiles)))
    ranks = kernel.ranks
    mine = items if ranks is None else items[ranks.rank :: ranks.size]
    results = _deal(work, mine, empty.device)
    T = len(results)
    found = {item: results[k % T][k // T] for k, item in enumerate(mine)}
    if ranks is None:
        return torch.cat([found[i] for i in items])
    # the tiles of others are zeros: the sum over ranks puts all together, to the last bit
    zeros = [empty.new_zeros(len(kernel.a_tiles[i]), empty.shape[1]) for i in items]
    return ranks.total(torch.cat([found.get(i, zeros[i]) for i in items]))


def softmax_sweep(kernel: Kernel, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows shifted by their own running maximum: out (N, r), log-sum-exp (N,) float64."""
    N, M = kernel.shape
    # exponents of a far query differ in digits that only the wider dtype has
    dtype, wide, r = kernel.dtype, kernel.gram_dtype, V.shape[1]
    v = V.split(kernel.tile)
    b = None if bias is None else (bias * LOG2_E).to(wide).split(kernel.tile)

    @torch.no_grad()
    def work(mine: Sequence[int]) -> list[Tensor]:
        with _no_denormals(V.device) as cut:
            return swept(mine, cut)

    def swept(mine: Sequence[int], cut: Callable) -> list[Tensor]:
        scratch = kernel.scratch()
        results = []
        for i in mine:
            n = kernel.a_tiles[i].shape[0]
            top = V.new_full((n, 1), float("-inf"), dtype=wide)
            out = V.new_zeros(n, r + 1)  # the last column is the sum
            for j in range(len(kernel.b_tiles)):
                s = kernel.exponents(i, j, scratch, wide=True)
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

    merged = _gather(kernel, work, V.new_zeros(N, r + 2, dtype=wide))
    total, top = merged[:, r], merged[:, r + 1].double()
    lse = torch.log(total.double()) + top / LOG2_E
    if M == 0:
        lse = torch.full_like(lse, float("-inf"))
    return (merged[:, :r] / total.where(total > 0, 1.0)[:, None]).to(dtype), lse
