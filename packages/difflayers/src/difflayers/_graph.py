"""Neighbour graphs of a batch of pattern sets: one graph per item, padding left out.

No loop over items: a dense graph is (B, N, N); a sparse one is the block-diagonal CSR of all items,
applied by `_ops.neighbour_sum`. Graphs are built without gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks, device

from . import _checks, _kept, _ops
from ._attention import batch_of
from ._call import NeighbourSum
from .diffusion import chebyshev, heat_coefficients, heat_terms
from .graph.build_graph import mutual, unit

# Similarities held at once while neighbours are searched, in elements (8 MB, and the keys as much).
_TILE = 1 << 20
# A similarity in fixed point stands above the column in one integer: equal ones go by column.
_FIXED, _COLUMNS = 2.0**30, 1 << 22
_NOBODY = -(1 << 62)
_PROPOSE_FROM, _SLACK = 256, 8


@torch.no_grad()
def nearest(
    X: Tensor, Y: Tensor, k: int, valid: Tensor | None, exclude_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The k rows of Y (B, S, d) most similar to each row of X (B, L, d), by cosine, nearest first.

    Cosines are float64, and those that agree to 1e-9 count as equal: they are ordered by index, so
    that neither padding nor the size of a batch chooses among ties.

    valid: (B, S) bool, True = may be chosen. Returns cosines (B, L, k) in fp32 or fp64, indices
    (B, L, k), and which of them are there (B, L, k): an item may have fewer than k to choose from.
    The index of a missing one is the row's own with ``exclude_self``, else 0.
    """
    dtype = torch.promote_types(X.dtype, torch.float32)
    same = X is Y
    X = unit(X)
    Y = X if same else unit(Y)
    (B, L, _), S = X.shape, Y.shape[1]
    # On a CPU float32 products propose, and float64 decides among what they propose.
    proposes = _checks.reads_values(X, Y) and S >= _PROPOSE_FROM and S > k + _SLACK
    y32 = Y.float() if proposes else Y

    def search(i: int, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows i, i + 1, ... of X."""
        here = torch.arange(i, i + part.shape[1], device=X.device).unsqueeze(-1)
        own = here if exclude_self else None
        found = _proposed(part, Y, y32, k, valid, own) if proposes else None
        cosine, index, ok = _decided(part, Y, k, valid, own) if found is None else found
        return cosine.to(dtype), torch.where(ok, index, here if exclude_self else 0), ok

    rows = max(1, _TILE // max(1, B * S))
    if _kept.in_one_piece() or rows >= L:
        return search(0, X)
    # The results have their places before the large temporaries: between them they would tear the
    # heap apart.
    found, where = X.new_empty((B, L, k), dtype=dtype), X.new_empty((B, L, k), dtype=torch.int64)
    there = X.new_empty((B, L, k), dtype=torch.bool)
    for i in range(0, L, rows):
        part = slice(i, i + rows)
        found[:, part], where[:, part], there[:, part] = search(i, X[:, part])
    return found, where, there


def _ranked(
    cosine: Tensor, index: Tensor, k: int, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest cosines, equal ones by index: (cosines, places, which are there, keys)."""
    key = torch.round(cosine * _FIXED).to(torch.int64) * _COLUMNS
    key = key + (_COLUMNS - 1 - index % _COLUMNS)
    if out is not None:
        key = key.masked_fill(out, _NOBODY)
    # k more places of nobody: there are always k to choose from
    key, place = torch.nn.functional.pad(key, (0, k), value=_NOBODY).topk(k, dim=-1)
    ok = key > _NOBODY
    place = torch.where(ok, place, 0)
    if cosine.shape[-1] == 0:
        return cosine.new_zeros(place.shape), place, ok, key
    return torch.where(ok, cosine.gather(-1, place), 0.0), place, ok, key


def _out(index: Tensor, own: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Which columns a row may not choose: itself, and those that are not valid."""
    out = None if own is None else index == own
    if valid is None:
        return out
    hidden = ~valid[:, None, :]
    return hidden if out is None else hidden | out


def _decided(
    X: Tensor, Y: Tensor, k: int, valid: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All columns in float64."""
    index = torch.arange(Y.shape[1], device=X.device)
    return _ranked(X @ Y.mT, index, k, _out(index, own, valid))[:3]


def _proposed(
    X: Tensor, Y: Tensor, y32: Tensor, k: int, valid: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """k + _SLACK columns in float32, and among them in float64; None where they may not suffice."""
    near = X.float() @ y32.mT
    if own is not None:
        near.scatter_(-1, own.expand(X.shape[0], -1, 1), -torch.inf)
    if valid is not None:
        near.masked_fill_(~valid[:, None, :], -torch.inf)
    near, index = near.topk(k + _SLACK, dim=-1)
    flat = index.flatten(1)[..., None].expand(-1, -1, Y.shape[-1])
    # [B, rows, k + _SLACK]
    exact = (Y.gather(1, flat).unflatten(1, index.shape[1:]) @ X.unsqueeze(-1)).squeeze(-1)
    cosine, place, ok, _ = _ranked(exact, index, k, near == -torch.inf)
    # an entry that was not proposed is at most this
    bound = near[..., -1] + (2 * X.shape[-1] + 8) * torch.finfo(torch.float32).eps + 2 / _FIXED
    if not bool(((bound < cosine[..., -1]) | (near[..., -1] == -torch.inf)).all()):
        return None
    return cosine, index.gather(-1, place), ok


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
    weight = torch.where(ok, cosine.clamp(min=0.0), 0.0)
    if sparse:
        return _sparse(index, ok, weight, normalized, bounded, backend)
    # a missing neighbour is the row itself: it writes 0 on the diagonal
    W = weight.new_zeros(B, N, N).scatter(-1, index, weight)
    W = torch.maximum(W, W.mT)
    degrees = W.sum(-1)
    modes = None
    if spectral:
        # in float64, weights and all: a rounded Laplacian has a lowest eigenvalue beside 0
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
    scale, diagonal = _normalizer(degrees)
    return scale[:, :, None] * W * scale[:, None, :], diagonal


def _normalizer(degrees: Tensor) -> tuple[Tensor, Tensor]:
    alive = degrees > 0
    return torch.where(alive, degrees, 1.0).rsqrt() * alive, alive.to(degrees.dtype)


def _half(degrees: Tensor, normalized: bool, bounded: bool) -> float:
    if normalized or not bounded or degrees.numel() == 0:
        return 1.0
    if _kept.in_one_piece() or not (
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
    B, N, k = index.shape
    device = index.device
    first = (torch.arange(B, device=device) * N).view(B, 1, 1)
    i = torch.arange(B * N, device=device).repeat_interleave(k)
    j = (index + first).flatten()
    w = weight.flatten()
    # a mutual edge is in both lists already
    back = torch.where(mutual(index).flatten(), 0.0, w)
    rows, cols, vals = torch.cat((i, j)), torch.cat((j, i)), torch.cat((w, back))
    if _checks.reads_values(vals):
        real = vals > 0
        rows, cols, vals = rows[real], cols[real], vals[real]
    rows, order = rows.sort(stable=True)
    cols, vals = cols[order], vals[order]
    crow = torch.searchsorted(rows, torch.arange(B * N + 1, device=device))
    ones = vals.new_ones(B * N, 1)
    degrees = _ops.neighbour_sum(NeighbourSum(ones, crow, cols, vals), backend).squeeze(-1)
    diagonal = degrees
    if normalized:
        scale, diagonal = _normalizer(degrees)
        vals = vals * scale[rows] * scale[cols]
    degrees, diagonal = degrees.view(B, N), diagonal.view(B, N)
    half = _half(degrees, normalized, bounded)
    return Graph(index, ok, degrees, diagonal, None, crow, cols, vals, backend, half)


def smooth(
    graph: Graph,
    x: Tensor,
    mode: str,
    eta: float | Tensor,
    steps: int,
    restart: float = 0.1,
    eta_max: float = 1.0,
    heat: Sequence[float] | None = None,
) -> Tensor:
    """H(L) x for x (B, N, d), any dtype; eta a number or, up to eta_max, one per item (B, 1, 1).

    simple: I - eta L. factored, iterative: (I - eta L)^steps. ppr: with restart. spectral, heat:
    exp(-eta steps L), "heat" by the Chebyshev coefficients ``heat`` where they are known. x may
    have one item where the graph has B, and the other way round. Sums are in the graph's dtype,
    under autocast too.
    """
    with _kept.full_precision(x.device.type):
        return _smooth(graph, x, mode, eta, steps, restart, eta_max, heat).to(x.dtype)


def _smooth(
    graph: Graph,
    x: Tensor,
    mode: str,
    eta: float | Tensor,
    steps: int,
    restart: float,
    eta_max: float,
    heat: Sequence[float] | None,
) -> Tensor:
    out = start = x.to(graph.degrees.dtype)
    B = batch_of(graph.degrees, x)
    if x.shape[0] != B:
        out = start = start.expand(B, -1, -1)
    if mode == "spectral":
        values, U = graph.modes  # type: ignore[misc]
        time = eta * steps
        if isinstance(time, Tensor):
            time = time.squeeze(-1)
        kept = torch.exp(-time * values).to(out.dtype).unsqueeze(-1)
        U = U.to(out.dtype)
        return U @ (kept * (U.mT @ out))
    if mode == "heat":
        scale = steps * graph.half
        coefficients: list[Any]
        if isinstance(eta, Tensor):
            terms = heat_terms(scale * eta_max)
            coefficients = [c.to(out) for c in heat_coefficients(eta * scale, terms)]  # type: ignore[union-attr]
        else:
            coefficients = list(heat_coefficients(eta * scale) if heat is None else heat)
        return chebyshev(lambda y: graph.laplacian(y) / graph.half - y, out, coefficients)
    if mode == "ppr":
        for _ in range(steps):
            out = (1.0 - restart) * (out - eta * graph.laplacian(out)) + restart * start
        return out
    for _ in range(1 if mode == "simple" else steps):
        out = out - eta * graph.laplacian(out)
    return out
