"""Neighbour graphs of a batch of pattern sets: one graph per item, padding left out.

There is no loop over items: dense graphs are (B, N, N), and sparse ones are one block-diagonal
matrix of all items in CSR, applied by `_ops.neighbour_sum`. Graphs are built without gradient.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shared_kernels import checks, device

from . import _checks, _ops
from ._call import NeighbourSum
from ._nearest import nearest
from ._tiles import in_one_piece
from .graph.build_graph import adjacency, edges
from .graph.laplacian import inverse_roots


@dataclasses.dataclass(frozen=True)
class Graph:
    """L = diag(diagonal) - W for B items of N patterns, and each pattern's neighbours.

    W is (B, N, N), or None with (crow, col, val) over all B N patterns. ``half``: half a bound of
    the spectrum (1 when normalised, else the largest degree; known only where asked for).
    ``modes``: eigenvalues, none below 0, and eigenvectors, in float64.
    """

    index: Tensor
    ok: Tensor
    degrees: Tensor
    diagonal: Tensor
    W: Tensor | None = None
    crow: Tensor | None = None
    col: Tensor | None = None
    val: Tensor | None = None
    backend: str = "auto"
    half: float = 1.0
    modes: tuple[Tensor, Tensor] | None = None

    def adjacency(self, x: Tensor) -> Tensor:
        """W x for x (B, N, d) in the graph's dtype."""
        if self.W is not None:
            return self.W @ x
        if x.shape[0] == self.degrees.shape[0]:
            return self._sum(x.reshape(x.shape[0] * x.shape[1], x.shape[2])).view(x.shape)
        # one graph for every item: the items are columns
        out = self._sum(x.transpose(0, 1).flatten(1))
        return out.view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)

    def _sum(self, x: Tensor) -> Tensor:
        call = NeighbourSum(x, self.crow, self.col, self.val)  # type: ignore[arg-type]
        return _ops.neighbour_sum(call, self.backend)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which products are summed."""
        return self.degrees.dtype

    def exponential(self, x: Tensor, time: float | Tensor) -> Tensor:
        """exp(-time L) x by the eigenvectors of ``modes``; time a number, or (B, 1, 1)."""
        values, U = self.modes  # type: ignore[misc]
        rate = -time.squeeze(-1) if isinstance(time, Tensor) else -time
        U, x = U.to(self.dtype), x.to(self.dtype)
        return U @ (torch.exp(rate * values).to(self.dtype).unsqueeze(-1) * (U.mT @ x))

    def laplacian(self, x: Tensor) -> Tensor:
        """L x for x (B, N, d) in the graph's dtype."""
        return self.diagonal.unsqueeze(-1) * x - self.adjacency(x)


@torch.no_grad()
def build(
    X: Tensor,
    k: int,
    valid: Tensor | None = None,
    *,
    normalized: bool,
    sparse: bool,
    spectral: bool = False,
    bounded: bool = False,
    backend: str = "auto",
) -> Graph:
    """The graph of each item of X (B, N, d); ``valid`` (B, N) bool leaves patterns out of it.

    A left-out pattern is isolated: diffusion leaves it as it is and nobody else sees it.
    """
    X = X.detach()
    B, N, _ = X.shape
    cosine, index, ok = nearest(X, X, k, valid, exclude_self=True)
    if valid is not None:
        ok = ok & valid[:, :, None]
    # a neighbour that does not exist is the row itself, with weight 0
    weight = torch.where(ok, cosine.clamp(min=0.0), 0.0)
    if sparse:
        return _sparse(index, ok, weight, normalized, bounded, backend)
    W = adjacency(index, weight)
    degrees = W.sum(-1)
    modes = None
    if spectral:
        # in float64 from the weights on: the lowest eigenvalue of a rounded Laplacian is not 0
        wide, diagonal = _scaled(W.double(), normalized)
        values, U = torch.linalg.eigh(torch.diag_embed(diagonal) - wide)
        modes = (values.clamp(min=0.0), U)
    W, diagonal = _scaled(W, normalized)
    return Graph(
        index, ok, degrees, diagonal, W, half=_half(degrees, normalized, bounded), modes=modes
    )


def _scaled(W: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    """W and the diagonal of its Laplacian."""
    degrees = W.sum(-1)
    if not normalized:
        return W, degrees
    scale, diagonal = inverse_roots(degrees)
    return scale[:, :, None] * W * scale[:, None, :], diagonal


def _half(degrees: Tensor, normalized: bool, bounded: bool) -> float:
    if normalized or not bounded or degrees.numel() == 0:
        return 1.0
    if in_one_piece() or not (
        torch.compiler.is_compiling()
        or _checks.reads_values(degrees)
        or device.target(degrees).is_gpu
    ):
        checks.fail(
            "use_normalized_laplacian",
            "be True for diffusion_mode='heat' where no value can be read "
            "(export, trace, vmap, fake and meta tensors)",
            False,
            "the degree of the polynomial follows the largest degree of the graph",
            NotImplementedError,
        )
    return max(float(degrees.max()), 1e-12)


def _sparse(
    index: Tensor, ok: Tensor, weight: Tensor, normalized: bool, bounded: bool, backend: str
) -> Graph:
    B, N, _ = index.shape
    rows, cols, vals = edges(index, weight)
    rows, order = rows.sort(stable=True)
    cols, vals = cols[order], vals[order]
    crow = torch.searchsorted(rows, torch.arange(B * N + 1, device=rows.device))
    ones = vals.new_ones(B * N, 1)
    degrees = _ops.neighbour_sum(NeighbourSum(ones, crow, cols, vals), backend).squeeze(-1)
    diagonal = degrees
    if normalized:
        scale, diagonal = inverse_roots(degrees)
        vals = vals * scale[rows] * scale[cols]
    degrees, diagonal = degrees.view(B, N), diagonal.view(B, N)
    half = _half(degrees, normalized, bounded)
    return Graph(index, ok, degrees, diagonal, None, crow, cols, vals, backend, half)
