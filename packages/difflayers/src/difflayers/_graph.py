"""Neighbour graphs of a batch of pattern sets: one graph per item, padding left out.

No loop over items: a dense graph is (B, N, N); a sparse one is the block-diagonal CSR of all items,
applied by `_ops.neighbour_sum`. Graphs are built without gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from .diffusion import chebyshev, heat_coefficients
from .graph.build_graph import mutual

# Similarities held at once while neighbours are searched, in elements.
_TILE = 1 << 22


@torch.no_grad()
def nearest(
    X: Tensor, Y: Tensor, k: int, valid: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The k rows of Y (B, S, d) most similar to each row of X (B, L, d), by cosine, nearest first.

    valid: (B, S) bool, True = may be chosen. Returns cosines (B, L, k) in fp32 or fp64, -inf where
    an item has fewer than k to choose from, and indices (B, L, k).
    """
    same = X is Y
    X = F.normalize(X.to(torch.promote_types(X.dtype, torch.float32)), dim=-1)
    Y = X if same else F.normalize(Y.to(X.dtype), dim=-1)
    (B, L, _), S = X.shape, Y.shape[1]
    rows = max(1, _TILE // max(1, B * S))

    def search(i: int, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Rows i, i + 1, ... of X, whose cosines (B, rows, S) may be overwritten."""
        if exclude_self:
            here = torch.arange(i, i + cosine.shape[1], device=X.device)
            cosine.scatter_(-1, here.view(1, -1, 1).expand(B, -1, 1), -torch.inf)
        if valid is not None:
            cosine.masked_fill_(~valid[:, None, :], -torch.inf)
        return cosine.topk(k, dim=-1)

    if rows >= L:
        return search(0, X @ Y.mT)
    # One buffer for all tiles: small results between large temporaries would tear the heap apart.
    tile = X.new_empty(B, rows, S)
    found, where = X.new_empty(B, L, k), torch.empty(B, L, k, dtype=torch.int64, device=X.device)
    for i in range(0, L, rows):
        part = X[:, i : i + rows]
        cosine = tile[:, : part.shape[1]]
        torch.bmm(part, Y.mT, out=cosine)
        found[:, i : i + rows], where[:, i : i + rows] = search(i, cosine)
    return found, where


@dataclasses.dataclass(frozen=True)
class Graph:
    """L = diag(diagonal) - W for B items of N patterns, and each pattern's neighbours.

    W is (B, N, N), or None with (crow, col, val) over all B N patterns. ``half``: half a bound of
    the spectrum (1 when normalised, else the largest degree; known only where asked for).
    """

    index: Tensor
    ok: Tensor
    degrees: Tensor
    diagonal: Tensor
    W: Tensor | None = None
    crow: Tensor | None = None
    col: Tensor | None = None
    val: Tensor | None = None
    half: float = 1.0
    modes: tuple[Tensor, Tensor] | None = None

    def adjacency(self, x: Tensor) -> Tensor:
        """W x for x (B, N, d) in the graph's dtype."""
        if self.W is not None:
            return self.W @ x
        if x.shape[0] == self.degrees.shape[0]:
            flat = x.reshape(-1, x.shape[-1])
            return _ops.neighbour_sum(flat, self.crow, self.col, self.val).view(x.shape)
        # one graph for every item: the items are columns
        flat = x.transpose(0, 1).flatten(1)
        out = _ops.neighbour_sum(flat, self.crow, self.col, self.val)
        return out.view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)

    def laplacian(self, x: Tensor) -> Tensor:
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
) -> Graph:
    """The graph of each item of X (B, N, d); ``valid`` (B, N) bool leaves patterns out of it.

    A left-out pattern is isolated: diffusion leaves it as it is and nobody else sees it.
    """
    X = X.detach()
    B, N, _ = X.shape
    k = max(1, min(k, N - 1))
    if N < 2:
        index = torch.zeros(B, N, 1, dtype=torch.int64, device=X.device)
        cosine = torch.full(
            (B, N, 1),
            -torch.inf,
            device=X.device,
            dtype=torch.promote_types(X.dtype, torch.float32),
        )
    else:
        cosine, index = nearest(X, X, k, valid, exclude_self=True)
    ok = cosine > -torch.inf
    if valid is not None:
        ok = ok & valid[:, :, None]
    weight = torch.where(ok, cosine.clamp(min=0.0), 0.0)
    if sparse:
        return _sparse(index, ok, weight, normalized, bounded)
    W = weight.new_zeros(B, N, N).scatter_(-1, index, weight)
    W = torch.maximum(W, W.mT)
    degrees = W.sum(-1)
    diagonal = degrees
    if normalized:
        scale, diagonal = _normalizer(degrees)
        W = scale[:, :, None] * W * scale[:, None, :]
    modes = None
    if spectral:
        L = torch.diag_embed(diagonal) - W
        values, U = torch.linalg.eigh(L)
        modes = (values, U)
    return Graph(
        index, ok, degrees, diagonal, W, half=_half(degrees, normalized, bounded), modes=modes
    )


def _normalizer(degrees: Tensor) -> tuple[Tensor, Tensor]:
    alive = degrees > 0
    return torch.where(alive, degrees, 1.0).rsqrt() * alive, alive.to(degrees.dtype)


def _half(degrees: Tensor, normalized: bool, bounded: bool) -> float:
    if normalized or not bounded:
        return 1.0
    return max(float(degrees.max()), 1e-12)


def _sparse(index: Tensor, ok: Tensor, weight: Tensor, normalized: bool, bounded: bool) -> Graph:
    B, N, k = index.shape
    device = index.device
    first = (torch.arange(B, device=device) * N).view(B, 1, 1)
    i = torch.arange(B * N, device=device).repeat_interleave(k)
    j = (index + first).flatten()
    w = weight.flatten()
    # a mutual edge is in both lists already
    back = torch.where(mutual(index).flatten(), 0.0, w)
    rows, cols, vals = torch.cat((i, j)), torch.cat((j, i)), torch.cat((w, back))
    if device.type == "cpu" and not torch.compiler.is_compiling():
        real = vals > 0
        rows, cols, vals = rows[real], cols[real], vals[real]
    rows, order = rows.sort(stable=True)
    cols, vals = cols[order], vals[order]
    crow = torch.searchsorted(rows, torch.arange(B * N + 1, device=device))
    degrees = _ops.neighbour_sum(vals.new_ones(B * N, 1), crow, cols, vals).squeeze(-1)
    diagonal = degrees
    if normalized:
        scale, diagonal = _normalizer(degrees)
        vals = vals * scale[rows] * scale[cols]
    degrees, diagonal = degrees.view(B, N), diagonal.view(B, N)
    half = _half(degrees, normalized, bounded)
    return Graph(index, ok, degrees, diagonal, None, crow, cols, vals, half)


def smooth(
    graph: Graph,
    x: Tensor,
    mode: str,
    eta: float | Tensor,
    steps: int,
    restart: float = 0.1,
    eta_max: float = 1.0,
) -> Tensor:
    """H(L) x for x (B, N, d), any dtype; eta a number or, up to eta_max, one per item (B, 1, 1).

    simple: I - eta L. factored, iterative: (I - eta L)^steps. ppr: with restart. spectral, heat:
    exp(-eta steps L). x may have one item where the graph has B, and the other way round.
    """
    out = start = x.to(graph.degrees.dtype)
    B = max(graph.degrees.shape[0], x.shape[0])
    if x.shape[0] != B:
        out = start = start.expand(B, -1, -1)
    if mode == "spectral":
        values, U = graph.modes  # type: ignore[misc]
        time = eta * steps
        if isinstance(time, Tensor):
            time = time.squeeze(-1)
        out = U @ (torch.exp(-time * values).unsqueeze(-1) * (U.mT @ out))
    elif mode == "heat":
        scale = steps * graph.half
        coefficients: list[Any]
        if isinstance(eta, Tensor):
            terms = int(20 + 2 * scale * eta_max)
            coefficients = [
                torch.as_tensor(c).to(out) for c in heat_coefficients(eta * scale, terms)
            ]
        else:
            coefficients = list(heat_coefficients(eta * scale))
        out = chebyshev(lambda y: graph.laplacian(y) / graph.half - y, out, coefficients)
    elif mode == "ppr":
        for _ in range(steps):
            out = (1.0 - restart) * (out - eta * graph.laplacian(out)) + restart * start
    else:
        for _ in range(1 if mode == "simple" else steps):
            out = out - eta * graph.laplacian(out)
    return out.to(x.dtype)
