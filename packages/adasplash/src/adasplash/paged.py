"""A key-value cache in pages, with bounds that say which pages a query must read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks, ops, pages

from . import _checks, _length_scale, _ops, _paged_call, _paged_torch
from ._paged_call import PagedDecode


def _on_host(numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class PagedCache:
    """Keys and values of many sequences in pages of one pool; sequences may share pages.

    Beside each page stand the coordinate-wise minimum and maximum of its keys, per kv head, from
    which :func:`entmax_decode` knows which pages cannot hold a key with a weight.

    Args:
        n_pages: how many pages the pool has. It is allocated at once and does not grow.
        n_heads: heads of keys and values, H_kv.
        head_dim: D, at most 256.
        value_dim: D_v; D by default.
        page_size: tokens in a page: 16, 32, 64, 128 or 256. Smaller pages have tighter bounds, of
            which there are more to read.
        dtype: of keys and values. Bounds are fp32 (fp64 for fp64).
        device: where the pool lives; the block tables live on the host.

    Attributes:
        keys, values: (H_kv, n_pages, page_size, D) and (..., D_v).
        bounds: (H_kv, n_pages, 2 D), the maximum and then the minimum, rounded outwards.

    Example:
        >>> cache = PagedCache(n_pages=8, n_heads=2, head_dim=16, page_size=16)
        >>> [first] = cache.add(*torch.randn(2, 1, 2, 20, 16))  # a prompt of 20 tokens
        >>> second = cache.fork(first)  # shares both pages
        >>> cache.append(*torch.randn(2, 2, 2, 1, 16))  # one token for each sequence
        >>> cache.lengths.tolist(), cache.n_free  # the page that both wrote to is there twice
        ([21, 21], 5)
        >>> cache.free(first)
        >>> cache.sequences, cache.n_free
        ((1,), 6)
    """

    def __init__(
        self,
        n_pages: int,
        n_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, n in (("n_pages", n_pages), ("n_heads", n_heads)):
            checks.positive_int(name, n)
        for name, n in (("head_dim", head_dim), ("value_dim", value_dim)):
            checks.positive_int(name, n)
            if n > checks.MAX_HEAD_DIM:
                checks.fail(name, f"be at most {checks.MAX_HEAD_DIM}", n)
        checks.in_set("page_size", page_size, (16, 32, 64, 128, 256))
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            checks.fail("dtype", "be a floating-point dtype", dtype, error=TypeError)
        self.page_size = int(page_size)
        shape = (n_heads, n_pages, page_size)
        self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        self.bounds = pages.empty_bounds(
            n_heads, n_pages, head_dim=head_dim, dtype=wide, device=self.keys.device
        )
        self._filled = _on_host([0] * n_pages)  # tokens in each page
        self._uses = [0] * n_pages  # sequences that hold it; 0: free
        self._held: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._table: Tensor | None = None  # the block table of all sequences while it holds

    def __repr__(self) -> str:
        H_kv, n_pages, size, D = self.keys.shape
        return (
            f"PagedCache({n_pages} pages of {size}, {self.n_free} free, {len(self._held)} "
            f"sequences, H_kv={H_kv}, D={D}, {self.keys.dtype})"
        )

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that are there, oldest first."""
        return tuple(self._held)

    @property
    def n_free(self) -> int:
        """How many pages no sequence holds."""
        return self._uses.count(0)

    @property
    def lengths(self) -> Tensor:
        """(sequences,) int64, the tokens of each sequence, oldest first."""
        return _on_host(list(self._lengths.values()))

    def add(self, keys: Tensor, values: Tensor) -> list[int]:
        """New sequences with these tokens, keys (B, H_kv, n, D), values (..., D_v); n may be 0.

        Returns:
            the number of each, which no other sequence gets later.

        Raises:
            ValueError: more pages are needed than are free; nothing is changed.
        """
        self._check_tokens(keys, values, None)
        new = list(range(self._next, self._next + keys.shape[0]))
        self._need(new, [0] * len(new), keys.shape[2])
        self._next += len(new)
        self._table = None
        for sequence in new:
            self._held[sequence], self._lengths[sequence] = [], 0
        self._write(new, keys, values)
        return new

    def append(self, keys: Tensor, values: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Add tokens to the ends of sequences: keys (B, H_kv, n, D), values (B, H_kv, n, D_v).

        A page that another sequence holds, too, is copied first.

        Args:
            sequences: which, all different; by default all that are there, oldest first.

        Raises:
            ValueError: a sequence that is not there (any more), or more pages are needed than are
                free; nothing is changed.
        """
        chosen = self._chosen(sequences)
        self._check_tokens(keys, values, len(chosen))
        if len(set(chosen)) < len(chosen):
            checks.fail("sequences", "be different", chosen)
        self._need(chosen, [self._lengths[x] for x in chosen], keys.shape[2])
        self._write(chosen, keys, values)

    def fork(self, sequence: int) -> int:
        """A new sequence with the tokens of another, whose pages both share until one writes."""
        [sequence] = self._chosen([sequence])
        new, self._next, self._table = self._next, self._next + 1, None
        self._held[new] = list(self._held[sequence])
        self._lengths[new] = self._lengths[sequence]
        for page in self._held[new]:
            self._uses[page] += 1
        return new

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages that no other holds can be written again."""
        [sequence] = self._chosen([sequence])
        self._table = None
        for page in self._held.pop(sequence):
            self._release(page)
        del self._lengths[sequence]

    def block_table(self, sequences: Sequence[int] | None = None) -> Tensor:
        """(B, M) int64 on the host: the pages of sequences in order, -1 behind the last."""
        if sequences is None and self._table is not None:
            return self._table.clone()
        held = [self._held[x] for x in self._chosen(sequences)]
        longest = max(map(len, held), default=0)
        rows = [x + [-1] * (longest - len(x)) for x in held]
        table = _on_host(rows).view(len(held), longest)
        if sequences is None:
            self._table = table.clone()
        return table

    def lookup(
        self,
        sequences: Sequence[int] | None = None,
        block_table: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block table (B, M) and lengths (B,), on the host, of what a call wants to read.

        Args:
            sequences: which; by default all that are there, oldest first.
            block_table, lengths: a table of the caller's own instead; both or neither.

        Raises:
            ValueError: a sequence or a page that is free, a page out of range, or more tokens than
                a page has.
        """
        if block_table is None and lengths is None:
            tokens = [self._lengths[x] for x in self._chosen(sequences)]
            return self.block_table(sequences), _on_host(tokens)
        if block_table is None or lengths is None or sequences is not None:
            checks.fail(
                "block_table", "come with `lengths` and without `sequences`", "another combination"
            )
        checks.integer("block_table", block_table)
        checks.integer("lengths", lengths)
        table, lengths = block_table.long().cpu(), lengths.long().cpu()
        checks.shape("block_table", table, (None, None), "(B, pages)")
        checks.shape("lengths", lengths, (table.shape[0],), lambda: f"(B={table.shape[0]},)")
        _paged_call.block_table(table, lengths, *self.keys.shape[1:3])
        first = torch.arange(table.shape[1], device="cpu") * self.page_size
        wanted = (lengths[:, None] - first).clamp(0, self.page_size)
        there = self._filled[table.clamp(0, len(self._uses) - 1)]
        short = wanted > there
        if bool(short.any()):
            page, got = int(table[short][0]), int(there[short][0])
            if not self._uses[page]:
                checks.fail("block_table", "name pages that a sequence holds", f"{page}, freed")
            must = f"end within the tokens of each page ({got} in page {page})"
            checks.fail("lengths", must, f"{int(wanted[short][0])} of them")
        return table, lengths

    # --- pages ---

    def _chosen(self, sequences: Sequence[int] | None) -> list[int]:
        chosen = list(self._held) if sequences is None else list(sequences)
        for sequence in chosen:
            if sequence not in self._held:
                state = "freed" if sequence in range(self._next) else "never made"
                must = "name sequences of this cache"
                checks.fail("sequences", must, f"{sequence}, which was {state}")
        return chosen

    def _check_tokens(self, keys: Tensor, values: Tensor, B: int | None) -> None:
        H_kv, _, _, D = self.keys.shape
        for name, x, pool in (("keys", keys, self.keys), ("values", values, self.values)):
            checks.floating(name, x)
            wanted = (B, H_kv, None, pool.shape[-1])
            spelled = f"(B{'' if B is None else f'={B}'}, H_kv={H_kv}, n, {pool.shape[-1]})"
            checks.shape(name, x, wanted, spelled)
            checks.same_dtype(cache=pool, **{name: x})
            checks.same_device(cache=pool, **{name: x})
            if ops.wants_gradient(x):
                hint = "a cache keeps numbers: append under torch.no_grad(), or detach"
                checks.fail(name, "need no gradient", "requires_grad=True", hint)
        if keys.shape[:3] != values.shape[:3]:
            checks.fail("values", f"be as many as the keys {tuple(keys.shape[:3])}", values.shape)

    def _need(self, sequences: list[int], lengths: list[int], n: int) -> None:
        """Refuse before anything is changed what does not fit."""
        needed = 0
        writers: dict[int, int] = {}
        for sequence, length in zip(sequences, lengths, strict=True):
            needed += -(-(length + n) // self.page_size) - -(-length // self.page_size)
            if n and length % self.page_size:
                last = self._held[sequence][-1]
                writers[last] = writers.get(last, 0) + 1
        # of those that write to a shared page each takes a copy, but for the last holder
        needed += sum(min(k, self._uses[page] - 1) for page, k in writers.items())
        if needed > self.n_free:
            must = f"have {needed} free pages for this"
            hint = "free a sequence, or make the cache with a larger n_pages"
            checks.fail("cache", must, self.n_free, hint)

    @torch.no_grad()
    def _write(self, sequences: list[int], keys: Tensor, values: Tensor) -> None:
        n, size = keys.shape[2], self.page_size
        if n == 0:
            return
        for b, sequence in enumerate(sequences):
            held, length = self._held[sequence], self._lengths[sequence]
            inside = length % size
            if inside and self._uses[held[-1]] > 1:
                held[-1] = self._copied(held[-1])
            first = len(held) - (inside > 0)
            while len(held) * size < length + n:
                held.append(self._take(held[-1] if held else None))
            touched = _on_host(held[first:])
            every = touched[:, None] * size + torch.arange(size, device="cpu")
            slots = every.view(-1)[inside : inside + n].to(self.keys.device)
            for pool, new in ((self.keys, keys), (self.values, values)):
                pool.flatten(1, 2).index_copy_(1, slots, new[b])
            self._widen(touched.to(self.keys.device), keys[b], inside)
            before = torch.arange(first, len(held), device="cpu") * size
            self._filled[touched] = (length + n - before).clamp(max=size)
            self._lengths[sequence] = length + n

    def _widen(self, touched: Tensor, keys: Tensor, inside: int) -> None:
        """Let the bounds of pages enclose new keys (H_kv, n, D), from place `inside` on."""
        low, high = pages.outwards(keys)
        behind = len(touched) * self.page_size - inside - keys.shape[1]
        parts = []
        for edge, none in ((high, -torch.inf), (low, torch.inf)):
            edge = torch.nn.functional.pad(edge, (0, 0, inside, behind), value=none)
            edge = edge.unflatten(1, (-1, self.page_size))
            parts.append(edge.amax(2) if none < 0 else edge.amin(2))
        old_high, old_low = self.bounds[:, touched].chunk(2, -1)
        new = (torch.maximum(old_high, parts[0]), torch.minimum(old_low, parts[1]))
        self.bounds[:, touched] = torch.cat(new, -1)

    def _take(self, behind: int | None) -> int:
        """A free page: the one behind the last of its sequence, so that pages lie side by side."""
        uses = self._uses
        if behind is None or behind + 1 >= len(uses) or uses[behind + 1]:
            page = self._gap()
        else:
            page = behind + 1
        uses[page], self._table = 1, None
        self.bounds[:, page] = pages.empty_bounds(
            1, head_dim=self.keys.shape[-1], dtype=self.bounds.dtype, device=self.bounds.device
        )
        self._filled[page] = 0
        return page

    def _gap(self) -> int:
        """Where to begin in the longest stretch of free pages: in its middle, behind a sequence.

        The sequence that ends there can then grow by half of the stretch.
        """
        best, start, length = 0, 0, 0
        for page, used in enumerate([*self._uses, 1]):
            if not used:
                length += 1
                continue
            if length > best:
                best, start = length, page - length
            length = 0
        grows = any(held and held[-1] == start - 1 for held in self._held.values())
        return start + (best // 2 if grows else 0)

    def _copied(self, page: int) -> int:
        """A copy of a shared page for one of those that hold it."""
        new = self._take(page)
        for pool in (self.keys, self.values, self.bounds):
            pool[:, new] = pool[:, page]
        self._filled[new] = self._filled[page]
        self._release(page)
        return new

    def _release(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self._filled[page] = 0


def paged_call(
    q: Tensor,
    cache: PagedCache,
    lengths: Tensor | None = None,
    alpha: float | Tensor = 1.5,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    length_scale: Tensor | None = None,
    niter: int = 10,
    sequences: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    **fields: Any,
) -> PagedDecode:
    """The checked call of :func:`entmax_decode` over pages; ``fields`` go in unchanged."""
    checks.floating("q", q)
    _checks.alpha(alpha)
    table, lengths = cache.lookup(sequences, block_table, lengths)
    is_tensor = isinstance(alpha, Tensor)
    call = PagedDecode(
        q,
        cache.keys,
        cache.values,
        cache.bounds,
        table.to(q.device),
        lengths.to(q.device),
        alpha=alpha if is_tensor else None,  # type: ignore[arg-type]
        alpha_value=0.0 if is_tensor else float(alpha),
        slopes=alibi_slopes,
        scale=_checks.scale(scale, q),
        n_iter=niter,
        **fields,
    ).check(reads_table=False)  # `lookup` has checked it
    return _length_scale.scaled(call, length_scale)


class DecodeStats(NamedTuple):
    """What :func:`decode_stats` measured.

    Attributes:
        pages_read: (B, H_kv) int64, the pages whose keys were read; of many queries, the most that
            queries which read together needed.
        pages_held: (B,) int64, the pages of each sequence.
        tightness: (B, H), by how much the bound of a page exceeds the largest score in it, on
            average over pages and queries, in units of the score; NaN where nothing is seen.
        bytes_read: of bounds, of the keys of the pages read, and of as many values.
        bytes_held: of all keys and values of the sequences.
    """

    pages_read: Tensor
    pages_held: Tensor
    tightness: Tensor
    bytes_read: int
    bytes_held: int

    def __str__(self) -> str:
        held = int(self.pages_held.sum()) * self.pages_read.shape[1]
        pages = int(self.pages_read.sum()) / max(1, held)
        moved = self.bytes_read / max(1, self.bytes_held)
        excess = float(self.tightness.nanmean())
        return (
            f"{pages:.1%} of the pages read, {moved:.1%} of the bytes; bounds exceed the largest "
            f"score of a page by {excess:.2f}"
        )


def decode_stats(
    q: Tensor,
    cache: PagedCache,
    lengths: Tensor | None = None,
    alpha: float | Tensor = 1.5,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    length_scale: Tensor | None = None,
    niter: int = 10,
    sequences: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> DecodeStats:
    """How much of a paged cache :func:`entmax_decode` reads for these queries, and how tight the
    bounds are.

    Args:
        q, lengths, alpha, scale, alibi_slopes, window: as for :func:`entmax_decode`.
        s_aux, softcap, length_scale, niter: as for :func:`entmax_decode`.
        sequences, block_table, backend: as for :func:`entmax_decode`.
        cache: a :class:`PagedCache`.

    Returns:
        :class:`DecodeStats`. It makes the call, and then reads every key for the tightness.

    Example:
        >>> cache = PagedCache(n_pages=4, n_heads=1, head_dim=16)
        >>> _ = cache.add(*torch.randn(2, 1, 1, 200, 16))
        >>> stats = decode_stats(torch.randn(1, 2, 1, 16), cache)
        >>> stats.pages_read.tolist(), stats.pages_held.tolist()
        ([[4]], [4])
    """
    call = paged_call(
        q,
        cache,
        lengths,
        alpha,
        scale=scale,
        alibi_slopes=alibi_slopes,
        window=window,
        s_aux=s_aux,
        softcap=softcap,
        length_scale=length_scale,
        niter=niter,
        sequences=sequences,
        block_table=block_table,
    )
    with torch.no_grad():  # numbers to look at
        _, pages_read = _ops.paged_decode(call, backend)
        tightness = _paged_torch.excess(call)
    size, H_kv = cache.page_size, cache.keys.shape[0]
    held = (call.lengths + size - 1) // size
    of_page = size * cache.keys.element_size() * (cache.keys.shape[-1] + cache.values.shape[-1])
    of_bounds = cache.bounds.element_size() * cache.bounds.shape[-1]
    looked_at = torch.where((pages_read < held[:, None]).any(1), held, 0) * H_kv
    return DecodeStats(
        pages_read,
        held,
        tightness,
        int(pages_read.sum()) * of_page + int(looked_at.sum()) * of_bounds,
        int(held.sum()) * H_kv * of_page,
    )
