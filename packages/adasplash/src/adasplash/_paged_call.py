"""What the op of decoding over pages is called with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.calls import replaced

from . import _checks
from ._call import ENOUGH_STEPS


def block_table(table: Tensor, lengths: Tensor, n_pages: int, size: int) -> None:
    """Lengths that fit the table, and a table that names pages that are there; both on the host."""
    room = table.shape[1] * size
    if lengths.numel():
        low, high = (int(x) for x in torch.aminmax(lengths))
        if low < 0 or high > room:
            must = f"be in [0, {room}], as the block table has {table.shape[1]} pages of {size}"
            checks.fail("lengths", must, low if low < 0 else high)
    used = torch.arange(table.shape[1], device="cpu") < ((lengths + size - 1) // size)[:, None]
    wrong = used & ((table < 0) | (table >= n_pages))
    if bool(wrong.any()):
        must = f"name pages in [0, {n_pages}) up to the length of each sequence"
        checks.fail("block_table", must, int(table[wrong][0]))


class PagedDecode(NamedTuple):
    """o = entmax_alpha(cap(scale q k^T) - slope |distance|, over the keys of a sequence's pages) v.

    Sinks and the cap are those of :class:`Attention`.
    """

    q: Tensor  # (B, H, n, D)
    keys: Tensor  # (H_kv, pages, size, D)
    values: Tensor  # (H_kv, pages, size, D_v)
    bounds: Tensor  # (H_kv, pages, 2 D), as `shared_kernels.pages` makes them
    table: Tensor  # (B, M) integers, which pages hold a sequence; what lies past its end is unread
    lengths: Tensor  # (B,) integers
    alpha: Tensor | None = None  # (), (1,), (H,) or (1, H, 1, 1); None: the number below
    alpha_value: float = 0.0
    slopes: Tensor | None = None  # (H,)
    window: int | None = None
    s_aux: Tensor | None = None  # (H,), scores of the sinks
    softcap: float | None = None  # above 0
    scale: float = 1.0
    n_iter: int = ENOUGH_STEPS

    def check(self, reads_table: bool = True) -> PagedDecode:
        """The call as backends take it, or the error that says what is wrong with it."""
        q, keys, values, table, lengths = self.q, self.keys, self.values, self.table, self.lengths
        for name, x in (("q", q), ("keys", keys), ("values", values)):
            checks.floating(name, x)
            if x.dim() != 4:
                checks.fail(name, "have four dimensions", f"shape {tuple(x.shape)}")
        H_kv, n_pages, size, D = keys.shape
        B, H = q.shape[:2]
        checks.same_device(
            q=q, cache=keys, values=values, bounds=self.bounds, table=table, lengths=lengths
        )
        checks.same_dtype(q=q, cache=keys, values=values)
        checks.shape("q", q, (None, None, None, D), lambda: f"(B, H, n, D={D}), like the cache")
        checks.shape("values", values, (H_kv, n_pages, size, None), "(H_kv, pages, size, D_v)")
        checks.shape("bounds", self.bounds, (H_kv, n_pages, 2 * D), "(H_kv, pages, 2 D)")
        if H_kv == 0 or H % H_kv:
            must = "have a number of heads divisible by the cache's (grouped queries)"
            checks.fail("q", must, f"{H} and {H_kv}")
        checks.integer("block_table", table)
        checks.shape("block_table", table, (B, None), lambda: f"(B={B}, pages)")
        checks.integer("lengths", lengths)
        checks.shape("lengths", lengths, (B,), lambda: f"(B={B},)")
        if reads_table and B and checks.reads_values(table, lengths):
            block_table(table, lengths, n_pages, size)
        if self.alpha is not None:
            checks.same_device(q=q, alpha=self.alpha)
            _checks.per_head("alpha", self.alpha, H)
        for name, of_heads in (("alibi_slopes", self.slopes), ("s_aux", self.s_aux)):
            if of_heads is not None:
                checks.floating(name, of_heads)
                checks.same_device(q=q, **{name: of_heads})
                checks.shape(name, of_heads, (H,), lambda: f"(H={H},)")
        if self.window is not None:
            checks.positive_int("window", self.window)
        _checks.steps("niter", self.n_iter)
        return replaced(
            self,
            window=None if self.window is None else int(self.window),
            softcap=_checks.softcap(self.softcap),
            n_iter=int(self.n_iter) if self.n_iter < 10 else ENOUGH_STEPS,
        )

    def fake(self) -> tuple[Tensor, Tensor]:
        """The output (B, H, n, D_v), and how many pages were read (B, H_kv)."""
        B, H_kv = self.q.shape[0], self.keys.shape[0]
        out = self.q.new_empty(*self.q.shape[:3], self.values.shape[-1])
        return out, self.q.new_empty((B, H_kv), dtype=torch.int64)
