"""The Laplacian of patterns that several processes hold: rows here, patterns in a ring."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_kernels import checks, distributed

from .. import _checks, _kept
from .._nearest import _ranked, nearest
from .laplacian import inverse_roots


class RankLaplacian:
    """L of the kNN graph of patterns that are split over the ranks of a group: own rows of L x.

    S is the clamped cosine, M its k largest entries per row among the patterns of all ranks,
    W = max(M, M^T) and L = D - W, or D^(-1/2) (D - W) D^(-1/2): the graph that one process with all
    patterns builds. Each rank holds its rows of W. Patterns, and x in each product, go around the
    ranks a part at a time; memory is that of three parts.

    Args:
        X: the patterns (n, d) of this rank, in any number. The graph is built without gradient.
        k: neighbours per pattern, 1 <= k < patterns of all ranks.
        group: a ProcessGroup or one dimension of a DeviceMesh.
        normalized: which L.

    Attributes:
        degrees: (n,) row sums of W. lengths: patterns of each rank.
        half: half a bound of the spectrum.

    Raises:
        ValueError: what one rank refuses all refuse.

    Example:
        >>> from torch.distributed import HashStore, init_process_group
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        >>> L = RankLaplacian(torch.eye(3) + 0.1, 1, torch.distributed.group.WORLD)
        >>> L.laplacian(torch.ones(3, 1)).abs().max() < 1e-6
        tensor(True)
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, X: Tensor, k: int, group: Any, normalized: bool = True) -> None:
        self.ranks = ranks = distributed.required(group)
        with distributed.agreement(ranks) as agreed:
            checks.floating("X", X)
            checks.shape("X", X, (None, None), "(n, d)")
            _checks.finite("X", X)
            k, normalized = _checks.positive("k", k), checks.flag("normalized", normalized)
            agreed.equal["X.dtype, its columns, k and normalized"] = distributed.fingerprint(
                str(X.dtype), X.shape[1], k, normalized
            )
            agreed.from_all = len(X)
        self.lengths: list[int] = agreed.from_all
        if k >= sum(self.lengths):
            checks.fail("k", f"be less than the number of patterns, {sum(self.lengths)}", k)
        self._starts: list[int] = [sum(self.lengths[:r]) for r in range(ranks.size + 1)]
        _kept.make(X.device.type, lambda: self._build(X.detach(), k, normalized))

    def _build(self, X: Tensor, k: int, normalized: bool) -> None:
        row, col, val = self._edges(X, k)
        n = len(X)
        ones = val.new_zeros(n).index_add_(0, row, val)
        self.degrees = self.diagonal = ones
        self.dtype = val.dtype
        if normalized:
            scale, self.diagonal = inverse_roots(self.degrees)
            val = val * scale[row]
            for rank, (theirs,) in self.ranks.ring([scale], self.lengths):
                here = self._of(rank, col)
                val[here] *= theirs[col[here] - self._starts[rank]]
            self.half = 1.0
        else:
            own = self.degrees.amax() if n else val.new_zeros(())
            self.half = max(float(self.ranks.gather(own).amax()), 1e-12)
        # the edges to each rank's patterns: first edge of each row, columns there, values
        self._parts = []
        for rank in range(self.ranks.size):
            here = self._of(rank, col)
            crow = torch.searchsorted(row[here], torch.arange(n, device=row.device))
            self._parts.append((crow, col[here] - self._starts[rank], val[here]))

    def _of(self, rank: int, col: Tensor) -> Tensor:
        return (col >= self._starts[rank]) & (col < self._starts[rank + 1])

    def _edges(self, X: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Own rows of W: row (own number), column (number among all), value; sorted."""
        weight, index = self._neighbours(X, k)
        first = self._starts[self.ranks.rank]
        here = weight > 0
        own = torch.arange(len(X), device=X.device)[:, None].expand_as(index)[here]
        mine = (own + first, index[here], weight[here])
        counts = self.ranks.gather(torch.tensor([len(own)], device=X.device)).flatten().tolist()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for rank, (i, j, v) in self.ranks.ring(mine, counts):
            if rank == self.ranks.rank:
                found.append((i, j, v))
            # who has an own pattern as a neighbour is its neighbour
            back = self._of(self.ranks.rank, j)
            found.append((j[back], i[back], v[back]))
        rows, cols, vals = (torch.cat(parts) for parts in zip(*found, strict=True))
        total = sum(self.lengths)
        key = rows * total + cols
        key, place = key.unique(sorted=True, return_inverse=True)
        val = weight.new_zeros(len(key)).scatter_reduce_(0, place, vals, "amax", include_self=False)
        return key.div(total, rounding_mode="floor") - first, key % total, val

    def _neighbours(self, X: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(n, k) weights and numbers of the most similar patterns of all ranks."""
        # in float64, in which similarities are compared
        x = X.double()[None]
        cosine = x.new_zeros(1, len(X), 0)
        index = torch.zeros(1, len(X), 0, dtype=torch.int64, device=X.device)
        for rank, (theirs,) in self.ranks.ring([X], self.lengths):
            most = min(k, len(theirs))
            if not most or not len(X):
                continue
            own = rank == self.ranks.rank
            found, place, ok = nearest(x, x if own else theirs.double()[None], most, None, own)
            both = torch.cat((cosine, found.masked_fill(~ok, -torch.inf)), -1)
            at = torch.cat((index, place + self._starts[rank]), -1)
            out = both == -torch.inf
            cosine, place, ok, _ = _ranked(both.masked_fill(out, 0.0), at, k, out)
            cosine = cosine.masked_fill(~ok, -torch.inf)
            index = torch.where(ok, at.gather(-1, place), 0)
        dtype = torch.promote_types(X.dtype, torch.float32)
        return cosine[0].clamp(min=0.0).to(dtype), index[0]

    def laplacian(self, x: Tensor) -> Tensor:
        """Own rows of L x; x (n, ...) are those of this rank. Collective, backward too."""
        product: Tensor = _Product.apply(x, self)
        return product

    def _product(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).to(self.dtype)
        out = self.diagonal[:, None] * flat
        for rank, (theirs,) in self.ranks.ring([flat], self.lengths):
            crow, col, val = self._parts[rank]
            if len(col) and flat.shape[1]:
                out -= F.embedding_bag(col, theirs, crow, mode="sum", per_sample_weights=val)
        return out.view(x.shape)

    def exponential(self, x: Tensor, time: float | Tensor) -> Tensor:
        """Not here: eigenvectors need the whole matrix in one process."""
        checks.fail(
            "mode",
            "not be 'spectral' where ranks share the patterns",
            "spectral",
            "'heat' is the same without eigenvectors",
            NotImplementedError,
        )

    def agreed(self, x: Tensor, *options: Any) -> None:
        """Refuse on every rank what one cannot take."""
        with distributed.agreement(self.ranks) as agreed:
            checks.floating("X", x)
            own = self.lengths[self.ranks.rank]
            if x.dim() not in (2, 3) or len(x) != own:
                checks.fail("X", f"have shape (n, d) or (n, B, d) with n = {own}", tuple(x.shape))
            agreed.equal["X but for its length, eta, mode and steps"] = distributed.fingerprint(
                x.shape[1:], str(x.dtype), *options
            )
            # the backward pass exchanges messages, too
            agreed.equal["requires_grad of X"] = int(torch.is_grad_enabled() and x.requires_grad)


class _Product(torch.autograd.Function):
    """L x; L is symmetric, so that the gradient is L times that of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, L: RankLaplacian) -> Tensor:
        ctx.L = L
        return L._product(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(d_out, ctx.L), None
