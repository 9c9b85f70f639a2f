"""The calls of the ops: their arguments by name, their checks and the shapes of their results.

Also the types of what a forward pass saves for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels import checks
from shared_kernels.calls import replaced


class NeighbourSum(NamedTuple):
    """out_i = sum over e in [crow_i, crow_(i+1)) of val_e x_(col_e).

    This is W x for a symmetric matrix W in CSR. Sums are in fp32 (fp64 for fp64). The gradient of
    ``val`` is that of each edge by itself.
    """

    x: Tensor  # (N, d)
    crow: Tensor  # (N + 1,) int64
    col: Tensor  # (E,) int64
    val: Tensor  # (E,)

    def check(self) -> NeighbourSum:
        """The call itself, if it is legal."""
        checks.same_device(x=self.x, crow=self.crow, col=self.col, val=self.val)
        checks.shape("x", self.x, (None, None), "(N, d)")
        checks.shape("crow", self.crow, (self.x.shape[0] + 1,), "(N + 1,)")
        checks.shape("val", self.val, tuple(self.col.shape), "the shape of `col`")
        return self

    def fake(self) -> Tensor:
        """The shape and dtype of the result."""
        return self.x.new_empty(self.x.shape)

    def rows(self) -> Tensor:
        """The row (E,) that each edge belongs to."""
        return torch.repeat_interleave(self.crow.diff(), output_size=self.col.shape[0])

    def gradient_of_val(self, d_out: Tensor) -> Tensor:
        """d_out_i . x_j for the edge from row i to column j."""
        wide = torch.promote_types(self.val.dtype, torch.float32)
        products = d_out.to(wide)[self.rows()] * self.x.to(wide)[self.col]
        return products.sum(-1).to(self.val.dtype)

    def gradients(
        self, product: Callable[[NeighbourSum], Tensor], d_out: Tensor, needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """Those of `needs`, by a backend's product W x: the transpose of W is W itself."""
        found = {}
        if "x" in needs:
            found["x"] = product(replaced(self, x=d_out))
        if "val" in needs:
            found["val"] = self.gradient_of_val(d_out)
        return found


class NeighbourAttention(NamedTuple):
    """o_i = softmax over j of (scale q_i k_(neighbours_ij)) v_(neighbours_ij), for every head.

    A state without any neighbour gives zeros. A pattern that is listed twice counts twice.
    """

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, H, S, D)
    v: Tensor  # (B, H, S, D_v)
    neighbours: Tensor  # (B, L, K) int64, -1 for an empty place
    scale: float

    def check(self) -> NeighbourAttention:
        """The call itself, if it is legal."""
        q, k, v, neighbours, _ = self
        checks.same_device(q=q, k=k, v=v, neighbours=neighbours)
        (B, H, L, D), S = q.shape, k.shape[2]
        checks.shape("k", k, (B, H, None, D), "(B, H, S, D)")
        checks.shape("v", v, (B, H, S, None), "(B, H, S, D_v)")
        checks.shape("neighbours", neighbours, (B, L, None), "(B, L, K)")
        return self

    def fake(self) -> Tensor:
        """The shape and dtype of the result."""
        return self.q.new_empty((*self.q.shape[:-1], self.v.shape[-1]))


class Association(NamedTuple):
    """softmax(scale q k^T + mask) v after ``steps`` of q <- softmax(scale q k^T + mask) k.

    A state that sees no stored pattern gives zeros. ``save``: whether a backward pass will follow.
    """

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, H, S, D)
    v: Tensor  # (B, H, S, D_v)
    mask: Tensor | None  # bool (True = seen) or added to the scores; broadcasts to (B, H, L, S)
    scale: float
    steps: int
    save: bool = False

    def check(self) -> Association:
        """The call itself, if it is legal."""
        q, k, v, mask, *_ = self
        checks.same_device(q=q, k=k, v=v, mask=mask)
        (B, H, L, D), S = q.shape, k.shape[2]
        checks.shape("k", k, (B, H, None, D), "(B, H, S, D)")
        checks.shape("v", v, (B, H, S, None), "(B, H, S, D_v)")
        if self.steps < 0:
            checks.fail("steps", "be at least 0", self.steps)
        sizes = zip(reversed(() if mask is None else mask.shape), (S, L, H, B), strict=False)
        if mask is not None and (mask.dim() > 4 or any(n not in (1, m) for n, m in sizes)):
            checks.fail("mask", "broadcast to (B, H, L, S)", tuple(mask.shape))
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            checks.fail("mask", "want no gradient here", "one that does", "use mask.detach()")
        return self

    def fake(self) -> Tensor:
        """The shape and dtype of the result."""
        return self.q.new_empty((*self.q.shape[:-1], self.v.shape[-1]))


class States(NamedTuple):
    """What the native association saves, in fp32: its updated states, times scale, and for each
    state a score and log2 of the sum of exponentials beside it."""

    states: Tensor
    sums: Tensor

    @classmethod
    def fake(cls, call: Association) -> States:
        """The shapes and dtypes of what is saved."""
        if not call.save:
            return cls(*(call.q.new_empty(0, dtype=torch.float32) for _ in range(2)))
        shape, n = call.q.shape, call.steps
        states = call.q.new_empty((n, *shape), dtype=torch.float32)
        return cls(states, call.q.new_empty((2, n + 1, *shape[:-1]), dtype=torch.float32))


class LogSumExp(NamedTuple):
    """What neighbour attention saves: its output, and the log-sum-exp of each state's scores.

    ``top`` (B, H, L) is a state's largest score, in the units that the backend keeps scores in, and
    0 without neighbour. ``lse`` (B, H, L) is to base 2, of scores less top, and +inf without
    neighbour. Both are in fp32 (fp64 for fp64), which has no digits for a sum beside 1e8.
    """

    out: Tensor
    top: Tensor
    lse: Tensor

    @classmethod
    def fake(cls, call: NeighbourAttention) -> LogSumExp:
        """The shapes and dtypes of what is saved."""
        wide = torch.promote_types(call.q.dtype, torch.float32)
        top, lse = (call.q.new_empty(call.q.shape[:-1], dtype=wide) for _ in range(2))
        return cls(call.fake(), top, lse)
